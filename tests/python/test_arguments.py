"""Wrong arguments of every kind: an error of ours that names the argument, and never a panic."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import VALUES

from rustune import (
    CHAT_TEMPLATES,
    BitsAndBytesConfig,
    FastLanguageModel,
    GenerationConfig,
    LoraConfig,
    Model,
    RustuneError,
    SFTConfig,
    SFTTrainer,
    Tokenizer,
    TrainingArguments,
    apply_chat_template,
    get_chat_template,
    get_peft_model,
    pipeline,
    standardize_sharegpt,
    to_sharegpt,
    train_on_responses_only,
)

EXAMPLES = settings(max_examples=80, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return FastLanguageModel.from_pretrained(str(folder), 64)[0]


def names(function: Any, *without: str) -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name not in without
    ]


def attempt(name: str, call: Any) -> None:
    """Calls; what it raises is ours and says which argument it is about."""
    try:
        call()
    except RustuneError as error:
        assert name.removeprefix("lora_") in str(error) or "input_ids" in str(error) or "labels" in str(error), error
    except OSError:
        pass  # a folder that is not there


# Left out: where models come from, and what could ask the network.
LOADING = names(FastLanguageModel.from_pretrained, "model_name", "token", "revision", "cache_dir")
ADAPTING = names(FastLanguageModel.get_peft_model, "model")
GENERATING = [
    "attention_mask",
    "do_sample",
    "eos_token_id",
    "generation_config",
    "min_p",
    "num_return_sequences",
    "pad_token_id",
    "repetition_penalty",
    "seed",
    "stop_strings",
    "stopping_criteria",
    "max_time",
    "streamer",
    "temperature",
    "top_k",
    "top_p",
    "max_length",
    "num_beams",
    "bad_words_ids",
    "begin_suppress_tokens",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "suppress_tokens",
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@EXAMPLES
@given(name=st.sampled_from(LOADING), value=VALUES)
def test_loading(folder: Path, name: str, value: Any) -> None:
    attempt(name, lambda: FastLanguageModel.from_pretrained(str(folder), **{name: value}))


@pytest.mark.filterwarnings("ignore::UserWarning")
@EXAMPLES
@given(name=st.sampled_from(ADAPTING), value=VALUES)
def test_adapting(folder: Path, name: str, value: Any) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(folder), 64)
    attempt(name, lambda: FastLanguageModel.get_peft_model(model, **{name: value}))


@EXAMPLES
@given(name=st.sampled_from(sorted(LoraConfig().to_dict())), value=VALUES)
def test_adapting_by_pefts_names(folder: Path, name: str, value: Any) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(folder), 64)
    attempt(name, lambda: get_peft_model(model, LoraConfig(**{name: value})))


@EXAMPLES
@given(name=st.sampled_from(GENERATING), value=VALUES)
def test_generating(model: Model, name: str, value: Any) -> None:
    attempt(name, lambda: model.generate([[1, 2]], **{"max_new_tokens": 2, name: value}))


@EXAMPLES
@given(value=VALUES)
def test_prompts(model: Model, value: Any) -> None:
    attempt("input_ids", lambda: model.generate(value, max_new_tokens=1))


@EXAMPLES
@given(ids=VALUES, mask=VALUES, labels=VALUES)
def test_calling(model: Model, ids: Any, mask: Any, labels: Any) -> None:
    attempt("mask", lambda: model(ids, mask, labels).logits)
    attempt("mask", lambda: model([[1, 2]], mask, labels).logits)


@EXAMPLES
@given(name=st.text(max_size=12), value=VALUES)
def test_names_that_do_not_exist(model: Model, name: str, value: Any) -> None:
    attempt(name, lambda: GenerationConfig(**{name: value}))
    attempt(name, lambda: model.generate([[1, 2]], **{"max_new_tokens": 1, f"x{name}": value}))


# Settings whose values go to the hub, to a disk, or to other packages when they are used, not when they are written.
FIELDS = sorted(entry.name for entry in fields(SFTConfig))
# What the trainer takes by another name than its message has, which says what of it is wrong.
PARTS = ("model", "args", "tokenizer", "processing_class", "train_dataset", "eval_dataset")
TRAINING = names(SFTTrainer.__init__, "self", *PARTS)
TEXT = [{"text": "<|begin|>one two three"}]


@pytest.mark.filterwarnings("ignore::UserWarning")
@EXAMPLES
@given(kind=st.sampled_from([SFTConfig, TrainingArguments]), name=st.sampled_from(FIELDS), value=VALUES)
def test_settings(kind: Any, name: str, value: Any) -> None:
    attempt(name, lambda: kind(**{name: value}))


@pytest.mark.filterwarnings("ignore::UserWarning")
@EXAMPLES
@given(name=st.sampled_from(TRAINING), value=VALUES)
def test_trainers(model: Model, name: str, value: Any) -> None:
    attempt(name, lambda: SFTTrainer(model, **{"train_dataset": TEXT, name: value}))


@pytest.mark.filterwarnings("ignore::UserWarning")
@EXAMPLES
@given(name=st.sampled_from(PARTS), value=VALUES)
def test_what_trainers_are_made_of(model: Model, name: str, value: Any) -> None:
    # Errors of data name the dataset, a row or a column; those of settings the setting.
    attempt("", lambda: SFTTrainer(**{"model": model, "train_dataset": TEXT, name: value}))


@pytest.mark.filterwarnings("ignore::UserWarning")
@EXAMPLES
@given(name=st.sampled_from(names(Tokenizer.__call__, "self", "return_token_type_ids", "verbose")), value=VALUES)
def test_calling_a_tokenizer(model: Model, name: str, value: Any) -> None:
    asked = {"padding": True, "truncation": True, "max_length": 4, "return_tensors": "np", name: value}
    attempt({"text": "tokenizer"}.get(name, name), lambda: model.tokenizer(**{"text": ["ab", "c"], **asked}))


TALK = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]


@pytest.mark.filterwarnings("ignore::UserWarning")
@EXAMPLES
@given(name=st.sampled_from(names(Tokenizer.apply_chat_template, "self")), value=VALUES)
def test_chat_templates(model: Model, name: str, value: Any) -> None:
    attempt("", lambda: model.tokenizer.apply_chat_template(**{"conversation": TALK, name: value}))


@pytest.mark.filterwarnings("ignore::UserWarning")
@EXAMPLES
@given(
    name=st.sampled_from(["chat_template", "mapping", "map_eos_token", "system_message", "tokenizer"]),
    value=VALUES | st.sampled_from(sorted(CHAT_TEMPLATES)),
)
def test_getting_a_chat_template(folder: Path, name: str, value: Any) -> None:
    arguments = {"tokenizer": Tokenizer.from_folder(folder), name: value}
    attempt("", lambda: get_chat_template(**arguments).apply_chat_template(TALK, tokenize=False))


@pytest.mark.filterwarnings("ignore::UserWarning")
@EXAMPLES
@given(
    name=st.sampled_from(
        [
            "decode",
            "batch_decode",
            "encode",
            "tokenize",
            "convert_tokens_to_ids",
            "convert_ids_to_tokens",
            "add_tokens",
            "add_special_tokens",
            "pad",
        ]
    ),
    value=VALUES,
)
def test_methods_of_a_tokenizer(folder: Path, name: str, value: Any) -> None:
    attempt("", lambda: getattr(Tokenizer.from_folder(folder), name)(value))


@pytest.mark.filterwarnings("ignore::UserWarning")
@EXAMPLES
@given(
    name=st.sampled_from(["pad_token", "eos_token_id", "padding_side", "model_max_length", "chat_template"]),
    value=VALUES,
)
def test_attributes_of_a_tokenizer(folder: Path, name: str, value: Any) -> None:
    attempt(name.removesuffix("_id"), lambda: setattr(Tokenizer.from_folder(folder), name, value))


@pytest.mark.filterwarnings("ignore::UserWarning")
@EXAMPLES
@given(
    function=st.sampled_from([standardize_sharegpt, to_sharegpt, apply_chat_template]),
    at=st.integers(0, 6),
    value=VALUES,
)
def test_preparing_conversations(model: Model, function: Any, at: int, value: Any) -> None:
    rows = [{"conversations": TALK, "instruction": "a", "output": "b"}]
    arguments: dict[str, Any] = {"dataset": rows}
    if function is apply_chat_template:
        arguments["tokenizer"] = Tokenizer(model.tokenizer.native)
    named = names(function)
    arguments[named[at % len(named)]] = value
    attempt("", lambda: function(**arguments))


@pytest.mark.filterwarnings("ignore::UserWarning")
@EXAMPLES
@given(name=st.sampled_from(names(train_on_responses_only)), value=VALUES)
def test_masking(model: Model, name: str, value: Any) -> None:
    trainer = SFTTrainer(model, train_dataset=[{"messages": TALK}])
    attempt("", lambda: train_on_responses_only(**{"trainer": trainer, name: value}))


@pytest.mark.filterwarnings("ignore::UserWarning")
@EXAMPLES
@given(name=st.sampled_from(names(SFTTrainer.hyperparameter_search, "self")), value=VALUES)
def test_searching(folder: Path, name: str, value: Any) -> None:
    def model_init() -> Model:
        return FastLanguageModel.get_peft_model(FastLanguageModel.from_pretrained(str(folder), 64)[0], r=2)

    args = {"output_dir": str(folder.parent / "search"), "disable_tqdm": True}
    trainer = SFTTrainer(model_init=model_init, train_dataset=TEXT, eval_dataset=TEXT, args=args)
    # No run is made: the first thing that is asked for fails, unless that is the value.
    arguments = {"hp_space": lambda trial: {"learning_rate": "none"}, "n_trials": 1, name: value}
    attempt("", lambda: trainer.hyperparameter_search(**arguments))


@pytest.mark.filterwarnings("ignore::UserWarning")
@EXAMPLES
@given(name=st.sampled_from(names(BitsAndBytesConfig.__init__, "self")), value=VALUES)
def test_quantization(folder: Path, name: str, value: Any) -> None:
    def load() -> None:
        config = BitsAndBytesConfig(**{"load_in_4bit": True, name: value})
        FastLanguageModel.from_pretrained(str(folder), quantization_config=config)

    attempt("", load)


@pytest.mark.filterwarnings("ignore::UserWarning")
@EXAMPLES
@given(prompt=VALUES, name=st.sampled_from(["return_full_text", "task"]), value=VALUES)
def test_pipelines(model: Model, prompt: Any, name: str, value: Any) -> None:
    attempt("", lambda: pipeline("text-generation", model=model)(prompt, max_new_tokens=1))
    attempt("", lambda: pipeline(**{"model": model, "max_new_tokens": 1, name: value})("a"))


@EXAMPLES
@given(value=VALUES, batched=st.booleans())
def test_formatting_functions(model: Model, value: Any, batched: bool) -> None:
    rows = TEXT * 3
    attempt(
        "", lambda: SFTTrainer(model, train_dataset=rows, formatting_func=lambda row: [value] if batched else value)
    )
