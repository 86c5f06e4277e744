"""Templates by name, and ShareGPT datasets."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from test_tokenizer import make_tokenizer

from rustune import ConfigError, DataError, Tokenizer
from rustune.chat_templates import CHAT_TEMPLATES, get_chat_template, standardize_sharegpt

TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
]

# What each format is, by its published description; `<eos>` stands for the tokenizer's own.
EXPECTED = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
    "llama-3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nV<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama-3.1": "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 July 2024\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] V [/INST]",
    "mistral": "<s>[INST] S\n\nU [/INST] A</s>[INST] V [/INST]",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n<|user|>\nV</s>\n<|assistant|>\n",
    "vicuna": "<s>S USER: U ASSISTANT: A</s>USER: V ASSISTANT:",
    "alpaca": "<s>S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n### Instruction:\nV\n\n### Response:\n",
    "unsloth": "<s>S\n>>> User: U\n>>> Assistant: A</s>\n>>> User: V\n>>> Assistant: ",
    "phi-3": "<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\nA<|end|>\n<|user|>\nV<|end|>\n<|assistant|>\n",
    "phi-4": "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>U<|im_end|>"
    "<|im_start|>assistant<|im_sep|>A<|im_end|><|im_start|>user<|im_sep|>V<|im_end|><|im_start|>assistant<|im_sep|>",
    "gemma": "<s><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
    "<start_of_turn>user\nV<end_of_turn>\n<start_of_turn>model\n",
}
EXPECTED["qwen-2.5"] = EXPECTED["qwen-3"] = EXPECTED["chatml"]
ALIASES = {
    "llama-3.2": "llama-3.1",
    "llama-3.3": "llama-3.1",
    "phi-3.5": "phi-3",
    "gemma-2": "gemma",
    "gemma-3": "gemma",
}


def quiet(tokenizer: Tokenizer, name: str, **options: object) -> Tokenizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Tokenizer = get_chat_template(tokenizer, name, map_eos_token=False, **options)  # type: ignore[arg-type]
        return made


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return make_tokenizer(tmp_path / "made", eos_token="</s>", chat_template=None)


@pytest.mark.parametrize("name", list(CHAT_TEMPLATES))
def test_every_name_renders_its_format(tokenizer: Tokenizer, name: str) -> None:
    quiet(tokenizer, name)
    text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert text == EXPECTED[ALIASES.get(name, name)]
    # Every template marks its answers, so assistant_only_loss is exact, and its markers can be found.
    marked = tokenizer.apply_chat_template(TALK[:3], return_dict=True, return_assistant_tokens_mask=True)
    answer = [i for i, inside in zip(marked.input_ids, marked.assistant_masks, strict=True) if inside]
    said = tokenizer.decode(answer).removeprefix("<think>\n\n</think>\n\n")
    assert said.startswith("A") and len(said) > 1
    instruction, response = tokenizer.native.markers()
    assert instruction.strip() in text and response.strip() in text


def test_the_same_twice_is_the_same(tokenizer: Tokenizer) -> None:
    quiet(tokenizer, "llama-3.1")
    once = tokenizer.content_hash
    quiet(tokenizer, "llama3.1")
    assert tokenizer.content_hash == once


def test_date_and_default_system_message(tokenizer: Tokenizer) -> None:
    quiet(tokenizer, "llama-3.1", system_message='Say "hi"')
    text = tokenizer.apply_chat_template(TALK[1:], tokenize=False, date_string="1 May 2020")
    assert 'Today Date: 1 May 2020\n\nSay "hi"<|eot_id|>' in text
    assert "Say" not in tokenizer.apply_chat_template(TALK, tokenize=False)


def test_eos_is_what_ends_a_turn(tokenizer: Tokenizer, tmp_path: Path) -> None:
    get_chat_template(tokenizer, "chatml")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token != "<|im_end|>"
    other = make_tokenizer(tmp_path / "other", eos_token="</s>")
    with pytest.warns(UserWarning) as caught:
        get_chat_template(other, "gemma-2")
    assert any("turns end with </s>" in str(w.message) for w in caught)
    assert any("ordinary text: <start_of_turn>" in str(w.message) for w in caught)
    assert other.apply_chat_template(TALK[1:3], tokenize=False).endswith("model\nA</s>\n")


def test_qwen_3_keeps_the_thoughts_of_the_last_answer(tokenizer: Tokenizer) -> None:
    quiet(tokenizer, "qwen-3")
    thoughtful = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA"}
    talk = [TALK[1], thoughtful, TALK[3], thoughtful]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    turn = "<|im_start|>{0}\n{1}<|im_end|>\n"
    assert text == turn.format("user", "U") + turn.format("assistant", "A") + turn.format("user", "V") + turn.format(
        "assistant", thoughtful["content"]
    )
    closed = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert closed.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    text = tokenizer.apply_chat_template(
        [TALK[0], TALK[1], call, {"role": "tool", "content": "7"}], tools=tools, tokenize=False
    )
    assert (
        text.startswith("<|im_start|>system\nS\n\n# Tools\n")
        and '\n{"type": "function", "function": {"name": "f"}}\n' in text
    )
    assert '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>\n' in text
    assert text.endswith("<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n")


def test_pairs_mappings_and_wrong_names(tokenizer: Tokenizer) -> None:
    get_chat_template(tokenizer, ("{{ messages[0].content }}", "</s>"))
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == "S"
    form = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    quiet(tokenizer, "zephyr", mapping=form)
    theirs = [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}]
    assert tokenizer.apply_chat_template(theirs, tokenize=False) == "<|user|>\nU</s>\n<|assistant|>\nA</s>\n"
    assert tokenizer.apply_chat_template(TALK[:1], tokenize=False) == "<|system|>\nS</s>\n"
    with pytest.raises(ConfigError, match=r"llama-4.*llama-3.*did you mean"):
        get_chat_template(tokenizer, "llama-4")
    for wrong in (("a", "b", "c"), 3, None, ()):
        with pytest.raises(ConfigError, match="pair"):
            get_chat_template(tokenizer, wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tokenizer = NoneType"):
        get_chat_template(None)
    with pytest.raises(ConfigError, match="system_message = 3"):
        get_chat_template(tokenizer, system_message=3)  # type: ignore[arg-type]
    for mapping in ("role", {"role": 3}, ["role"]):
        with pytest.raises(ConfigError, match="mapping = "):
            get_chat_template(tokenizer, mapping=mapping)  # type: ignore[arg-type]


def test_sharegpt_becomes_role_and_content() -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A", "weight": None}], "id": 3}
    ]
    want: list[dict[str, Any]] = [
        {"conversations": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}], "id": 3}
    ]
    strip = [
        {**row, "conversations": [dict(sorted(m.items())) for m in row["conversations"]]}
        for row in standardize_sharegpt(rows)
    ]
    assert strip == [{**row, "conversations": [dict(sorted(m.items())) for m in row["conversations"]]} for row in want]
    assert standardize_sharegpt(want) == want
    with pytest.raises(DataError, match="wizard"):
        standardize_sharegpt([{"conversations": [{"from": "wizard", "value": "U"}]}])
    with pytest.raises(DataError, match="conversations"):
        standardize_sharegpt([{"text": "x"}])


def test_sharegpt_in_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"conversations": [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}]}] * 3
    made = standardize_sharegpt(datasets.Dataset.from_list(rows))
    assert made[0]["conversations"][1] == {"role": "assistant", "content": "A"}
    streamed = standardize_sharegpt(datasets.Dataset.from_list(rows).to_iterable_dataset())
    assert next(iter(streamed))["conversations"][0] == {"role": "user", "content": "U"}
