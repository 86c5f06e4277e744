"""The small world: the same on every machine, an exam disjoint from training, a true tokenizer, a PNG of the loss."""

from __future__ import annotations

import itertools
import json
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rustune import FastLanguageModel
from rustune.quickstart import instruct, plot, run, tokenizer, world

TOKENS = tokenizer.vocabulary()
IDS = {token: place for place, token in enumerate(TOKENS)}


def test_the_world_is_the_same_everywhere() -> None:
    told = "\n".join(itertools.islice(world.documents(world.make_world(), 1), 2000))
    # If this changes, the shipped model no longer knows the world it is asked about: train it anew.
    assert zlib.crc32(told.encode()) == 0x7FEE194F


def test_everyone_has_every_fact_and_no_one_is_their_own_friend() -> None:
    made = world.make_world()
    assert len(set(made.people)) == len(made.people) == 160
    for name in made.people:
        assert set(made.facts[name]) == set(world.RELATIONS)
        assert made.facts[name]["friend"] != name


def test_the_exam_is_disjoint_from_training_and_cannot_be_guessed() -> None:
    made = world.make_world()
    exam = instruct.held_out_set(made, 300)
    training = instruct.training_set(made, 2400)
    assert len(exam) == 300 and len(training) == 2400
    assert len({example.question for example in exam}) == 300
    assert not {example.subject for example in exam} & {example.subject for example in training}
    answers = Counter(example.answer for example in exam)
    assert len(answers) >= 50
    assert answers.most_common(1)[0][1] <= 0.1 * len(exam)


@pytest.mark.parametrize("seed", [1, 2])
def test_right_answers_are_right(seed: int) -> None:
    made = world.make_world()
    for example in instruct.training_set(made, 1000, seed):
        if example.kind in ("plus", "minus"):
            a, b = map(int, example.subject.split())
            assert int(example.answer) == (a + b if example.kind == "plus" else a - b)
        elif example.kind in world.RELATIONS:
            assert made.facts[example.subject][example.kind] == example.answer
        elif example.kind == "spell":
            assert example.answer.replace("-", "") == example.subject
        else:
            assert sorted(example.answer.lower().split()) == sorted(example.subject.split())


def test_every_word_of_the_world_is_one_token() -> None:
    assert len(set(TOKENS)) == len(TOKENS) and len(TOKENS) % 64 == 0
    made = world.make_world()
    for example in instruct.training_set(made, 500):
        for text in (example.question, example.answer):
            known = tokenizer.encode(text, IDS)
            assert "".join(TOKENS[i] for i in known).replace("\u2581", " ").strip() == text
    assert len(tokenizer.encode("Mara lives in Oakham.", IDS)) == 5


def test_the_shipped_tokenizer_is_the_one_described_here() -> None:
    assert json.loads((run.MODEL / "tokenizer.json").read_text("utf-8")) == tokenizer.tokenizer_json(TOKENS)
    assert json.loads((run.MODEL / "tokenizer_config.json").read_text("utf-8")) == tokenizer.tokenizer_config()


def test_the_shipped_model_is_small_and_has_its_papers() -> None:
    files = {file.name: file.stat().st_size for file in run.MODEL.iterdir()}
    assert set(files) == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "LICENSE",
        "README.md",
    }
    assert sum(files.values()) <= 4_000_000


def test_the_shipped_model_knows_the_world_but_cannot_answer() -> None:
    model, words = FastLanguageModel.from_pretrained(str(run.MODEL), max_seq_length=128, load_in_4bit=True)
    made = world.make_world()
    people = made.people[::4]
    prompts = words([f"{name} lives in" for name in people], padding=True, return_tensors="np")
    outputs = model.generate(**prompts, max_new_tokens=1, do_sample=False)
    told = [words.decode(row[-1:]).strip() for row in outputs]
    known = sum(town == made.facts[name]["town"] for town, name in zip(told, people, strict=True))
    assert known >= 0.9 * len(people), told

    exam = instruct.held_out_set(made, 50)
    score, _ = run.examine(model, words, exam)
    assert score <= 0.1


def test_the_picture_is_a_png_of_the_size_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "loss.png"
    plot.loss_curve(file, [3.0, 2.0, float("nan"), 1.0], validation=[(2, 1.5)], title="A loss", width=400, height=250)
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (400, 250)
    size = struct.unpack(">I", data[33:37])[0]
    assert data[37:41] == b"IDAT"
    pixels = np.frombuffer(zlib.decompress(data[41 : 41 + size]), np.uint8).reshape(250, 1 + 3 * 400)
    assert (pixels[:, 0] == 0).all()
    colours = np.unique(pixels[:, 1:].reshape(-1, 3), axis=0)
    assert len(colours) > 20, "an empty picture"


@pytest.mark.parametrize("losses", [[], [float("nan")]])
def test_a_picture_of_nothing_is_an_error(tmp_path: Path, losses: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one finite number"):
        plot.loss_curve(tmp_path / "loss.png", losses)
