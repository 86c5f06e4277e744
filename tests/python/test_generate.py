"""Generation: greedy, sampled, in batches, streamed, and where it stops."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny

from rustune import ConfigError, FastLanguageModel, Model, RustuneError
from rustune.stopping import StoppingCriteria, StoppingCriteriaList

PROMPT = [5, 9, 200, 31]
# An id the model never prefers, so that nothing ends early.
NEVER = {"eos_token_id": [263], "do_sample": False}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any]:
    folder = tiny.write_model(tmp_path_factory.mktemp("llama"))
    return FastLanguageModel.from_pretrained(str(folder), 64, dtype="float32", load_in_4bit=False)


@pytest.fixture(scope="module")
def model(loaded: tuple[Model, Any]) -> Model:
    return loaded[0]


def test_greedy_takes_the_likeliest_token_each_time(model: Model) -> None:
    ids = list(PROMPT)
    for _ in range(8):
        ids.append(int(model([ids]).logits[0, -1].argmax()))
    out = model.generate([PROMPT], max_new_tokens=8, **NEVER)
    assert out.dtype == np.int64 and out.tolist() == [ids]
    assert model.generate(PROMPT, max_new_tokens=8, use_cache=True, **NEVER).tolist() == [ids]
    assert model.generate(inputs=[PROMPT], max_length=12, **NEVER).tolist() == [ids]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_what_each_prompt_gives(model: Model, side: str) -> None:
    prompts = [PROMPT, PROMPT[:2], [77, 78, 79]]
    alone = [model.generate([prompt], max_new_tokens=6, **NEVER)[0, len(prompt) :].tolist() for prompt in prompts]
    pads = [[tiny.PAD] * (4 - len(prompt)) for prompt in prompts]
    rows = [(a + b) if side == "left" else (b + a) for a, b in zip(pads, prompts, strict=True)]
    mask = [[int(id_ != tiny.PAD) for id_ in row] for row in rows]
    out = model.generate(np.array(rows), attention_mask=np.array(mask), max_new_tokens=6, **NEVER)
    assert out[:, :4].tolist() == rows
    assert out[:, 4:].tolist() == alone
    assert model.generate(rows, max_new_tokens=6, **NEVER).tolist() == out.tolist()


def test_generation_ends_at_eos_and_is_filled_up(model: Model) -> None:
    free = model.generate([PROMPT, PROMPT[:2]], max_new_tokens=8, **NEVER)[:, 4:]
    eos = int(free[0][2])
    first = free[0].tolist().index(eos)
    if eos in free[1]:
        pytest.fail("the two prompts must differ; choose another seed for the model")
    out = model.generate([PROMPT, PROMPT[:2]], max_new_tokens=8, do_sample=False, eos_token_id=eos)[:, 4:]
    assert out[0].tolist() == [*free[0][: first + 1].tolist(), *[tiny.PAD] * (7 - first)]
    assert out[1].tolist() == free[1].tolist()


class Streamer:
    """What TextStreamer's interface is, and nothing of it."""

    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = False

    def put(self, value: Any) -> None:
        assert not self.ended
        self.got.append(np.ravel(value).tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_prompt_and_every_token(model: Model) -> None:
    streamer = Streamer()
    out = model.generate([PROMPT], max_new_tokens=5, streamer=streamer, **NEVER)
    assert streamer.ended and streamer.got[0] == PROMPT
    assert [id_ for ids in streamer.got[1:] for id_ in ids] == out[0, 4:].tolist()
    assert len(streamer.got) == 6
    with pytest.raises(ConfigError, match="streamer"):
        model.generate([PROMPT, PROMPT], streamer=Streamer())


def test_what_a_streamer_raises_comes_out(model: Model) -> None:
    class Broken(Streamer):
        def put(self, value: Any) -> None:
            if self.got:
                raise ZeroDivisionError("mine")
            super().put(value)

    with pytest.raises(ZeroDivisionError, match="mine"):
        model.generate([PROMPT], max_new_tokens=5, streamer=Broken(), **NEVER)
    assert model.generate([PROMPT], max_new_tokens=2, **NEVER).shape == (1, 6)


def test_stop_strings_end_a_text(loaded: tuple[Model, Any]) -> None:
    model, tokenizer = loaded
    free = model.generate([PROMPT], max_new_tokens=12, **NEVER)[0, 4:].tolist()
    # The first new byte that is plain text, whatever this random model happens to say.
    at = next(i for i, id_ in enumerate(free) if 33 <= id_ < 127)
    stop = chr(free[at])
    at = free.index(free[at])
    out = model.generate([PROMPT], max_new_tokens=12, stop_strings=[stop], tokenizer=tokenizer, **NEVER)[0, 4:].tolist()
    assert out == free[: at + 1]
    assert model.generate([PROMPT], max_new_tokens=12, stop_strings=stop, **NEVER)[0, 4:].tolist() == out


def test_sampling_follows_the_seed(model: Model) -> None:
    def draw(**settings: Any) -> list[list[int]]:
        out: list[list[int]] = model.generate([PROMPT], max_new_tokens=10, temperature=1.5, **settings).tolist()
        return out

    assert draw(seed=1, do_sample=True) == draw(seed=1, do_sample=True)
    assert len({str(draw(seed=seed, do_sample=True)) for seed in range(5)}) > 1
    assert draw(seed=1, do_sample=True, top_k=1) == draw(**NEVER) or tiny.EOS in draw(seed=1, top_k=1)[0]
    many = draw(seed=1, do_sample=True, num_return_sequences=4)
    assert len(many) == 4 and len({str(row) for row in many}) > 1 and all(row[:4] == PROMPT for row in many)


def test_a_generation_config_is_read_and_arguments_win(model: Model) -> None:
    expected = model.generate([PROMPT], max_new_tokens=3, **NEVER).tolist()
    config = SimpleNamespace(max_new_tokens=9, do_sample=False, eos_token_id=263, something_else=1, max_length=20)
    assert model.generate([PROMPT], generation_config=config, max_new_tokens=3).tolist() == expected
    assert model.generate([PROMPT], generation_config=config).shape == (1, 13)


class EndsWith(StoppingCriteria):
    """Ends rows at one of some ids; remembers what it was asked."""

    def __init__(self, *ids: int) -> None:
        self.ids = ids
        self.asked: list[list[list[int]]] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        assert scores is None and isinstance(input_ids, np.ndarray)
        self.asked.append(input_ids.tolist())
        return np.isin(input_ids[:, -1], self.ids)


def test_stopping_criteria_end_the_rows_they_name(model: Model) -> None:
    # A prompt after which this random model does not say the same again and again.
    prompts = [[1, 2, 3, 4], [1, 2]]
    free = model.generate(prompts, max_new_tokens=8, **NEVER).tolist()
    stop = free[0][6]
    assert stop not in free[1] and stop not in free[0][4:6], "choose another prompt"
    criterion = EndsWith(stop)
    out = model.generate(prompts, max_new_tokens=8, stopping_criteria=[criterion], **NEVER).tolist()
    assert out == [free[0][:7] + [tiny.PAD] * 5, free[1]]
    assert [len(rows[0]) for rows in criterion.asked] == list(range(5, 13)) and criterion.asked[-1] == out
    # One answer for all rows, as older criteria give it, and several criteria.
    every = StoppingCriteriaList([EndsWith(), lambda ids, scores: ids.shape[1] >= 6])
    assert model.generate(prompts, stopping_criteria=every, **NEVER).tolist() == [r[:6] for r in free]
    assert model.generate(prompts[:1], stopping_criteria=lambda ids, scores: True, **NEVER).tolist() == [free[0][:5]]
    assert model.generate(prompts[:1], stopping_criteria=[], max_new_tokens=8, **NEVER).tolist() == [free[0]]
    # A row that is over stays so, whatever is said of it later.
    once = iter([[True, False], [False, False], [False, True]])
    out = model.generate(prompts, stopping_criteria=lambda ids, scores: next(once), **NEVER).tolist()
    assert out == [free[0][:5] + [tiny.PAD] * 2, free[1][:7]]


def test_criteria_are_asked_for_each_returned_sequence_and_after_the_streamer(model: Model) -> None:
    sampled = {"do_sample": True, "seed": 1, "eos_token_id": [263]}
    out = model.generate([PROMPT], num_return_sequences=3, stopping_criteria=EndsWith(), max_new_tokens=3, **sampled)
    assert out.tolist() == model.generate([PROMPT], num_return_sequences=3, max_new_tokens=3, **sampled).tolist()
    streamer, seen = Streamer(), []
    stop = StoppingCriteriaList([lambda ids, scores: seen.append(len(streamer.got)) or len(seen) == 2])
    model.generate([PROMPT], streamer=streamer, stopping_criteria=stop, **NEVER)
    assert streamer.ended and seen == [2, 3]


def test_what_is_banned_does_not_come(model: Model) -> None:
    prompt = [5, 9, 200, 31]
    free = model.generate([prompt], max_new_tokens=8, **NEVER)[0, 4:].tolist()
    assert free[:3] == [free[0]] * 3, "choose another prompt"
    once = model.generate([prompt], max_new_tokens=8, no_repeat_ngram_size=1, **NEVER)[0].tolist()
    assert len(set(once)) == len(once)
    assert free[0] not in model.generate([prompt], max_new_tokens=8, bad_words_ids=[[free[0]]], **NEVER)[0]
    assert free[0] not in model.generate([prompt], max_new_tokens=8, suppress_tokens=[free[0]], **NEVER)[0]
    assert model.generate([prompt], max_new_tokens=2, begin_suppress_tokens=[free[0]], **NEVER)[0, 4] != free[0]
    ends = {"eos_token_id": free[0], "do_sample": False, "max_new_tokens": 8}
    assert model.generate([prompt], **ends).shape == (1, 5)
    assert free[0] not in model.generate([prompt], min_new_tokens=3, **ends)[0, 4:7]
    assert free[0] not in model.generate([prompt], min_length=7, **ends)[0, 4:7]


def test_max_time_ends_a_generation(model: Model) -> None:
    # No time at all: every row has its first token.
    assert model.generate([PROMPT, PROMPT], max_time=-1.0, max_new_tokens=50, **NEVER).shape == (2, 5)
    assert model.generate([PROMPT], max_time=3600, max_new_tokens=5, **NEVER).shape == (1, 9)


@pytest.mark.parametrize(
    ("criteria", "message"),
    [
        ("stop", "stopping_criteria = 'stop': expected functions"),
        ([3], "stopping_criteria = 3: expected functions"),
        (7, "stopping_criteria = 7: expected functions"),
        (lambda ids, scores: "yes", "returned 'yes': expected True or False, or one for each of 1 rows"),
        (lambda ids, scores: [True, False], "one for each of 1 rows"),
        (lambda ids, scores: None, "returned None"),
    ],
)
def test_criteria_that_cannot_be_are_named(model: Model, criteria: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model.generate([PROMPT], max_new_tokens=2, stopping_criteria=criteria, **NEVER)
    with pytest.raises(NotImplementedError, match="__call__"):
        model.generate([PROMPT], max_new_tokens=2, stopping_criteria=StoppingCriteria(), **NEVER)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_token": 3}, "max_new_tokens"),
        ({"num_beams": 4}, "num_beams"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"top_p": 1.5}, "top_p"),
        ({"bad_words_ids": [3]}, r"bad_words_ids = \[3\]: expected a list of lists of ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"suppress_tokens": [-1]}, "suppress_tokens"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size = -1"),
        ({"max_length": 3}, "max_length"),
        ({"num_return_sequences": 2, "do_sample": False}, "num_return_sequences"),
    ],
)
def test_settings_that_cannot_be_are_named(model: Model, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model.generate([PROMPT], **settings)


def test_prompts_that_cannot_be_are_named(model: Model) -> None:
    with pytest.raises(RustuneError, match="row 1"):
        model.generate([PROMPT, [tiny.PAD] * 4], **NEVER)
    with pytest.raises(RustuneError, match="999"):
        model.generate([[999]], **NEVER)


def test_the_chat_template_ends_a_turn(loaded: tuple[Model, Any]) -> None:
    model, tokenizer = loaded
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=True, add_generation_prompt=True, return_tensors="np"
    )
    ids = prompt["input_ids"] if hasattr(prompt, "keys") else prompt
    assert np.ravel(ids).tolist() == [tiny.BOS, tiny.USER, *b"hi", tiny.EOS, tiny.ASSISTANT]
    assert model.generate(prompt, max_new_tokens=2, **NEVER).shape == (1, 8)


