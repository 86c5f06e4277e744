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


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=["linear", "llama3"],
)
def test_positions_are_scaled_as_theirs_are(
    folder: Path, torch: Any, transformers: Any, scaling: dict[str, Any]
) -> None:
    config = transformers.LlamaConfig.from_pretrained(folder)
    config.rope_parameters = {**scaling, "rope_theta": 10000.0}
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    ids = [[(7 * i) % 256 for i in range(60)]]
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()
    asked = {"dtype": "float32", "load_in_4bit": False, "rope_scaling": scaling}
    ours = FastLanguageModel.from_pretrained(str(folder), 64, **asked)[0](ids).logits
    np.testing.assert_allclose(ours, want, atol=2e-4)
    # Without the scaling it is something else.
    assert np.abs(load(folder)(ids).logits - want).max() > 0.1


def test_their_stopping_criteria_serve(folder: Path, torch: Any, transformers: Any) -> None:
    model = load(folder)
    prompts = [[1, 2, 3, 4], [5, 1, 2, 3]]
    free = model.generate(prompts, max_new_tokens=8, **NEVER).tolist()

    class EndsWith(transformers.StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.all(input_ids[:, -1:] == torch.tensor([free[0][6]]), dim=1)

    assert free[0].index(free[0][6], 4) == 6 and free[0][6] not in free[1][4:10], "choose another prompt"
    criteria = transformers.StoppingCriteriaList([EndsWith(), transformers.MaxLengthCriteria(max_length=10)])
    out = model.generate(prompts, max_new_tokens=8, stopping_criteria=criteria, **NEVER)
    assert out.tolist() == [free[0][:7] + [tiny.PAD] * 3, free[1][:10]]


@pytest.mark.parametrize(
    "bans",
    [
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[84], [3, 3, 3]]},
        {"bad_words_ids": [[84], [3, 3, 3]], "eos_token_id": 84},
        {"suppress_tokens": [84, 13], "begin_suppress_tokens": [6]},
        {"min_new_tokens": 5},
        {"min_length": 7},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
    ],
    ids=str,
)
def test_what_may_not_come_next_is_what_theirs_leave_out(
    folder: Path, torch: Any, transformers: Any, bans: dict[str, Any]
) -> None:
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, n_changed = load(folder), 0
    for prompt in ([5, 9], [1, 2, 3, 4], [5, 9, 200, 31], [84, 84, 84]):
        options = {"max_new_tokens": 10, "pad_token_id": tiny.PAD, **NEVER, "eos_token_id": 263, **bans}
        if bans.keys() & {"min_length", "min_new_tokens"}:
            # An end that this model likes to come to.
            options["eos_token_id"] = int(model.generate([prompt], max_new_tokens=3, **NEVER)[0, -1])
        want = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)
        assert model.generate([prompt], **options).tolist() == want.tolist()
        without = {name: value for name, value in options.items() if name not in bans.keys() - {"eos_token_id"}}
        n_changed += model.generate([prompt], **without).tolist() != want.tolist()
    assert n_changed > 0


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


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True, "use_rslora": True}, {"init_lora_weights": "pissa", "use_rslora": True}]
)
def test_peft_loads_what_we_save(
    folder: Path, tmp_path: Path, torch: Any, transformers: Any, options: dict[str, Any]
) -> None:
    peft = importlib.import_module("peft")
    model = FastLanguageModel.get_peft_model(load(folder), r=4, lora_alpha=8, **options)
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
