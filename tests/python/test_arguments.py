"""Wrong arguments of every kind: an error of ours that names the argument, and never a panic."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rustune import FastLanguageModel, GenerationConfig, LoraConfig, Model, RustuneError, get_peft_model

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-2, 400), st.text(max_size=3), st.none()), max_size=3),
    st.lists(st.lists(st.integers(-2, 400), max_size=4), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.just(np.array([[1.5, 2.0]])),
    st.just(object()),
)
EXAMPLES = settings(max_examples=120, suppress_health_check=list(HealthCheck))


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
LOADING = names(
    FastLanguageModel.from_pretrained, "model_name", "token", "revision", "cache_dir", "quantization_config"
)
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
    "temperature",
    "top_k",
    "top_p",
    "max_length",
    "num_beams",
    "bad_words_ids",
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@EXAMPLES
@given(name=st.sampled_from(LOADING), value=JUNK)
def test_loading(folder: Path, name: str, value: Any) -> None:
    attempt(name, lambda: FastLanguageModel.from_pretrained(str(folder), **{name: value}))


@pytest.mark.filterwarnings("ignore::UserWarning")
@EXAMPLES
@given(name=st.sampled_from(ADAPTING), value=JUNK)
def test_adapting(folder: Path, name: str, value: Any) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(folder), 64)
    attempt(name, lambda: FastLanguageModel.get_peft_model(model, **{name: value}))


@EXAMPLES
@given(name=st.sampled_from(sorted(LoraConfig().to_dict())), value=JUNK)
def test_adapting_by_pefts_names(folder: Path, name: str, value: Any) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(folder), 64)
    attempt(name, lambda: get_peft_model(model, LoraConfig(**{name: value})))


@EXAMPLES
@given(name=st.sampled_from(GENERATING), value=JUNK)
def test_generating(model: Model, name: str, value: Any) -> None:
    attempt(name, lambda: model.generate([[1, 2]], **{"max_new_tokens": 2, name: value}))


@EXAMPLES
@given(value=JUNK)
def test_prompts(model: Model, value: Any) -> None:
    attempt("input_ids", lambda: model.generate(value, max_new_tokens=1))


@EXAMPLES
@given(ids=JUNK, mask=JUNK, labels=JUNK)
def test_calling(model: Model, ids: Any, mask: Any, labels: Any) -> None:
    attempt("mask", lambda: model(ids, mask, labels).logits)
    attempt("mask", lambda: model([[1, 2]], mask, labels).logits)


@EXAMPLES
@given(name=st.text(max_size=12), value=JUNK)
def test_names_that_do_not_exist(model: Model, name: str, value: Any) -> None:
    attempt(name, lambda: GenerationConfig(**{name: value}))
    attempt(name, lambda: model.generate([[1, 2]], **{"max_new_tokens": 1, f"x{name}": value}))
