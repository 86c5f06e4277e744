"""Notebooks written for plain transformers with PEFT: their names, over what is here."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from rustune import (
    AutoModelForCausalLM,
    AutoPeftModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    ConfigError,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    FastLanguageModel,
    GenerationConfig,
    LoraConfig,
    Model,
    PeftModel,
    SFTTrainer,
    Trainer,
    TrainingArguments,
    get_peft_model,
    pipeline,
    prepare_model_for_kbit_training,
    set_seed,
    unsloth_train,
)
from rustune.collators import DataCollatorWithPadding, default_data_collator
from rustune.config import settings_from

NEVER = {"eos_token_id": [263], "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("llama"))


def load(folder: Path, **options: Any) -> Model:
    return AutoModelForCausalLM.from_pretrained(folder, torch_dtype="float32", **options)


def arguments(tmp_path: Path, **changes: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 3,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**settings, **changes})


def test_models_are_loaded_as_they_are_or_quantized(folder: Path) -> None:
    plain = load(folder, device_map="auto")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="float16",
        bnb_4bit_use_double_quant=True,
    )
    with pytest.warns(UserWarning, match="low_cpu_mem_usage means nothing here"):
        quantized = load(folder, quantization_config=config, low_cpu_mem_usage=True)
    once = load(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert max(quantized.get_memory_footprint(), once.get_memory_footprint()) < plain.get_memory_footprint()
    # Scales that are quantized too are other scales; in a model as small as this they take more room, not less.
    assert quantized.get_memory_footprint() != once.get_memory_footprint()
    eight = load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert once.get_memory_footprint() < eight.get_memory_footprint() < plain.get_memory_footprint()
    assert load(folder, load_in_8bit=True).get_memory_footprint() == eight.get_memory_footprint()
    same = FastLanguageModel.from_pretrained(str(folder), dtype="float32", load_in_4bit=False)[0]
    ids = [[1, 2, 3]]
    np.testing.assert_array_equal(plain(ids).logits, same(ids).logits)
    with pytest.raises(ConfigError, match="fp4"):
        load(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"))
    with pytest.raises(ConfigError, match="did you mean bnb_4bit_quant_type"):
        BitsAndBytesConfig(bnb_4bit_quant_typ="nf4")


def test_a_qlora_notebook_of_plain_transformers(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", use_fast=True, trust_remote_code=True)
    assert tokenizer.padding_side == "left"
    model = prepare_model_for_kbit_training(
        load(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True)), use_gradient_checkpointing=False
    )
    assert model.checkpointing == "false"
    model.gradient_checkpointing_enable()
    assert model.checkpointing == "true"
    model.enable_input_require_grads()
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, bias="none", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    counted = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for _, p in model.named_parameters() if p.requires_grad)
    assert (trained, counted) == model.get_nb_trainable_parameters() and trained == 2 * 4 * (128 + 96)
    assert model.peft_config["default"]["r"] == 4

    rows = [tokenizer(f"row {i}", truncation=True, max_length=16) for i in range(12)]
    trainer = Trainer(
        model=model,
        train_dataset=[dict(row) for row in rows],
        args=arguments(tmp_path, optim="paged_adamw_8bit"),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    assert trainer.args.gradient_accumulation_steps == 1
    result = unsloth_train(trainer)
    assert result.global_step == 3
    trainer.model.save_pretrained(tmp_path / "adapter")

    ids = [[1, 2, 3, 4]]
    again = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", quantization_config=BitsAndBytesConfig(load_in_4bit=True), torch_dtype="float32"
    )
    np.testing.assert_array_equal(again(ids).logits, model(ids).logits)
    base = load(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    before = base(ids).logits
    put_on = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=False)
    np.testing.assert_array_equal(put_on(ids).logits, model(ids).logits)
    assert np.abs(before - put_on(ids).logits).max() > 1e-4
    with pytest.raises(ConfigError, match="has an adapter with r = 4 already"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"has no adapter_config\.json"):
        AutoPeftModelForCausalLM.from_pretrained(folder)


def test_a_trainer_adds_the_adapter_it_is_given(folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    trainer = SFTTrainer(load(folder), args=arguments(tmp_path), train_dataset=tiny.rows(count=8), peft_config=config)
    assert trainer.model.adapter is not None and trainer.model.adapter["r"] == 2
    assert trainer.train().global_step == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": "yes"}, "use_dora"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"target_modules": ["w"]}, "w"),
    ],
)
def test_adapter_settings_that_cannot_be_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(load(folder), LoraConfig(**changes))


def test_settings_of_others_that_would_change_numbers_are_named(folder: Path) -> None:
    class Theirs:
        """As PEFT's config writes itself."""

        def __init__(self, **written: Any) -> None:
            self.written = {"r": 2, "lora_alpha": 4, "target_modules": {"v_proj", "q_proj"}, **written}

        def to_dict(self) -> dict[str, Any]:
            return self.written

    idle = {"peft_type": "LORA", "peft_version": "1", "megatron_config": None, "loftq_config": {}, "rank_pattern": {}}
    assert get_peft_model(load(folder), Theirs(**idle)).adapter["target_modules"] == ["q_proj", "v_proj"]  # type: ignore[index]
    for written, message in (
        ({"peft_type": "IA3"}, "IA3"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ):
        with pytest.raises(ConfigError, match=message):
            get_peft_model(load(folder), Theirs(**written))
    with pytest.raises(ConfigError, match="expected a LoraConfig"):
        get_peft_model(load(folder), {"r": 2})
    with pytest.raises(ConfigError, match="did you mean lora_alpha"):
        LoraConfig(lora_alfa=3)
    with pytest.raises(ConfigError, match="adapter_name"):
        get_peft_model(load(folder), LoraConfig(), "other")
    with pytest.raises(ConfigError, match="expected a model loaded by rustune"):
        get_peft_model("name", LoraConfig())  # type: ignore[arg-type]


def test_tokens_are_read_where_the_settings_of_others_hide_them() -> None:
    class Theirs:
        """As transformers' settings write themselves."""

        hub_token = "hf_real"
        eos_token = None

        def to_dict(self) -> dict[str, Any]:
            return {"max_steps": 2, "hub_token": "<HUB_TOKEN>", "eos_token": "<EOS_TOKEN>", "output_dir": "out"}

    settings = settings_from(Theirs())
    assert settings.hub_token == "hf_real" and settings.eos_token is None and settings.max_steps == 2


def test_a_pipeline_continues_texts_and_conversations(folder: Path) -> None:
    model = load(folder)
    tokenizer = model.tokenizer
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=5, **NEVER)
    ids = tokenizer("go", return_tensors="np").input_ids
    new = tokenizer.decode(model.generate(ids, max_new_tokens=5, **NEVER)[0, ids.shape[1] :], skip_special_tokens=True)
    assert pipe("go") == [{"generated_text": "go" + new}]
    assert pipe("go", return_full_text=False) == [{"generated_text": new}]
    assert pipe(["go", "go"]) == [[{"generated_text": "go" + new}]] * 2
    talk = [{"role": "user", "content": "hi"}]
    answered = pipe(talk)[0]["generated_text"]
    assert answered[:1] == talk and answered[1]["role"] == "assistant" and talk == talk[:1]
    by_name = pipeline(model=str(folder), torch_dtype="float32", device=0)
    assert by_name("go", max_new_tokens=5, **NEVER) == [{"generated_text": "go" + new}]
    with pytest.raises(ConfigError, match="sentiment-analysis"):
        pipeline("sentiment-analysis")
    with pytest.raises(ConfigError, match="max_new_tokens"):
        pipe("go", max_new_token=3)


