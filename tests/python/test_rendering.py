"""Templates render as Jinja2 renders them, set up as transformers sets it up; answers are marked at the same places."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import pytest
from conftest import ROOT
from test_tokenizer import make_tokenizer

from rustune import Tokenizer, TokenizerError
from rustune.chat_templates import CHAT_TEMPLATES
from rustune.text_templates import DEFAULT_TEMPLATE, jinja_of_text


def load_reference() -> ModuleType:
    """The module that set Jinja2 up for the fixtures of the Rust tests."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "tests" / "fixtures" / "make_chat_templates.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = load_reference()
DAY = "2024-07-26"  # the day the reference's clock shows

SYSTEM = {"role": "system", "content": "  Answer in one word.\n"}
USER = {"role": "user", "content": '\tGrüße, "you" & <me>\n\n'}
ANSWER = {"role": "assistant", "content": " Hello! 🙂 "}
MORE = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "<think>\nsmall\n</think>\n\n2"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Größe "x" <b>',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "where"},
                    "days": {"type": "integer", "enum": [1, 2], "description": "how many"},
                },
                "required": ["city"],
            },
            "return": {"type": "string"},
        },
    }
]


def call(arguments: object) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}],
    }


TOLD = [
    {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": '{"temp": 21.5}'},
    {"role": "assistant", "content": "Warm."},
]
TALKS: dict[str, list[dict[str, Any]]] = {
    "question": [USER],
    "system and question": [SYSTEM, USER],
    "one turn": [USER, ANSWER],
    "open": [SYSTEM, USER, ANSWER, MORE[0]],
    "several turns": [SYSTEM, USER, ANSWER, *MORE, USER, ANSWER],
    "without system": [USER, ANSWER, *MORE],
    "calls with a dict": [USER, call({"city": "Köln", "days": 2}), *TOLD, *MORE],
    "calls with a text": [SYSTEM, USER, call('{"city": "Köln"}'), *TOLD],
    "two answers": [USER, ANSWER, ANSWER],
    "empty": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
}
VARIANTS = list(product(TALKS, [None, TOOLS], [False, True]))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("made"), bos_token="<s>", eos_token="</s>")


def jinja2_renders(source: str, context: dict[str, Any]) -> tuple[str, list[tuple[int, int]]] | None:
    """The text and the ranges of the answers; None if the template refuses.

    Raises:
        TypeError: If the template did not think of this (a loop over None).
    """
    try:
        marked = REFERENCE.environment().from_string(source).render(**context)
    except jinja2.exceptions.TemplateError:
        return None
    text, answers, start = "", [], 0
    for c in marked:
        if c == REFERENCE.START:
            start = len(text)
        elif c == REFERENCE.END:
            answers.append((start, len(text)))
        else:
            text += c
    return text, answers


def compare(tokenizer: Tokenizer, name: str, source: str, special: dict[str, str] | None = None) -> Iterator[str]:
    """Compares all variants; yields the name of each that was rendered."""
    special = special or tokenizer.special_tokens_map
    for talk, tools, prompt in VARIANTS:
        # One of the templates adds `functions` and `datetime` to a text without asking whether they are there.
        variables = {"date_string": DAY, "functions": "[]", "datetime": "noon", **special}
        context = {"messages": TALKS[talk], "tools": tools, "documents": None, "add_generation_prompt": prompt}
        try:
            want = jinja2_renders(source, {**context, **variables})
        except TypeError:
            continue
        try:
            got = tokenizer.native.render(
                TALKS[talk], tools=tools, add_generation_prompt=prompt, variables=variables, template=source
            )
        except TokenizerError as refusal:
            assert want is None, f"{name}, {talk}: {refusal}"
            continue
        case = f"{name}, {talk}, {'tools' if tools else 'no tools'}, {'prompt' if prompt else 'no prompt'}"
        assert want is not None, f"{case}: Jinja2 refuses, rustune gives {got[0]!r}"
        assert got == want, case
        yield case


