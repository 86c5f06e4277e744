"""What is said before a run: amounts, memory, and the sample with its trained tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny

from rustune import FastLanguageModel, SFTConfig, SFTTrainer, banner, train_on_responses_only


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("llama"))


def trainer(folder: Path, out: Path, rows: list[dict[str, Any]], **settings: Any) -> SFTTrainer:
    model, tokenizer = FastLanguageModel.from_pretrained(folder, 128)
    model = FastLanguageModel.get_peft_model(model, r=4)
    args = SFTConfig(output_dir=str(out), max_steps=2, save_strategy="no", **settings)
    return SFTTrainer(model, args, tokenizer=tokenizer, train_dataset=rows)


def talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_the_sample_marks_what_is_trained(folder: Path, tmp_path: Path) -> None:
    made = trainer(folder, tmp_path, [talk("Is 1 < 2?", "Yes, é.")] * 3)
    train_on_responses_only(made)
    assert banner.sample_pieces(made) == [
        ("<|begin|><|user|>Is 1 < 2?<|end|><|assistant|>", False),
        ("Yes, é.<|end|>", True),
    ]
    text, page = banner.texts(made, made.args.plan(3))
    assert "    <|begin|><|user|>Is 1 < 2?<|end|><|assistant|>«Yes, é.<|end|>»" in text.split("\n")
    assert "Is 1 &lt; 2?" in page and re.search(r"<span style='[^']*'>Yes, é\.&lt;\|end\|&gt;</span>", page)
    assert "3: " in text and "2, 2 epochs: batch 4 x 2 accumulation = 8 rows a step" in text


def test_a_long_sample_is_shortened(folder: Path, tmp_path: Path) -> None:
    made = trainer(folder, tmp_path, [{"prompt": "a" * 80, "completion": "b" * 20}])
    (prompt, _), (completion, _) = banner.sample_pieces(made)
    assert prompt.endswith("a" * 80) and completion == "b" * 20 + "<|end|>"
    assert banner._shortened("a" * 200 + "b" * 200, 300) == "a" * 150 + " … " + "b" * 150
    many = [message for _ in range(30) for message in talk("q", "a")["messages"]]
    made = trainer(folder, tmp_path, [{"messages": many[:28]}], max_length=128)
    train_on_responses_only(made)
    pieces = banner.sample_pieces(made)
    assert len(pieces) == 21 and pieces[-1] == (" … ", False)


def test_without_a_tokenizer_there_is_no_sample(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "llama", tokenizer=False)
    with pytest.warns(UserWarning, match="no tokenizer files"):
        made = trainer(folder, tmp_path, tiny.rows())
    text, page = banner.texts(made, made.args.plan(24))
    assert "sample" not in text + page and "24: 288 tokens, 264 of them trained on" in text


@pytest.mark.parametrize(
    ("available", "fits", "said"),
    [
        (2**33, True, "about 2.0 GiB at most, 8.0 GiB are free"),
        (2**27, False, "about 2.0 GiB at most, 128 MiB are free: NOT ENOUGH; take smaller batches or shorter rows"),
        (None, None, "about 2.0 GiB at most"),
    ],
)
def test_the_memory_is_compared(available: int | None, fits: bool | None, said: str) -> None:
    parts = {"model": 2**30, "optimizer": 2**20, "gradients": 2**20, "kept": 2**29, "workspace": 2**29}
    forecast = {
        "estimate": {**parts, "layers": [3, 1, 12], "n_tokens": 1024},
        "peak": 2**31,
        "available": available,
        "fits": fits,
    }
    assert banner.memory_lines(forecast) == [
        ("memory", said),
        ("", "model 1.0 GiB, optimizer and gradients 2 MiB, activations 1.0 GiB for 1,024 tokens"),
        ("", "3 of 16 layers kept for the backward, 1 in part, 12 recomputed"),
    ]
