"""The tokenizer users hold: calling, padding, chat templates, files, pickles and forks."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rustune import ConfigError, DataError, Tokenizer, TokenizerError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes 🙂"}]


def write_tokenizer(folder: Path, **config: Any) -> Path:
    """Writes a byte-level vocabulary without merges: every byte is a token, and five special ones follow."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = (byte for byte in range(256) if byte not in printable)
    shown = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [257], "tokens": ["<s>"]}},
    }
    model = {"type": "BPE", "vocab": {shown[byte]: byte for byte in range(256)}, "merges": []}
    file = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256 + i, "content": token, **flags} for i, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": {"type": "Sequence", "processors": [level, template]},
        "decoder": level,
        "model": model,
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def make_tokenizer(folder: Path, **config: Any) -> Tokenizer:
    """Opens such a tokenizer."""
    chat = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    tokenizer = Tokenizer.from_folder(write_tokenizer(folder, **{**chat, **config}))
    assert tokenizer is not None
    return tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return make_tokenizer(tmp_path / "made")


def test_one_text_gives_lists_and_several_give_rows(tokenizer: Tokenizer) -> None:
    assert tokenizer("ab") == {"input_ids": [257, 97, 98], "attention_mask": [1, 1, 1]}
    assert tokenizer(["a", "bc"], add_special_tokens=False)["input_ids"] == [[97], [98, 99]]
    assert tokenizer(text="a", return_length=True).length == 2


def test_padding_fills_the_side_asked_for(tokenizer: Tokenizer) -> None:
    right = tokenizer(["a", "bcd"], padding=True, return_tensors="np", add_special_tokens=False)
    pad = tokenizer.pad_token_id
    assert right.input_ids.tolist() == [[97, pad, pad], [98, 99, 100]]
    assert right["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    tokenizer.padding_side = "left"
    left = tokenizer(["a", "bcd"], padding="max_length", max_length=4, return_tensors="pt", add_special_tokens=False)
    assert left.input_ids.tolist() == [[pad, pad, pad, 97], [pad, 98, 99, 100]]
    assert left.shape == (2, 4)
    assert left.to("cuda").input_ids.to("cuda").cpu().numpy().dtype == np.int64
    even = tokenizer(["a"], padding=True, pad_to_multiple_of=4)
    assert len(even.input_ids[0]) == 4
    with pytest.raises(DataError, match="padding=True"):
        tokenizer(["a", "bcd"], return_tensors="np")
    with pytest.raises(ConfigError, match="padding_side"):
        tokenizer.padding_side = "top"


def test_truncation_asks_for_a_limit(tokenizer: Tokenizer) -> None:
    assert tokenizer("abcd", truncation=True, max_length=3).input_ids == [257, 97, 98]
    assert len(tokenizer("abcd", max_length=3).input_ids) == 5
    tokenizer.model_max_length = 2
    assert len(tokenizer("abcd", truncation=True).input_ids) == 2


def test_what_is_no_text_is_refused(tokenizer: Tokenizer) -> None:
    for wrong in (None, b"x", [1, 2], ["a", None]):
        with pytest.raises(DataError):
            tokenizer(wrong)  # type: ignore[arg-type]


def test_decode_takes_whatever_holds_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Grüße 🙂", return_tensors="np")
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "Grüße 🙂"
    assert tokenizer.decode(97) == "a"
    assert tokenizer.decode([-100, 97, np.int64(98)]) == "ab"
    assert tokenizer.batch_decode(ids) == ["<s>Grüße 🙂"]
    assert tokenizer.convert_tokens_to_ids("<s>") == 257
    assert tokenizer.convert_tokens_to_ids(["a", "<s>"]) == [97, 257]
    assert tokenizer.convert_ids_to_tokens([97, 257], skip_special_tokens=True) == ["a"]
    assert tokenizer.tokenize("a b") == ["a", "Ġ", "b"]
    assert "<s>" in tokenizer and len(tokenizer) == len(tokenizer.get_vocab()) == 261


def test_the_chat_template_gives_text_ids_or_a_dict(tokenizer: Tokenizer) -> None:
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes 🙂<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, return_tensors="pt").to("cuda")
    assert prompt.shape == (1, len(prompt[0]))
    assert tokenizer.decode(prompt[0]).endswith("<|im_start|>assistant\n")
    batch = tokenizer.apply_chat_template(
        [TALK, TALK[:1]], padding=True, return_dict=True, return_tensors="np", return_assistant_tokens_mask=True
    )
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.assistant_masks.shape
    trained = batch.input_ids[0][batch.assistant_masks[0] == 1]
    assert tokenizer.decode(trained) == "Yes 🙂<|im_end|>"
    assert batch.assistant_masks[1].sum() == 0
    open_end = tokenizer.apply_chat_template(TALK, tokenize=False, continue_final_message=True)
    assert open_end.endswith("Yes 🙂")
    other = tokenizer.apply_chat_template(
        TALK, chat_template="{{ messages | length }}{{ extra }}", tokenize=False, extra="!"
    )
    assert other == "2!"