def test_ctrl_c_stops_a_generation_and_the_model_stays_usable(model: Model) -> None:
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        # Would take minutes: every token attends to all before it.
        model.generate([[1, 2, 3]], max_new_tokens=50_000, do_sample=False, eos_token_id=tiny.VOCAB - 1)
    timer.join()
    assert model.generate([[1, 2, 3]], max_new_tokens=2, do_sample=False).shape[1] >= 4


def test_a_head_in_8_bits_serves_generation_alone(model: Model) -> None:
    exact = np.array(model([PROMPT]).logits)
    assert FastLanguageModel.for_inference(model, lm_head_bits=8) is model
    try:
        assert np.array_equal(model([PROMPT]).logits, exact)
        assert model.generate([PROMPT], max_new_tokens=8, **NEVER).shape == (1, 12)
    finally:
        FastLanguageModel.for_training(model)
    for bits in (4, True, 8.5):
        with pytest.raises(ConfigError, match="lm_head_bits"):
            FastLanguageModel.for_inference(model, lm_head_bits=bits)  # type: ignore[arg-type]


def test_activations_in_8_bits_serve_generation_alone(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path)
    model, _ = FastLanguageModel.from_pretrained(str(folder), 64, dtype="float32", load_in_4bit=True)
    exact = np.array(model([PROMPT]).logits)
    assert FastLanguageModel.for_inference(model, activation_bits=8) is model
    assert np.array_equal(model([PROMPT]).logits, exact)
    assert model.generate([PROMPT] * 3, max_new_tokens=8, **NEVER).shape == (3, 12)
    FastLanguageModel.for_inference(model, lm_head_bits=8, activation_bits=8)
    assert model.generate([PROMPT], max_new_tokens=8, **NEVER).shape == (1, 12)
    floats = FastLanguageModel.for_inference(model, activation_bits=32).generate([PROMPT], max_new_tokens=8, **NEVER)
    for bits in (16, None):
        FastLanguageModel.for_inference(model, activation_bits=bits)
        assert model.generate([PROMPT], max_new_tokens=8, **NEVER).shape == (1, 12)
    # Loaded in float32, so that nothing is rounded unless it is asked for.
    assert np.array_equal(model.generate([PROMPT], max_new_tokens=8, **NEVER), floats)
    FastLanguageModel.for_training(model)
    assert np.array_equal(model([PROMPT]).logits, exact)
    for bits in (4, True, 8.5):
        with pytest.raises(ConfigError, match="activation_bits"):
            FastLanguageModel.for_inference(model, activation_bits=bits)  # type: ignore[arg-type]


def test_activations_in_8_bits_need_a_layer_that_takes_them(model: Model) -> None:
    with pytest.raises(ConfigError, match="activation_bits = 8: expected None: no layer is in 4 or 8 bits"):
        FastLanguageModel.for_inference(model, activation_bits=8)
    assert model.generate([PROMPT], max_new_tokens=2, **NEVER).shape == (1, 6)