@pytest.mark.parametrize("name", list(CHAT_TEMPLATES))
def test_named_templates(tokenizer: Tokenizer, name: str) -> None:
    source = CHAT_TEMPLATES[name].source
    rendered = list(compare(tokenizer, name, source))
    assert len(rendered) >= 16  # without tools every usual conversation has a place
    text, answers = tokenizer.native.render(TALKS["several turns"], template=source)
    # Each answer with what ends its turn, and nothing else.
    assert len(answers) == 3
    for (start, end), said in zip(answers, ("Hello! 🙂", "2", "Hello! 🙂"), strict=True):
        assert said in text[start:end]
        assert "1 + 1?" not in text[start:end] and "one word" not in text[start:end]


def test_templates_of_texts(tokenizer: Tokenizer) -> None:
    with_system = "{SYSTEM}\n" + 2 * "Q{{%: {INPUT}\nA: {OUTPUT}</s>\n"
    for text, system in ((DEFAULT_TEMPLATE, None), (with_system, 'Be "brief".\n')):
        source = jinja_of_text(tokenizer, text, system, ())
        assert len(list(compare(tokenizer, text, source))) >= 16


def test_the_assistant_mask_is_the_answers(tokenizer: Tokenizer) -> None:
    compared = 0
    for name, talk in product(CHAT_TEMPLATES, ("one turn", "several turns", "without system")):
        source = CHAT_TEMPLATES[name].source
        context = {"messages": TALKS[talk], "tools": None, "add_generation_prompt": False}
        want = jinja2_renders(source, {**context, **tokenizer.special_tokens_map})
        assert want is not None
        batch = tokenizer.apply_chat_template(
            TALKS[talk], chat_template=source, return_dict=True, return_assistant_tokens_mask=True
        )
        # Every byte is a token here: the mask in bytes is the mask in tokens, but for special tokens.
        text, starts = tokenizer.native.spell(batch.input_ids)
        assert text.decode() == want[0], name
        ranges = [(len(want[0][:a].encode()), len(want[0][:b].encode())) for a, b in want[1]]
        mask = [int(any(a <= at < b for a, b in ranges)) for at in starts[:-1]]
        assert batch.assistant_masks == mask, f"{name}, {talk}"
        compared += 1
    assert compared == 3 * len(CHAT_TEMPLATES)


def test_templates_of_real_models(tokenizer: Tokenizer, shared_data: Path) -> None:
    files = sorted((shared_data / "chat-templates").glob("*.jinja"))
    assert len(files) == 17
    rendered = {file.name: list(compare(tokenizer, file.name, file.read_text(encoding="utf-8"))) for file in files}
    compared = sum(map(len, rendered.values()))
    print(f"{compared} of {17 * len(VARIANTS)} renders compared; both refuse the others, or Jinja2 fails over None")
    # A template that refuses everything would compare nothing.
    assert all(len(cases) >= 4 for cases in rendered.values()), {name: len(cases) for name, cases in rendered.items()}


def test_every_case_that_jinja2_agrees_on(tokenizer: Tokenizer, shared_data: Path) -> None:
    file = json.loads((shared_data / "chat-templates" / "chat_template_cases.json").read_text(encoding="utf-8"))
    agreed, variants = 0, 0
    for case in file["cases"]:
        special = {"bos_token": case.get("bos_token", ""), "eos_token": case.get("eos_token", "")}
        variants += len(list(compare(tokenizer, case["name"], case["template_str"], special)))
        if not case["jinja2_matches"]:
            continue
        messages = file["messages"]
        if case["system_merged_into_user"]:
            # What llama.cpp does for templates without a system role.
            system, user, *rest = messages
            messages = [{"role": "user", "content": f"{system['content']}\n{user['content']}"}, *rest]
        text, _ = tokenizer.native.render(
            messages, add_generation_prompt=True, variables=special, template=case["template_str"]
        )
        assert text == (case["expected_output_jinja"] or case["expected_output"]), case["name"]
        agreed += 1
    print(
        f"{agreed} of {len(file['cases'])} cases as llama.cpp has them, {variants} further renders as Jinja2 has them"
    )
    assert agreed == sum(bool(case["jinja2_matches"]) for case in file["cases"]) > 20
