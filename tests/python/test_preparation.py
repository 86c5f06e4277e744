"""From tables to conversations to texts: standardize_sharegpt, to_sharegpt and templates written as text."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import CELLS, TURNS
from test_tokenizer import make_tokenizer

from rustune import (
    ConfigError,
    DataError,
    RustuneError,
    Tokenizer,
    TokenizerError,
    apply_chat_template,
    get_chat_template,
    standardize_data_formats,
    standardize_sharegpt,
    to_sharegpt,
)
from rustune.chat_templates import CHAT_TEMPLATES

TABLE: list[dict[str, Any]] = [
    {"ask": "a", "more": "M", "say": "1"},
    {"ask": "b", "more": "", "say": 2},
    {"ask": "c", "more": None, "say": "3"},
]
TALKS = [
    {"conversations": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
    for i in range(4)
]
HEAD = "Below are some instructions that describe some tasks. Write responses that appropriately complete each request."
NAMES = (
    "llama-3, llama-3.1, llama-3.2, llama-3.3, llama, mistral, phi-3, phi-3.5, phi-4, gemma, gemma-2, gemma-3, "
    "qwen-2.5, qwen-3, chatml, zephyr, vicuna, alpaca, unsloth"
).split(", ")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return make_tokenizer(tmp_path / "made", eos_token="</s>", bos_token="<s>", chat_template=None)


def said(talk: list[dict[str, str]]) -> list[str]:
    return [turn["value"] for turn in talk]


def test_every_listed_name_is_there() -> None:
    assert set(NAMES) <= set(CHAT_TEMPLATES)
    for spelling in ("llama3", "llama-31", "qwen25", "qwen3", "gemma3", "phi35", "Llama-3.1"):
        assert CHAT_TEMPLATES[spelling].source


@pytest.mark.parametrize("name", NAMES)
def test_a_template_twice_is_the_template(tokenizer: Tokenizer, name: str) -> None:
    options: dict[str, Any] = {
        "system_message": "Be brief.",
        "mapping": {"role": "from", "content": "value", "user": "human"},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        states = [get_chat_template(tokenizer, name, **options).content_hash for _ in range(3)]
    # The first call may change the eos token, and with it nothing any more.
    assert states[0] == states[1] == states[2]


def test_a_prompt_is_merged_of_columns() -> None:
    made = to_sharegpt(TABLE, merged_prompt="Q: {ask}[[\nAlso: {more} ({ask})]]!", output_column_name="say")
    assert [said(row["conversations"]) for row in made] == [["Q: a\nAlso: M (a)!", "1"], ["Q: b!", "2"], ["Q: c!", "3"]]
    assert [turn["from"] for turn in made[0]["conversations"]] == ["human", "gpt"]
    assert list(made[0]) == ["conversations"]
    kept = to_sharegpt(TABLE, "{ask}", output_column_name="say", remove_unused_columns=False)
    assert list(kept[0]) == ["ask", "more", "say", "conversations"]
    plain = to_sharegpt([{"instruction": "i", "output": "o"}])
    assert said(plain[0]["conversations"]) == ["i", "o"]
    # What stands in a column is text, never a column's name.
    odd = to_sharegpt([{"instruction": "{output} [[x]]", "output": "o"}])
    assert said(odd[0]["conversations"])[0] == "{output} [[x]]"


def test_conversations_are_extended_at_random() -> None:
    rows = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(50)]
    made = to_sharegpt(rows, conversation_extension=3, random_state=7)
    assert made == to_sharegpt(rows, conversation_extension=3, random_state=7)
    assert made != to_sharegpt(rows, conversation_extension=3, random_state=8)
    for i, row in enumerate(made):
        questions, answers = said(row["conversations"])[::2], said(row["conversations"])[1::2]
        assert len(questions) == 3 and questions[0] == f"q{i}"
        assert [question[1:] for question in questions] == [answer[1:] for answer in answers]
    # Each row stands once in each place.
    assert {said(row["conversations"])[2] for row in made} == {f"q{i}" for i in range(50)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"merged_prompt": "{asked}"}, r"'asked'.*\['ask', 'more', 'say'\].*did you mean 'ask'"),
        ({"merged_prompt": "{ask}", "output_column_name": "sya"}, "did you mean 'say'"),
        ({"merged_prompt": "nothing"}, "names no {column}"),
        ({"merged_prompt": "{ask} [[always]]"}, "names no {column}"),
        ({"merged_prompt": "{ask} [[{more}"}, "do not match"),
        ({"merged_prompt": 3}, "expected a text"),
        ({"merged_prompt": "{ask}", "conversation_extension": 0}, "at least 1"),
        ({"merged_prompt": "{ask}", "conversation_extension": 1.5}, "a whole number"),
    ],
)
def test_wrong_prompts_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        to_sharegpt(TABLE, **{"output_column_name": "say", **arguments})


def test_roles_may_have_other_names() -> None:
    rows = [{"messages": [{"from": "Kunde", "value": "U"}, {"from": "Bot", "value": "A"}]}]
    made = standardize_data_formats(rows, aliases_for_user=["Kunde"], aliases_for_assistant=["Bot"])
    assert [turn["role"] for turn in made[0]["messages"]] == ["user", "assistant"]
    with pytest.raises(DataError, match="Kunde"):
        standardize_sharegpt(rows)
    for wrong in ([{"conversations": "text"}], [{"conversations": [3]}], [{"conversations": [{"value": "x"}]}]):
        with pytest.raises(DataError):
            standardize_sharegpt(wrong)


def test_a_text_shows_the_template(tokenizer: Tokenizer) -> None:
    made = apply_chat_template(TALKS, tokenizer)
    assert made[1]["text"] == f"{HEAD}\n\n### Instruction:\nq1\n\n### Response:\na1</s>"
    several = [{"conversations": TALKS[0]["conversations"] + TALKS[1]["conversations"]}]
    turn = "\n\n### Instruction:\nq{0}\n\n### Response:\na{0}</s>"
    assert apply_chat_template(several, tokenizer)[0]["text"] == HEAD + turn.format(0) + turn.format(1)
    # The answers are marked, and found by their markers too.
    batch = tokenizer.apply_chat_template(
        several[0]["conversations"], return_dict=True, return_assistant_tokens_mask=True
    )
    answers = [i for i, inside in zip(batch.input_ids, batch.assistant_masks, strict=True) if inside]
    assert tokenizer.decode(answers) == "a0</s>a1</s>"
    assert tokenizer.native.markers() == ("\n\n### Instruction:\n", "\n\n### Response:\n")


def test_a_system_message_has_a_place(tokenizer: Tokenizer) -> None:
    turn = "<|im_start|>user\n{INPUT}<|im_end|>\n<|im_start|>assistant\n{OUTPUT}<|im_end|>\n"
    text = "<|im_start|>system\n{SYSTEM}<|im_end|>\n" + 2 * turn
    made = apply_chat_template(TALKS[:1], tokenizer, text, default_system_message='"S" {{x}} {% y %}')
    want = '<|im_start|>system\n"S" {{x}} {% y %}<|im_end|>\n' + turn.replace("{INPUT}", "q0").replace("{OUTPUT}", "a0")
    assert made[0]["text"] == want
    own = [{"conversations": [{"role": "system", "content": "mine"}, *TALKS[0]["conversations"]]}]
    assert apply_chat_template(own, tokenizer, text, "S")[0]["text"].startswith("<|im_start|>system\nmine<|im_end|>\n<")
    with pytest.raises(TokenizerError, match="default_system_message"):
        apply_chat_template(TALKS, tokenizer, text)
    with pytest.raises(TokenizerError, match="not for system there"):
        apply_chat_template(own, tokenizer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{INPUT}", "two exchanges"),
        ("{OUTPUT}{INPUT}", "before"),
        ("{INPUT}{INPUT}{OUTPUT}{OUTPUT}", "before"),
        ("Q{INPUT}A{OUTPUT}Q{INPUT}B{OUTPUT}", "'A'.*'B'"),
        ("Q{INPUT}A{OUTPUT}{SYSTEM}Q{INPUT}A{OUTPUT}", "SYSTEM"),
        ("{SYSTEM}{SYSTEM}Q{INPUT}A{OUTPUT}", "SYSTEM"),
        (3, "expected a text"),
    ],
)
def test_texts_that_show_nothing(tokenizer: Tokenizer, text: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_chat_template(TALKS, tokenizer, text)
    assert tokenizer.chat_template is None


def test_what_cannot_be_applied(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="tokenizer = NoneType"):
        apply_chat_template(TALKS)
    with pytest.raises(DataError, match="to_sharegpt"):
        apply_chat_template([{"text": "x"}], tokenizer)
    with pytest.warns(UserWarning, match="no {SYSTEM}"):
        apply_chat_template(TALKS, tokenizer, default_system_message="S")


def test_datasets_stay_datasets(tokenizer: Tokenizer, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"ask": f"q{i}", "more": None, "say": f"a{i}"} for i in range(5)])
    options = {"merged_prompt": "{ask}[[{more}]]", "output_column_name": "say"}
    made = to_sharegpt(table, conversation_extension=2, **options)
    assert made.column_names == ["conversations"] and len(made[0]["conversations"]) == 4
    texts = apply_chat_template(standardize_sharegpt(made, num_proc=2), tokenizer)
    assert set(texts.column_names) == {"conversations", "text"} and texts[0]["text"].endswith("</s>")
    streamed = to_sharegpt(table.to_iterable_dataset(), **options)
    first = next(iter(apply_chat_template(standardize_sharegpt(streamed), tokenizer)))
    assert first["text"].count("### Instruction") == 1
    with pytest.raises(ConfigError, match="streamed"):
        to_sharegpt(table.to_iterable_dataset(), conversation_extension=2, **options)
    splits = standardize_sharegpt(to_sharegpt(datasets.DatasetDict(train=table, test=table), **options))
    assert splits["test"][0]["conversations"][0] == {"role": "user", "content": "q0"}
    with pytest.raises(DataError, match="'asked'"):
        to_sharegpt(table, "{asked}", output_column_name="say")


@given(st.lists(st.fixed_dictionaries({"conversations": st.lists(TURNS, max_size=4) | CELLS}), max_size=3))
def test_any_conversation_is_standardised_or_refused(rows: list[dict[str, Any]]) -> None:
    try:
        made = standardize_sharegpt(rows)
    except RustuneError:
        return
    assert standardize_sharegpt(made) == made  # a second time changes nothing


@given(
    st.text(alphabet="{}[]ab ", max_size=24),
    st.lists(st.fixed_dictionaries({"a": CELLS, "b": CELLS, "out": CELLS}), max_size=3),
)
def test_any_prompt_is_merged_or_refused(prompt: str, rows: list[dict[str, Any]]) -> None:
    try:
        made = to_sharegpt(rows, prompt, "a", "out")
    except RustuneError:
        return
    assert [len(row["conversations"]) for row in made] == [2] * len(rows)
    assert standardize_sharegpt(made) is not None


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("kept"), eos_token="</s>", bos_token="<s>")


@given(
    text=st.text(alphabet="{}%INPUT OUTPUT\n'\"\\#", max_size=40), end=st.text(max_size=5), after=st.text(max_size=5)
)
def test_any_text_is_a_template_or_refused(kept: Tokenizer, text: str, end: str, after: str) -> None:
    shown = f"{text}{{INPUT}}{end}{{OUTPUT}}{after}"
    try:
        made = apply_chat_template(TALKS[:1], kept, shown)
    except RustuneError:
        return
    want = shown.replace("{INPUT}", "q0").replace("{OUTPUT}", "a0")
    assert made[0]["text"].replace("</s>", "") == want.replace("</s>", "")
