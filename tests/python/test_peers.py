"""Genuine objects of transformers, PEFT and torch, handed to us; only where those are installed."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from rustune import (
    AutoModelForCausalLM,
    FastLanguageModel,
    Model,
    SFTTrainer,
    get_peft_model,
    train_on_responses_only,
)

pytestmark = [pytest.mark.usefixtures("peers"), pytest.mark.filterwarnings("default")]
NEVER = {"eos_token_id": [263], "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def torch() -> Any:
    return importlib.import_module("torch")


@pytest.fixture
def transformers() -> Any:
    return importlib.import_module("transformers")


def load(folder: Path) -> Model:
    return FastLanguageModel.from_pretrained(str(folder), 64, dtype="float32", load_in_4bit=False)[0]


def test_generate_and_calls_take_tensors(folder: Path, torch: Any) -> None:
    model = load(folder)
    ids = torch.tensor([[tiny.PAD, 5, 9], [40, 41, 42]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4, **NEVER)
    assert out.tolist() == model.generate(ids.tolist(), max_new_tokens=4, **NEVER).tolist()
    assert out.to("cuda").cpu().tolist() == out.tolist() and torch.tensor(np.asarray(out)).shape == (2, 7)
    labels = torch.where(mask.bool(), ids, -100)
    assert model(input_ids=ids, attention_mask=mask, labels=labels).loss > 0


def test_their_logits_are_ours(folder: Path, torch: Any, transformers: Any) -> None:
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        want = theirs(torch.tensor([[5, 9, 200, 31]])).logits.numpy()
    # f32 sums in another order.
    np.testing.assert_allclose(load(folder)([[5, 9, 200, 31]]).logits, want, atol=2e-4)


def test_their_tokenizer_serves(folder: Path, tmp_path: Path, transformers: Any) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = FastLanguageModel.get_peft_model(load(folder), r=4)
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    trainer = SFTTrainer(
        model,
        tokenizer=tokenizer,
        train_dataset=[{"messages": talk}] * 8,
        args={"max_steps": 2, "output_dir": str(tmp_path), "save_strategy": "no", "disable_tqdm": True},
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer=tokenizer),
    )
    train_on_responses_only(trainer, "<|user|>", "<|assistant|>")
    assert trainer.train_dataset is not None and trainer.train().global_step == 2
    trained = [label for label in trainer.train_dataset[0]["labels"] if label != -100]
    assert tokenizer.decode(trained) == "hello<|end|>"
    batch = tokenizer(["a", "bcd"], padding=True, padding_side="left", return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=3, **NEVER)
    assert out.shape == (2, 6) and len(tokenizer.batch_decode(out)) == 2
    assert model.generate(batch, max_new_tokens=3, **NEVER).tolist() == out.tolist()


@pytest.mark.parametrize("ours", [True, False])
def test_their_streamers_serve(folder: Path, transformers: Any, capsys: pytest.CaptureFixture[str], ours: bool) -> None:
    model = load(folder)
    tokenizer = model.tokenizer if ours else transformers.AutoTokenizer.from_pretrained(folder)
    prompt = [[5, 9, 200]]
    want = tokenizer.decode(model.generate(prompt, max_new_tokens=8, **NEVER)[0, 3:], skip_special_tokens=True)
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(prompt, streamer=streamer, max_new_tokens=8, **NEVER)
    assert capsys.readouterr().out == want + "\n"
    pieces = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60.0, skip_special_tokens=True)
    options = {"input_ids": prompt, "streamer": pieces, "max_new_tokens": 8, **NEVER}
    thread = threading.Thread(target=model.generate, kwargs=options)
    thread.start()
    assert "".join(pieces) == want
    thread.join()


def test_their_settings_and_callbacks_serve(folder: Path, tmp_path: Path, transformers: Any) -> None:
    seen: list[int] = []

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.global_step)

    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=False,
        metric_for_best_model="eval_loss",
        learning_rate=0.5,
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=1)
    trainer = SFTTrainer(
        FastLanguageModel.get_peft_model(load(folder), r=4),
        args=args,
        train_dataset=tiny.rows(),
        eval_dataset=tiny.rows(seed=2),
        callbacks=[Watch, stop],
    )
    steps = trainer.train().global_step
    # A learning rate of 0.5 makes the model worse, and patience is over before the end.
    assert seen == list(range(1, steps + 1)) and steps < 6


def test_settings_of_trl_serve(folder: Path, tmp_path: Path) -> None:
    args = importlib.import_module("trl").SFTConfig(
        output_dir=str(tmp_path), max_steps=2, max_length=64, bf16=False, report_to="none", disable_tqdm=True
    )
    trainer = SFTTrainer(FastLanguageModel.get_peft_model(load(folder), r=4), args=args, train_dataset=tiny.rows())
    assert trainer.max_seq_length == 64 and trainer.train().global_step == 2


def test_their_configs_serve(folder: Path, torch: Any, transformers: Any) -> None:
    peft = importlib.import_module("peft")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert model.dtype == "bfloat16" and model.get_memory_footprint() < load(folder).get_memory_footprint()
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    assert model.adapter is not None and model.adapter["r"] == 4
    generation = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=263)
    assert model.generate([[1, 2]], generation_config=generation).shape == (1, 5)
    assert FastLanguageModel.from_pretrained(str(folder), dtype=torch.bfloat16)[0].dtype == "bfloat16"


def test_peft_loads_what_we_save(folder: Path, tmp_path: Path, torch: Any, transformers: Any) -> None:
    peft = importlib.import_module("peft")
    model = FastLanguageModel.get_peft_model(load(folder), r=4, lora_alpha=8)
    args = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True}
    SFTTrainer(model, args={**args, "output_dir": str(tmp_path)}, train_dataset=tiny.rows()).train()
    model.save_pretrained(tmp_path / "adapter")
    base = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        want = theirs(torch.tensor([[5, 9, 200, 31]])).logits.numpy()
    np.testing.assert_allclose(model([[5, 9, 200, 31]]).logits, want, atol=2e-4)


@pytest.mark.parametrize(("tied", "tying"), [(False, False), (True, False), (True, True)])
def test_peft_reads_our_trained_vocabulary(
    tmp_path: Path, torch: Any, transformers: Any, tied: bool, tying: bool
) -> None:
    peft = importlib.import_module("peft")
    base = tiny.write_model(tmp_path / "base", tie_word_embeddings=tied)
    ids = [[5, 9, 200, 265, 31]]
    for saved in ([], ["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]):
        model, tokenizer = FastLanguageModel.from_pretrained(str(base), 64, dtype="float32", load_in_4bit=False)
        tokenizer.add_tokens([f"<new {i}>" for i in range(10)])
        model.resize_token_embeddings(len(tokenizer))
        model = FastLanguageModel.get_peft_model(model, r=4, modules_to_save=saved, ensure_weight_tying=tying)
        args = {"max_steps": 2, "learning_rate": 1e-2, "output_dir": str(tmp_path), "save_strategy": "no"}
        SFTTrainer(model, train_dataset=tiny.rows(), args={**args, "disable_tqdm": True}).train()
        model.save_pretrained(tmp_path / "adapter")
        tokenizer.save_pretrained(tmp_path / "adapter")
        theirs = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        theirs.resize_token_embeddings(len(transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")))
        theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
        with torch.no_grad():
            want = theirs(torch.tensor(ids)).logits.numpy()
        # f32 sums in another order.
        np.testing.assert_allclose(model(ids).logits, want, atol=2e-4, err_msg=str(saved))
