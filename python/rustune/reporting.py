"""Callbacks that pass a run's numbers on to TensorBoard, Weights & Biases, Trackio or MLflow.

Their packages are imported when a run begins that asked for them, and never before.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from rustune._native import ConfigError
from rustune.callbacks import TrainerCallback

# MLflow takes no longer values than this, and no more of them at a time.
_MLFLOW_VALUE: Final = 500
_MLFLOW_PARAMETERS: Final = 100


def checked(named: Sequence[Any]) -> str | list[str]:
    """Checks names of reporters.

    Args:
        named: What was asked for, without "none".

    Returns:
        "none", or a list of names; "all" becomes those whose packages are installed.

    Raises:
        ConfigError: For a name that is not there.
    """
    if "all" in named:
        found = [name for name, reporter in REPORTERS.items() if reporter.is_installed()]
        return found or "none"
    for name in named:
        if name not in REPORTERS:
            near = difflib.get_close_matches(str(name), list(REPORTERS), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"report_to = {name!r}: expected none, {', '.join(REPORTERS)} or all{hint}")
    return list(dict.fromkeys(named)) or "none"


def callbacks(report_to: str | Sequence[str] | None) -> list[TrainerCallback]:
    """Makes the callbacks that report.

    Args:
        report_to: As `checked` returns it.

    Returns:
        One callback for each name.

    Raises:
        ConfigError: If a package is not installed, naming it.
    """
    named = [report_to] if isinstance(report_to, str) else list(report_to or [])
    made: list[TrainerCallback] = []
    for name in named:
        if name == "none":
            continue
        reporter = REPORTERS[name]()
        if not reporter.is_installed():
            raise ConfigError(
                f"report_to = {name!r}: needs the package {reporter.package}, which is not installed;"
                f" pip install {reporter.package}"
            )
        made.append(reporter)
    return made


class Reporter(TrainerCallback):
    """What the reporters share: numbers are passed on at each log entry, under the names transformers gives them."""

    package: str = ""
    modules: tuple[str, ...] = ()

    @classmethod
    def is_installed(cls) -> bool:
        """Tells whether one of the modules can be found, without importing it."""
        return any(_is_there(name) for name in cls.modules)

    def _import(self) -> ModuleType:
        return importlib.import_module(next(name for name in self.modules if _is_there(name)))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the report."""
        model = kwargs.get("model")
        config = args.to_dict()
        config |= {f"lora/{name}": value for name, value in (getattr(model, "adapter", None) or {}).items()}
        self.open(self._import(), args, {name: value for name, value in config.items() if value is not None})

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Passes the numbers on."""
        numbers = {
            _named(name): float(value)
            for name, value in (kwargs.get("logs") or {}).items()
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if numbers:
            self.write(numbers, int(state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the report."""
        self.close()

    def open(self, package: ModuleType, args: Any, config: dict[str, Any]) -> None:
        """Begins a run.

        Args:
            package: The imported package.
            args: The trainer's settings.
            config: Those and the adapter's, as far as they are set.
        """
        raise NotImplementedError

    def write(self, numbers: dict[str, float], step: int) -> None:
        """Passes numbers on.

        Args:
            numbers: Name to value.
            step: Finished optimizer steps.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Ends the run, if it was begun."""
        raise NotImplementedError


class TensorBoard(Reporter):
    """Writes event files for TensorBoard."""

    package = "tensorboardX"
    modules = ("tensorboardX",)
    _writer: Any = None

    def open(self, package: ModuleType, args: Any, config: dict[str, Any]) -> None:
        """Opens an event file in `logging_dir`, or in `runs` of `output_dir`."""
        folder = args.logging_dir or os.path.join(
            args.output_dir, "runs", f"{time.strftime('%b%d_%H-%M-%S')}_{socket.gethostname()}"
        )
        self.close()
        self._writer = package.SummaryWriter(logdir=os.fspath(folder))
        self._writer.add_text("args", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def write(self, numbers: dict[str, float], step: int) -> None:
        """Adds a point to each curve."""
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases(Reporter):
    """Reports to Weights & Biases; WANDB_PROJECT and the like are its own."""

    package = "wandb"
    modules = ("wandb",)
    _package: Any = None
    _ours = False

    def open(self, package: ModuleType, args: Any, config: dict[str, Any]) -> None:
        """Begins a run, unless one was begun already."""
        self._package = package
        if self._package.run is None:
            self._ours = True
            self._package.init(name=args.run_name, config=config, dir=_made(args.output_dir))
        else:
            self._package.config.update(config, allow_val_change=True)

    def write(self, numbers: dict[str, float], step: int) -> None:
        """Logs the numbers with their step."""
        # The step goes along as a number: a resumed run may go back, which wandb's own step cannot.
        if self._package is not None:
            self._package.log({**numbers, "train/global_step": step})

    def close(self) -> None:
        """Ends the run if it is ours."""
        if self._ours:
            self._package.finish()
        self._package, self._ours = None, False


class Trackio(Reporter):
    """Reports to Trackio."""

    package = "trackio"
    modules = ("trackio",)
    _package: Any = None

    def open(self, package: ModuleType, args: Any, config: dict[str, Any]) -> None:
        """Begins a run of the project `args.project`, or `rustune`."""
        self._package = package
        self._package.init(project=args.project or "rustune", name=args.run_name, config=config)

    def write(self, numbers: dict[str, float], step: int) -> None:
        """Logs the numbers with their step."""
        if self._package is not None:
            self._package.log({**numbers, "train/global_step": step})

    def close(self) -> None:
        """Ends the run."""
        if self._package is not None:
            self._package.finish()
            self._package = None


class MLflow(Reporter):
    """Reports to MLflow; MLFLOW_TRACKING_URI and the like are its own."""

    package = "mlflow"
    modules = ("mlflow",)
    _package: Any = None
    _ours = False

    def open(self, package: ModuleType, args: Any, config: dict[str, Any]) -> None:
        """Begins a run, unless one is active, and writes the settings."""
        self._package = package
        if self._package.active_run() is None:
            self._ours = True
            self._package.start_run(run_name=args.run_name)
        settings = [(name, str(value)) for name, value in config.items() if len(str(value)) <= _MLFLOW_VALUE]
        for first in range(0, len(settings), _MLFLOW_PARAMETERS):
            self._package.log_params(dict(settings[first : first + _MLFLOW_PARAMETERS]))

    def write(self, numbers: dict[str, float], step: int) -> None:
        """Logs the numbers with their step."""
        if self._package is not None:
            self._package.log_metrics(numbers, step=step)

    def close(self) -> None:
        """Ends the run if it is ours."""
        if self._ours:
            self._package.end_run()
        self._package, self._ours = None, False


REPORTERS: Final[dict[str, type[Reporter]]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
    "mlflow": MLflow,
}
"""Name, as `report_to` takes it, to reporter."""


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module without a spec, as some stand-ins are: it is there
        return True


def _named(name: str) -> str:
    """A number's name as transformers reports it: `eval/loss`, `test/loss`, `train/...`."""
    for prefix in ("eval", "test"):
        if name.startswith(f"{prefix}_"):
            return f"{prefix}/{name.removeprefix(f'{prefix}_')}"
    return f"train/{name}"


def _made(folder: str | os.PathLike[str]) -> str:
    """The folder, which is there afterwards."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return os.fspath(folder)
