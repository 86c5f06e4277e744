"""Text while it is generated: what is printed when, and what a loop in another thread gets."""

from __future__ import annotations

import queue
import threading
from typing import Any

import numpy as np
import pytest
import tiny

from rustune import ConfigError, FastLanguageModel, Model, TextIteratorStreamer, TextStreamer, Tokenizer

NEVER = {"eos_token_id": [263], "do_sample": False}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Tokenizer]:
    folder = tiny.write_model(tmp_path_factory.mktemp("llama"))
    return FastLanguageModel.from_pretrained(str(folder), 64, dtype="float32", load_in_4bit=False)


class Pieces(TextStreamer):
    """Keeps the pieces instead of printing them."""

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        self.pieces: list[str] = []
        self.ended = 0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self.ended += stream_end


def feed(streamer: TextStreamer, prompt: str, text: str) -> None:
    streamer.put(np.array([list(prompt.encode())]))
    for byte in text.encode():
        streamer.put(np.array([byte]))
    streamer.end()


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("one two three", ["one ", "two ", "three"]),
        ("one\ntwo", ["one\n", "two"]),
        ("caf\u00e9 noir", ["caf\u00e9 ", "noir"]),
        ("\u4f60\u597d", ["\u4f60", "\u597d", ""]),
        ("", [""]),
    ],
)
def test_words_appear_when_they_are_complete(loaded: tuple[Model, Tokenizer], text: str, pieces: list[str]) -> None:
    streamer = Pieces(loaded[1], skip_prompt=True)
    feed(streamer, "a prompt", text)
    assert streamer.pieces == pieces and streamer.ended == 1
    # And again: a streamer serves one text after the other.
    feed(streamer, "a prompt", text)
    assert streamer.pieces == pieces * 2


def test_the_prompt_is_shown_unless_it_is_skipped(
    loaded: tuple[Model, Tokenizer], capsys: pytest.CaptureFixture[str]
) -> None:
    feed(TextStreamer(loaded[1]), "a prompt ", "and more")
    assert capsys.readouterr().out == "a prompt and more\n"
    feed(TextStreamer(loaded[1], skip_prompt=True), "a prompt ", "and more")
    assert capsys.readouterr().out == "and more\n"


def test_special_tokens_are_left_out_when_asked(loaded: tuple[Model, Tokenizer]) -> None:
    for skip, pieces in ((True, ["x"]), (False, ["x<|end|>"])):
        streamer = Pieces(loaded[1], skip_prompt=True, skip_special_tokens=skip)
        streamer.put([1])
        streamer.put([ord("x")])
        streamer.put([tiny.EOS])
        streamer.end()
        assert "".join(streamer.pieces) == "".join(pieces)


def test_two_sequences_are_refused(loaded: tuple[Model, Tokenizer]) -> None:
    with pytest.raises(ConfigError, match="expected one sequence, got 2"):
        TextStreamer(loaded[1]).put(np.ones((2, 3), int))


def test_a_loop_gets_what_another_thread_generates(loaded: tuple[Model, Tokenizer]) -> None:
    model, tokenizer = loaded
    prompt = tokenizer("go on: ", return_tensors="pt").to("cuda")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60.0)
    options = {**prompt, "streamer": streamer, "max_new_tokens": 12, **NEVER}
    thread = threading.Thread(target=model.generate, kwargs=options)
    thread.start()
    pieces = list(streamer)
    thread.join()
    out = model.generate(**prompt, max_new_tokens=12, **NEVER)
    assert "".join(pieces) == tokenizer.decode(out[0, prompt.shape[1] :])


def test_a_generation_that_fails_ends_the_loop(loaded: tuple[Model, Tokenizer]) -> None:
    model, tokenizer = loaded
    streamer = TextIteratorStreamer(tokenizer, timeout=60.0)
    failed: list[BaseException] = []

    def generate() -> None:
        try:
            model.generate([[999]], streamer=streamer)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    list(streamer)
    thread.join()
    assert "999" in str(failed[0])


def test_waiting_ends_after_the_timeout(loaded: tuple[Model, Tokenizer]) -> None:
    with pytest.raises(queue.Empty):
        next(TextIteratorStreamer(loaded[1], timeout=0.01))