def test_settings_of_generation_are_carried_by_an_object(folder: Path) -> None:
    model = load(folder)
    model.generation_config.max_new_tokens = 3
    model.generation_config.eos_token_id = 263
    assert model.generate([[1, 2]]).shape == (1, 5)
    assert model.generate([[1, 2]], generation_config=GenerationConfig(max_new_tokens=2)).shape == (1, 4)
    assert model.generate([[1, 2]], GenerationConfig(max_new_tokens=2).temperature, max_new_tokens=1).shape == (1, 3)
    with pytest.raises(ConfigError, match="did you mean temperature"):
        GenerationConfig(temper=1.0)
    with pytest.raises(AttributeError, match="temper"):
        _ = GenerationConfig().temper


def test_collators_pad_what_they_are_given(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "text": "abc"}, {"input_ids": [4], "labels": [4]}]
    batch = DataCollatorForSeq2Seq(tokenizer)(rows)
    pad = tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, pad, pad]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    tokenizer.padding_side = "left"
    batch = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=4)(rows)
    assert batch["labels"].tolist() == [[-100, -100, 2, 3], [-100, -100, -100, 4]]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    assert batch["labels"].tolist() == [[1, 2, 3], [-100, -100, 4]]
    assert set(DataCollatorWithPadding(tokenizer)(rows)) == {"input_ids", "attention_mask"}
    assert default_data_collator([{"a": [1, 2]}, {"a": [3, 4]}])["a"].tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ConfigError, match="mlm = True"):
        DataCollatorForLanguageModeling(tokenizer)(rows)
    with pytest.raises(ConfigError, match="mlm = True"):
        SFTTrainer(
            get_peft_model(load(folder), LoraConfig()),
            train_dataset=tiny.rows(),
            data_collator=DataCollatorForLanguageModeling(tokenizer),
        )


def test_a_seed_makes_numbers_repeat() -> None:
    drawn = []
    for _ in range(2):
        set_seed(3407)
        drawn.append((random.random(), np.random.rand()))
    assert drawn[0] == drawn[1]


def test_a_tokenizer_takes_what_it_is_told_and_refuses_the_rest(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=99, pad_token="<|begin|>")
    assert tokenizer.model_max_length == 99 and tokenizer.pad_token == "<|begin|>"
    with pytest.raises(ConfigError, match="did you mean padding_side"):
        AutoTokenizer.from_pretrained(folder, padding_sid="left")
