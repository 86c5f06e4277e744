"""Pictures of runs and of data: what is drawn, from which sources, and what cannot be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from rustune import ConfigError, DataError, FastLanguageModel, SFTConfig, SFTTrainer, plots

HISTORY = [
    {"step": 1, "loss": 3.0},
    {"step": 2, "loss": 2.0},
    {"step": 2, "eval_loss": 2.5},
    {"step": 3, "loss": 1.0},
    {"step": 3, "train_loss": 2.0, "train_runtime": 1.0},
]


def curves(figure: Any) -> dict[str, list[tuple[float, float]]]:
    (axes,) = figure.axes
    return {line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.get_lines()}


def test_the_losses_of_a_history_are_drawn() -> None:
    pytest.importorskip("matplotlib")
    figure = plots.loss_curves(HISTORY)
    assert curves(figure) == {"training": [(1, 3.0), (2, 2.0), (3, 1.0)], "validation": [(2, 2.5)]}
    # What a notebook shows.
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, step in (("checkpoint-9", 9), ("checkpoint-10", 10), ("checkpoint-11-half", 11)):
        (tmp_path / "run" / name).mkdir(parents=True)
        state = {"log_history": [{"step": step, "loss": 1.0}]}
        (tmp_path / "run" / name / "trainer_state.json").write_text(json.dumps(state))
    shown = curves(plots.loss_curves(HISTORY, tmp_path / "run", labels=["a", "b"]))
    assert shown["a: training"][0] == (1, 3.0) and shown["b: training"] == [(10, 1.0)]
    assert "run: training" in curves(plots.loss_curves(HISTORY, str(tmp_path / "run")))
    file = tmp_path / "run" / "checkpoint-9" / "trainer_state.json"
    assert curves(plots.loss_curves({"c": file, "d": HISTORY}))["c: training"] == [(9, 1.0)]


def test_a_run_that_was_resumed_is_one_curve() -> None:
    again = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 2, "loss": 3.5}, {"step": 3, "loss": 3.0}]
    pytest.importorskip("matplotlib")
    assert curves(plots.loss_curves(again))["training"] == [(1, 5.0), (2, 3.5), (3, 3.0)]


def test_each_of_several_evaluation_datasets_has_its_line() -> None:
    history = [
        {"step": 1, "loss": 3.0},
        {"step": 1, "eval_short_loss": 2.5, "eval_long_loss": 2.0, "eval_short_runtime": 9.0},
        {"step": 2, "eval_long_loss": 1.0, "eval_short_loss": 1.5},
    ]
    pytest.importorskip("matplotlib")
    shown = curves(plots.loss_curves(history))
    assert shown == {"training": [(1, 3.0)], "short": [(1, 2.5), (2, 1.5)], "long": [(1, 2.0), (2, 1.0)]}
    # Beside a loss of evaluation, what else is called a loss is some other metric.
    assert set(curves(plots.loss_curves([*history, {"step": 2, "eval_loss": 1.0}]))) == {"training", "validation"}


def test_the_running_mean_stays_within_the_losses() -> None:
    pytest.importorskip("matplotlib")
    history = [{"step": step, "loss": float(step % 2)} for step in range(1, 41)]
    figure = plots.loss_curves(history)
    raw, mean = figure.axes[0].get_lines()
    assert mean.get_label() == "training" and raw.get_alpha() == 0.3
    assert list(mean.get_xdata()) == list(range(1, 41)) and 0.4 <= mean.get_ydata()[20] <= 0.6


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ((), "at least one"),
        (([],), "no loss was logged"),
        (([{"step": 1}],), "no loss was logged"),
        ((3,), "got int"),
        ((["text"],), "got list"),
    ],
)
def test_runs_that_cannot_be_drawn_are_named(runs: tuple[Any, ...], message: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(DataError, match=message):
        plots.loss_curves(*runs)


def test_files_that_cannot_be_drawn_are_named(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(FileNotFoundError, match=r"No trainer_state\.json"):
        plots.loss_curves(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(DataError, match="log_history"):
        plots.loss_curves(tmp_path)
    with pytest.raises(DataError, match="labels: expected 1"):
        plots.loss_curves(HISTORY, labels=["a", "b"])


def test_without_matplotlib_its_name_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        plots.loss_curves(HISTORY)


def test_lengths_are_counted_once_each_and_marked(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lengths = [*range(10, 110), 500]
    file = tmp_path / "made" / "lengths.png"
    figure = plots.sequence_lengths(lengths, max_length=100, path=file)
    (axes,) = figure.axes
    assert sum(bar.get_height() for bar in axes.patches) == 101 and file.read_bytes()[1:4] == b"PNG"
    labels = [line.get_label() for line in axes.get_lines()]
    assert labels == ["90 % of the rows: up to 100", "median: 60", "cut after 100: 9.9 % of the rows"]
    rows = [{"input_ids": [1] * length} for length in (3, 3, 5)]
    for data in (rows, SimpleNamespace(train_dataset=rows)):
        assert "longest 5 tokens" in plots.sequence_lengths(data).axes[0].get_title()


@pytest.mark.parametrize(
    ("data", "message"), [([], "at least one row"), (["text"], "tokenise"), (3, "got int"), ([True], "lengths")]
)
def test_lengths_that_cannot_be_drawn_are_named(data: Any, message: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(DataError, match=message):
        plots.sequence_lengths(data)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=50))
def test_nine_rows_in_ten_are_not_longer_than_the_90th_percentile(lengths: list[int]) -> None:
    mark = plots.percentile(lengths)
    assert mark in lengths
    assert sum(length <= mark for length in lengths) >= 0.9 * len(lengths)
    assert sum(length < mark for length in lengths) < 0.9 * len(lengths)


def test_a_trainer_plots_its_losses(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, _ = FastLanguageModel.from_pretrained(tiny.write_model(tmp_path / "llama"), 64)
    model = FastLanguageModel.get_peft_model(model, r=4)
    args = SFTConfig(output_dir=str(tmp_path / "out"), max_steps=3, save_strategy="no", disable_tqdm=True)
    trainer = SFTTrainer(model, args, train_dataset=tiny.rows())
    with pytest.raises(DataError, match="no loss was logged"):
        trainer.plot_loss()
    trainer.train()
    figure = trainer.plot_loss(tmp_path / "loss.png")
    assert [step for step, _ in curves(figure)["training"]] == [1, 2, 3]
    assert (tmp_path / "loss.png").is_file()
    assert "24 rows, longest 12 tokens" in plots.sequence_lengths(trainer.train_dataset).axes[0].get_title()