def test_a_template_may_refuse_or_be_missing(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="only users"):
        tokenizer.apply_chat_template(TALK, chat_template="{{ raise_exception('only users') }}")
    with pytest.raises(TokenizerError, match="line 1"):
        tokenizer.chat_template = "{% if %}"
    assert tokenizer.chat_template == CHATML
    tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match="get_chat_template"):
        tokenizer.apply_chat_template(TALK)


def test_pad_is_never_eos(tokenizer: Tokenizer) -> None:
    assert tokenizer.pad_token == "<unk>"
    with pytest.warns(UserWarning, match="must not be the eos token"):
        tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token == "<unk>"
    assert tokenizer.add_special_tokens({"pad_token": "<|pad|>", "additional_special_tokens": ["<|x|>"]}) == 2
    assert tokenizer.pad_token_id == 261 and tokenizer.all_special_tokens[-1] == "<|x|>"
    assert tokenizer.add_tokens(["new", "<|x|>"]) == 1
    with pytest.raises(ConfigError, match="fad_token"):
        tokenizer.add_special_tokens({"fad_token": "x"})


def test_saving_keeps_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.padding_side = "left"
    tokenizer.add_tokens("zzz")
    files = tokenizer.save_pretrained(tmp_path / "saved")
    assert {Path(file).name for file in files} >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    again = Tokenizer.from_pretrained(tmp_path / "saved")
    assert again("zzz <s>") == tokenizer("zzz <s>")
    assert (again.padding_side, again.chat_template, again.eos_token) == ("left", CHATML, "<|im_end|>")
    assert Tokenizer.from_folder(tmp_path) is None
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_folder(tmp_path / "nothing")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_pickles_are_equal_for_equal_tokenizers(tmp_path: Path) -> None:
    first, second = (make_tokenizer(tmp_path / "same") for _ in range(2))
    assert pickle.dumps(first) == pickle.dumps(second)
    again = pickle.loads(pickle.dumps(first))
    assert again == first and hash(again) == hash(first) and again("a") == first("a")
    second.add_tokens("zzz")
    assert second != first


def _encode_many(tokenizer: Tokenizer) -> int:
    return sum(len(row) for row in tokenizer(["some text"] * 200).input_ids)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_hang(tokenizer: Tokenizer) -> None:
    here = _encode_many(tokenizer)  # the parent's threads are running now
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_encode_many, (tokenizer,)).get(timeout=60) == here


def test_agrees_with_the_tokenizers_library(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer.save_pretrained(tmp_path / "saved")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    for text in ("Hi", "  Grüße\n\n🙂<|im_end|> x", ""):
        assert theirs.encode(text).ids == tokenizer(text).input_ids
