"""Reports to TensorBoard, Weights & Biases, Trackio and MLflow: through stand-ins with the packages' own interfaces."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny

from rustune import ConfigError, FastLanguageModel, SFTConfig, SFTTrainer, reporting

Run = Callable[..., SFTTrainer]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Run:
    def ran(report_to: Any, **settings: Any) -> SFTTrainer:
        model, _ = FastLanguageModel.from_pretrained(folder, 64)
        model = FastLanguageModel.get_peft_model(model, r=4)
        args = SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=2,
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=2,
            disable_tqdm=True,
            run_name="mine",
            report_to=report_to,
            **settings,
        )
        trainer = SFTTrainer(model, args, train_dataset=tiny.rows(), eval_dataset=tiny.rows(4))
        trainer.train()
        return trainer

    return ran


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_tensorboard(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[Any] = []

    class SummaryWriter:
        def __init__(self, logdir: str | None = None, comment: str = "", purge_step: int | None = None) -> None:
            told.append(logdir)

        def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
            told.append((tag, scalar_value, global_step))

        def add_text(self, tag: str, text_string: str, global_step: int | None = None) -> None:
            told.append((tag, text_string))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            told.append("closed")

    stand_in(monkeypatch, "tensorboardX", SummaryWriter=SummaryWriter)
    trainer = run("tensorboard", logging_dir=str(tmp_path / "logs"))
    assert told[0] == str(tmp_path / "logs") and told[-1] == "closed"
    assert "lora/r: 4" in told[1][1] and "learning_rate: 5e-05" in told[1][1]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [entry[1:] for entry in told if entry[0] == "train/loss"] == list(zip(losses, (1, 2), strict=True))
    assert [entry[2] for entry in told if entry[0] == "eval/loss"] == [2]
    assert any(entry[0] == "train/train_runtime" for entry in told)
    told.clear()
    run("tensorboard")
    assert Path(told[0]).parent == tmp_path / "out" / "runs"


def test_the_real_tensorboard_writer_is_understood(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    run("tensorboard", logging_dir=str(tmp_path / "logs"))
    (events,) = (tmp_path / "logs").iterdir()
    data = events.read_bytes()
    assert events.name.startswith("events.out.tfevents") and b"train/loss" in data and b"eval/loss" in data


@pytest.mark.parametrize("begun", [False, True])
def test_wandb(run: Run, monkeypatch: pytest.MonkeyPatch, begun: bool, tmp_path: Path) -> None:
    told: list[Any] = []
    config = SimpleNamespace(update=lambda d, allow_val_change=None: told.append(("config", d)))
    wandb = stand_in(
        monkeypatch, "wandb", run="one" if begun else None, config=config, log=lambda d, step=None: told.append(d)
    )

    def init(project: str | None = None, name: str | None = None, config: Any = None, dir: str | None = None) -> None:
        wandb.run = name  # type: ignore[attr-defined]
        told.append(("init", name, config, dir))

    def finish(exit_code: int | None = None) -> None:
        wandb.run = None  # type: ignore[attr-defined]

    vars(wandb).update(init=init, finish=finish)
    run(["wandb"])
    settings = told[0][2] if not begun else told[0][1]
    assert told[0][0] == ("config" if begun else "init") and settings["max_steps"] == 2 and settings["lora/r"] == 4
    assert [entry["train/global_step"] for entry in told[1:] if "train/loss" in entry] == [1, 2]
    # A run of the user's own is left open.
    assert wandb.run == ("one" if begun else None)  # type: ignore[attr-defined]
    assert begun or told[0][1::2] == ("mine", str(tmp_path / "out"))


def test_trackio(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def init(project: str, name: str | None = None, config: dict[str, Any] | None = None) -> None:
        told.append((project, name, config))

    def log(metrics: dict[str, Any], step: int | None = None) -> None:
        told.append(metrics)

    stand_in(monkeypatch, "trackio", init=init, log=log, finish=lambda: told.append("finished"))
    run("trackio")
    assert told[0][:2] == ("rustune", "mine") and told[0][2]["max_steps"] == 2 and told[-1] == "finished"
    assert any("eval/loss" in entry for entry in told[1:-1])


@pytest.mark.parametrize("begun", [False, True])
def test_mlflow(run: Run, monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    told: list[Any] = []
    state: dict[str, Any] = {"run": "one" if begun else None}

    def log_params(params: dict[str, Any]) -> None:
        assert len(params) <= 100 and all(len(value) <= 500 for value in params.values())
        told.append(("params", params))

    stand_in(
        monkeypatch,
        "mlflow",
        active_run=lambda: state["run"],
        start_run=lambda run_name=None: state.update(run=run_name),
        log_params=log_params,
        log_metrics=lambda metrics, step=None: told.append((step, metrics)),
        end_run=lambda: state.update(run=None),
    )
    run("mlflow")
    assert told[0][0] == "params" and told[0][1]["max_steps"] == "2"
    assert [step for step, metrics in told if "train/loss" in metrics] == [1, 2]
    assert state["run"] == ("one" if begun else None)


@pytest.mark.parametrize("name", list(reporting.REPORTERS))
def test_a_missing_package_is_named(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = reporting.REPORTERS[name]
    monkeypatch.setattr(reporter, "is_installed", classmethod(lambda _: False))
    with pytest.raises(ConfigError, match=f"pip install {reporter.package}"):
        SFTTrainer(FastLanguageModel.from_pretrained(folder, 64)[0], SFTConfig(report_to=name))
    monkeypatch.undo()
    assert name in reporting.REPORTERS and SFTConfig(report_to=[name, name]).report_to == [name]


def test_all_means_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, reporter in reporting.REPORTERS.items():
        monkeypatch.setattr(reporter, "is_installed", classmethod(lambda _, name=name: name in ("mlflow", "wandb")))
    assert SFTConfig(report_to="all").report_to == ["wandb", "mlflow"]
    for reporter in reporting.REPORTERS.values():
        monkeypatch.setattr(reporter, "is_installed", classmethod(lambda _: False))
    assert SFTConfig(report_to="all").report_to == "none" and SFTConfig().report_to == "none"


def test_nothing_is_imported_unless_asked_for() -> None:
    code = (
        "import sys, rustune, rustune.reporting\nrustune.SFTConfig(report_to='none')\n"
        "print([name for name in ('tensorboardX', 'wandb', 'trackio', 'mlflow', 'matplotlib', 'yaml', 'IPython')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
