"""Callbacks: the order of events, what they see, and what they may ask for."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from rustune import (
    ConfigError,
    DataError,
    EarlyStoppingCallback,
    FastLanguageModel,
    SFTConfig,
    SFTTrainer,
    TrainerCallback,
)
from rustune.callbacks import EVENTS
from rustune.progress import Bar, Lines, Progress, choose, duration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("llama"))


def trainer_with(folder: Path, out: Path, callbacks: list[Any], **settings: Any) -> SFTTrainer:
    model, _ = FastLanguageModel.from_pretrained(str(folder), 64, dtype="float32", load_in_4bit=False)
    arguments: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": 3,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        **settings,
    }
    return SFTTrainer(
        FastLanguageModel.get_peft_model(model, r=2),
        SFTConfig(**arguments),
        train_dataset=tiny.rows(count=8),
        eval_dataset=tiny.rows(count=2),
        callbacks=callbacks,
    )


class Listen:
    """Not a TrainerCallback: transformers' own have another base class too."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.steps: list[int] = []

    def note(self, event: str, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        assert {"model", "tokenizer", "processing_class"} <= kwargs.keys()
        assert (event == "on_log") == ("logs" in kwargs)
        assert (event == "on_evaluate") == ("metrics" in kwargs)
        # The engine is busy, but what everyone asks a model can be answered.
        assert kwargs["model"].num_parameters() > 0 and kwargs["model"].dtype == "float32"
        self.heard.append(event.removeprefix("on_"))
        self.steps.append(state.global_step)


def _listener(event: str) -> Any:
    def method(self: Listen, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note(event, args, state, control, kwargs)

    return method


for name in EVENTS:
    setattr(Listen, name, _listener(name))


def test_events_come_in_transformers_order(folder: Path, tmp_path: Path) -> None:
    listen = Listen()
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_with(folder, tmp_path, [listen], **settings)
    trainer.train()
    step = ["step_begin", "substep_end", "step_end", "log"]
    # 8 rows by 2 x 2 are 2 steps an epoch.
    assert listen.heard == [
        "init_end",
        "train_begin",
        "epoch_begin",
        *step,
        *step,
        "log",
        "evaluate",
        "save",
        "epoch_end",
        "epoch_begin",
        *step,
        "save",
        *(["epoch_end"] if listen.heard[-3] == "epoch_end" else []),
        "log",
        "train_end",
    ]
    kinds = [sorted(entry.keys() & {"loss", "eval_loss", "train_loss"}) for entry in trainer.state.log_history]
    assert kinds == [["loss"], ["loss"], ["eval_loss"], ["loss"], ["train_loss"]]
    assert trainer.state.best_metric == trainer.state.log_history[2]["eval_loss"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


def test_a_callback_stops_the_run(folder: Path, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == 2
            return control

    trainer = trainer_with(folder, tmp_path, [Stop], max_steps=100)
    assert trainer.train().global_step == 2
    # The next run starts anew.
    trainer.remove_callback(Stop)
    trainer.args.max_steps = 3
    assert trainer.train().global_step == 3


@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_step_end"])
def test_a_callback_asks_for_log_evaluation_and_checkpoint(folder: Path, tmp_path: Path, event: str) -> None:
    class Ask(TrainerCallback):
        pass

    def ask(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == (2 if event == "on_step_end" else 1):
            control.should_log = control.should_evaluate = control.should_save = True

    setattr(Ask, event, ask)
    trainer = trainer_with(folder, tmp_path, [Ask()], logging_strategy="no")
    trainer.train()
    entries = [(entry["step"], "eval_loss" in entry) for entry in trainer.state.log_history[:-1]]
    assert entries == [(2, False), (2, True)]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_callback_cancels_what_the_settings_ask_for(folder: Path, tmp_path: Path) -> None:
    class Silence(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_log = control.should_save = False

    trainer = trainer_with(folder, tmp_path, [Silence()], save_strategy="steps", save_steps=1)
    trainer.train()
    assert len(trainer.state.log_history) == 1 and not list(tmp_path.iterdir())


def test_early_stopping_counts_evaluations_without_progress(folder: Path, tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 50, "load_best_model_at_end": True}
    settings |= {"save_strategy": "steps", "save_steps": 1}
    # No change is as large as the threshold: the first evaluation is the best, and two more end the run.
    trainer = trainer_with(folder, tmp_path, [EarlyStoppingCallback(2, 1e9)], **settings)
    assert trainer.train().global_step == 3
    with pytest.raises(ConfigError, match="eval_strategy"):
        trainer_with(folder, tmp_path, [EarlyStoppingCallback()]).train()
    bare: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ConfigError, match="load_best_model_at_end = False"):
        trainer_with(folder, tmp_path, [EarlyStoppingCallback()], **bare).train()
    with pytest.warns(UserWarning, match="without load_best_model_at_end"):
        trainer_with(folder, tmp_path, [EarlyStoppingCallback()], metric_for_best_model="loss", **bare).train()
    for arguments in ((0,), (1.5,), (1, -1.0), (1, "none")):
        with pytest.raises(ConfigError, match="early_stopping_"):
            EarlyStoppingCallback(*arguments)
    wrong = trainer_with(folder, tmp_path, [EarlyStoppingCallback()], metric_for_best_model="bleu", **settings)
    with pytest.raises(ConfigError, match="eval_bleu"):
        wrong.train()


def test_evaluating_without_rows_is_an_error(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_with(folder, tmp_path, [])
    trainer.eval_dataset = None
    with pytest.raises(DataError, match="eval_dataset"):
        trainer.evaluate()


def test_ending_an_epoch_early_is_not_there_yet(folder: Path, tmp_path: Path) -> None:
    class End(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = True

    with pytest.raises(ConfigError, match="should_epoch_stop"):
        trainer_with(folder, tmp_path, [End()]).train()


class Screen:
    """A stream that keeps what was written."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_the_bar_fills_and_ends_on_a_new_line() -> None:
    screen: Any = Screen()
    bar = Bar(screen)
    bar.banner("about to begin")
    bar.begin(0, 4)
    bar.log({"step": 1, "loss": 2.5})
    bar.advance(4, 1000)
    bar.close()
    bar.close()
    first, *_, last = screen.text.split("\r")
    assert first == "about to begin\n" and last.endswith("\n") and not last.endswith("\n\n")
    assert "4/4" in last and "loss 2.5000" in last and "tok/s" in last and "░" not in last and "█" in last


def test_lines_show_losses_evaluations_and_the_time_left() -> None:
    screen: Any = Screen()
    lines = Lines(screen)
    lines.begin(2, 4)
    lines.advance(3, 500)
    lines.log({"step": 3, "loss": 1.25, "learning_rate": 2e-4, "grad_norm": 0.5})
    lines.evaluation({"step": 3, "eval_loss": 1.5})
    assert screen.text.startswith("step 3/4  loss 1.2500  grad_norm 0.5000  lr 2.00e-04  ")
    assert "ETA" in screen.text and screen.text.endswith("step 3/4  eval_loss 1.5000\n")


def test_the_display_fits_where_it_is_shown() -> None:
    assert type(choose(True)) is Progress and type(choose()) is Lines
    assert [duration(seconds) for seconds in (5, 65, 3661)] == ["0:05", "1:05", "1:01:01"]


@pytest.fixture
def ipython(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for a notebook; what it was shown."""
    shown: list[str] = []
    handle = SimpleNamespace(update=shown.append)
    display = SimpleNamespace(HTML=str, display=lambda html, display_id: handle)
    stand_in = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1), display=display)
    monkeypatch.setitem(sys.modules, "IPython", stand_in)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def test_the_table_of_notebooks_grows(ipython: list[str]) -> None:
    shown = ipython
    table = choose()
    table.begin(0, 2)
    table.log({"step": 1, "loss": 2.5})
    table.advance(1, 100)
    table.close()
    assert cells(shown[-1]) == ["Step", "Training Loss", "1", "2.5000"] and "stopped at 1/2" in shown[-1]
    table.evaluation({"step": 1, "eval_loss": 2.25, "eval_exact_match": 0.5, "eval_runtime": 3.0})
    table.advance(2, 200)
    table.close()
    titles = ["Step", "Training Loss", "Validation Loss", "Exact Match"]
    assert cells(shown[-1]) == [*titles, "1", "2.5000", "2.2500", "0.5000"]
    assert "value='2' max='2'" in shown[-1] and "tok/s" in shown[-1] and "stopped" not in shown[-1]


def cells(page: str) -> list[str]:
    return re.findall(r"<t[hd] [^>]*>([^<]*)</t[hd]>", page)


def test_the_table_shows_the_banner_and_escapes_it(ipython: list[str]) -> None:
    table = choose()
    table.banner("rows < 3")
    assert "<pre>rows &lt; 3</pre>" in ipython[-1] and "<progress" not in ipython[-1]
    table.banner("text", "<b>page</b>")
    table.begin(0, 2)
    table.close()
    assert ipython[-1].startswith("<b>page</b>") and "<progress" in ipython[-1] and "<table" not in ipython[-1]


def test_a_long_table_scrolls(ipython: list[str]) -> None:
    table = choose()
    table.begin(0, 100)
    for step in range(100):
        table.log({"step": step, "loss": 1.0})
    table.close()
    assert "overflow-y:auto" in ipython[-1] and len(cells(ipython[-1])) == 2 * 101


def test_the_expected_time_is_told_once_and_only_of_long_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("rustune.progress.time.monotonic", lambda: now[0])
    for seconds, told in ((0.1, 0), (2.0, 1)):
        screen: Any = Screen()
        lines = Lines(screen)
        lines.begin(10, 40)
        for step in range(11, 20):
            now[0] += seconds
            lines.advance(step, 100 * (step - 10))
        assert screen.text.count("expected time") == told
    assert screen.text == "expected time: 1:00, 50 tokens/s (measured over the first 3 steps)\n"


def test_a_narrow_terminal_is_not_overrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    screen: Any = Screen()
    bar = Bar(screen)
    bar.begin(0, 1000)
    bar.log({"step": 1, "loss": 2.5})
    bar.advance(1000, 100)
    bar.close()
    drawn = [line.removesuffix("\x1b[K") for line in screen.text.rstrip("\n").split("\r")]
    assert max(map(len, drawn)) == 23


def test_a_line_does_not_break_the_bar() -> None:
    screen: Any = Screen()
    bar = Bar(screen)
    bar.begin(0, 4)
    bar.evaluation({"step": 1, "eval_loss": 2.0})
    *_, line, after = screen.text.split("\r")
    assert line == "\x1b[Kstep 1/4  eval_loss 2.0000\n" and "0/4" in after


def test_other_encodings_get_other_signs() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    bar = Bar(file)
    bar.banner("a «sample»")
    bar.begin(0, 2)
    bar.advance(2, 10)
    bar.close()
    text = file.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert text.startswith("a >>sample<<\n") and "####" in text


def test_without_a_console_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert type(choose()) is Progress
