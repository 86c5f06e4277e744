"""Exactly the answers and their end of turn are trained, whichever way they are found; the preview shows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_tokenizer import make_tokenizer

from rustune import ConfigError, DataError, Tokenizer, _native, get_chat_template, preview
from rustune.marking import parts_of

IGNORE = -100
MARKERS = {
    "llama-3.1": (
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "chatml": ("<|im_start|>user\n", "<|im_start|>assistant\n"),
    "phi-3": ("<|user|>\n", "<|assistant|>\n"),
    "gemma": ("<start_of_turn>user\n", "<start_of_turn>model\n"),
}
Labelled = list[tuple[list[int], list[int]]]


def read(tokenizer: Tokenizer, talks: list[Any], **options: Any) -> _native.Rows:
    return _native.Rows.read(tokenizer.native, json.dumps(options), [{"conversations": talks}])


def labelled(rows: _native.Rows) -> Labelled:
    return [(row["input_ids"], row["labels"]) for row in (rows[i] for i in range(len(rows)))]


def every_way(tokenizer: Tokenizer, name: str, talks: list[Any], reference: str) -> dict[str, Labelled]:
    """The labels by generation blocks, by markers found and given, and by the reference's own template."""
    get_chat_template(tokenizer, name)
    whole = read(tokenizer, talks)
    ways = {
        "blocks": read(tokenizer, talks, assistant_only_loss=True),
        "found markers": whole.train_on_responses_only(tokenizer.native, None, None)[0],
        "given markers": whole.train_on_responses_only(tokenizer.native, *MARKERS[name])[0],
    }
    tokenizer.chat_template = reference
    ways["reference's template"] = read(tokenizer, talks, assistant_only_loss=True)
    tokenizer.chat_template = reference.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    ways["template without blocks"] = read(tokenizer, talks, assistant_only_loss=True)
    return {way: labelled(rows) for way, rows in ways.items()}


@pytest.fixture(scope="module")
def reference(golden: Path) -> dict[str, Any]:
    file: dict[str, Any] = json.loads((golden / "masks.json").read_text(encoding="utf-8"))
    return file


@pytest.mark.parametrize("name", list(MARKERS))
def test_answers_and_their_end_of_turn(golden: Path, reference: dict[str, Any], name: str, tmp_path: Path) -> None:
    case = reference["templates"][name]
    folder = shutil.copytree(golden / "masks_tokenizer", tmp_path / "tokenizer")
    tokenizer = Tokenizer.from_pretrained(folder)
    want = []
    for row in case["rows"]:
        labels = [i if bit == "1" else IGNORE for i, bit in zip(row["input_ids"], row["mask"], strict=True)]
        assert any(label != IGNORE for label in labels)
        want.append((row["input_ids"], labels))
    ways = every_way(tokenizer, name, [row["conversations"] for row in case["rows"]], case["template"])
    for way, got in ways.items():
        for row, ours, theirs in zip(case["rows"], got, want, strict=True):
            assert ours == theirs, f"{way}: {row['conversations']}"


@pytest.mark.parametrize("name", list(MARKERS))
def test_real_conversations(shared_data: Path, reference: dict[str, Any], name: str, tmp_path: Path) -> None:
    case = reference["templates"][name]
    folder = shutil.copytree(shared_data / "tokenizers" / "gpt2", tmp_path / "gpt2")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}')
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": reference["special"], "bos_token": "<s>"})
    text = (shared_data / "instruct" / "llamafactory_glaive_toolcall_en_demo.json").read_text(encoding="utf-8")
    talks = [entry["conversations"] for entry in json.loads(text)]
    if name == "gemma":
        talks = [t for t in talks if [turn["from"] for turn in t] == ["human", "gpt"] * (len(t) // 2)]
    n_rows = len(case["shared_ids"])
    assert n_rows >= 100
    for way, got in every_way(tokenizer, name, talks[:n_rows], case["template"]).items():
        sums = [sum(i * at for at, i in enumerate(ids, 1)) for ids, _ in got]
        assert sums == case["shared_ids"], way
        masks = [sum(at for at, label in enumerate(labels, 1) if label != IGNORE) for _, labels in got]
        assert masks == case["shared_masks"], way


def test_the_preview_marks_what_is_trained(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "made", eos_token="</s>")
    get_chat_template(tokenizer, "chatml")
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<b>Ja</b>\n🙂"}]}] * 3
    shown = preview(rows, 2, tokenizer=tokenizer, assistant_only_loss=True)
    assert len(shown.rows) == 2
    head, answer = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<b>Ja</b>↵\n🙂<|im_end|>"
    assert str(shown).startswith(f"Row 0: 15 of 37 tokens trained\n{head}⟦{answer}⟧\n\n\nRow 1")
    assert shown.to_text(("<", ">")).count(f"<{answer}>") == 2
    page = shown._repr_html_()
    assert page.count("<mark") == 2 and "&lt;b&gt;Ja&lt;/b&gt;" in page and "<b>Ja" not in page
    # The first token is never a target.
    assert parts_of(tokenizer, [65, 66], [65, 66]) == [("A", False, 1), ("B", True, 1)]
    assert str(preview([{"input_ids": [65, 66], "labels": [IGNORE, 66]}], tokenizer=tokenizer)).endswith("A⟦B⟧")


def test_wrong_previews(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "made", eos_token="</s>")
    rows = [{"text": "abc"}]
    for n in (0, -1, True, "2"):
        with pytest.raises(ConfigError, match="n = "):
            preview(rows, n, tokenizer=tokenizer)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="tokenizer"):
        preview(rows)
    with pytest.raises(ConfigError, match="tokenizer"):
        preview([{"input_ids": [1, 2]}])
    with pytest.raises(ConfigError, match="assistant_only_loss"):
        preview(rows, tokenizer=tokenizer, assistant_only_los=True)
    with pytest.raises(DataError, match="labels"):
        parts_of(tokenizer, [1, 2], [1])
