"""Search for hyperparameters: one run for each draw, with optuna where it is asked for, else with draws of our own."""

from __future__ import annotations

import importlib
import inspect
import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from typing import Any, Final, NamedTuple

from rustune import checks
from rustune._native import ConfigError, DivergedError
from rustune.callbacks import TrainerCallback
from rustune.config import TrainingArguments
from rustune.notices import tell_once, unknown_argument

# Used when the trainer is made, or the search's own.
_FIXED: Final = (
    "assistant_only_loss",
    "chat_template_path",
    "completion_only_loss",
    "dataset_kwargs",
    "dataset_text_field",
    "eos_token",
    "max_length",
    "model_init_kwargs",
    "output_dir",
    "pad_token",
    "report_to",
)
# What optuna's study takes when it runs, not when it is made.
_OPTIMIZE: Final = ("timeout", "gc_after_trial", "catch", "callbacks", "show_progress_bar")


class BestRun(NamedTuple):
    """The best run of a search.

    Attributes:
        run_id: Its number; what it wrote is in `run-{run_id}` under `output_dir`, unless `hp_name` named it.
        objective: What it reached.
        hyperparameters: What was drawn for it.
        run_summary: None.
    """

    run_id: str
    objective: float
    hyperparameters: dict[str, Any]
    run_summary: Any = None


class Trial:
    """One draw of hyperparameters, with the methods of optuna's trials; a function of the seed, number and name.

    Args:
        number: Which trial of the search.
        seed: The search's seed.

    Attributes:
        number: Which trial of the search.
        params: What was drawn so far.

    Example:
        >>> trial = Trial(0, seed=3407)
        >>> 1e-5 <= trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True) <= 1e-3
        True
    """

    def __init__(self, number: int, seed: int) -> None:
        self.number = number
        self.params: dict[str, Any] = {}
        self._seed = seed

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Draws a number.

        Args:
            name: The hyperparameter.
            low: The least value.
            high: The greatest value.
            step: The distance of the values that may be drawn; any value if not given.
            log: Whether to draw its logarithm evenly.

        Returns:
            The number; the same for the same name.

        Raises:
            ConfigError: If the range is empty, or has a logarithm or step that cannot be.
        """
        _check_range(name, low, high, step, log)

        def draw(dice: random.Random) -> float:
            if step is not None:
                return low + step * dice.randint(0, math.floor((high - low) / step + 1e-9))
            return _within(low, _log_uniform(dice, low, high), high) if log else dice.uniform(low, high)

        drawn: float = self._drawn(name, draw)
        return drawn

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Draws a whole number; arguments as of `suggest_float`."""
        _check_range(name, low, high, step if step != 1 else None, log)

        def draw(dice: random.Random) -> float:
            # By logarithms, each whole number has the share of the line between its halves.
            return (
                _within(low, round(_log_uniform(dice, low - 0.5, high + 0.5)), high)
                if log
                else low + step * dice.randint(0, (high - low) // step)
            )

        drawn: int = self._drawn(name, draw)
        return drawn

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Draws one of some values.

        Args:
            name: The hyperparameter.
            choices: The values.

        Returns:
            One of them; the same for the same name.

        Raises:
            ConfigError: If there is none.
        """
        if not len(choices):
            raise ConfigError(f"hp_space: {name}: expected choices")
        return self._drawn(name, lambda dice: choices[dice.randrange(len(choices))])

    def _drawn(self, name: str, draw: Callable[[random.Random], Any]) -> Any:
        if name not in self.params:
            self.params[name] = draw(random.Random(f"{self._seed} {self.number} {name}"))
        return self.params[name]


def default_hp_space(trial: Any) -> dict[str, Any]:
    """Returns the hyperparameters that transformers searches if nothing else is said.

    Args:
        trial: What draws them.

    Returns:
        Fields of the settings by name.
    """
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-6, 1e-4, log=True),
        "num_train_epochs": trial.suggest_int("num_train_epochs", 1, 5),
        "seed": trial.suggest_int("seed", 1, 40),
        "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", [4, 8, 16, 32, 64]),
    }


def default_compute_objective(metrics: Mapping[str, float]) -> float:
    """Returns the evaluation loss, or the sum of all other results where there are any, as transformers does.

    Args:
        metrics: What an evaluation returned.

    Returns:
        The objective.
    """
    others = {
        name: value
        for name, value in metrics.items()
        if name not in ("eval_loss", "epoch", "step") and not name.endswith(("_runtime", "_per_second"))
    }
    return sum(others.values()) if others else metrics["eval_loss"]


class _Report(TrainerCallback):
    """Keeps the objective of a run's newest evaluation, and lets optuna end a run that does badly.

    Args:
        trial: The trial, of optuna or ours.
        compute_objective: Turns an evaluation into a number.
        pruned: What to raise where optuna says that it is enough; None for our own trials.
    """

    def __init__(self, trial: Any, compute_objective: Callable[..., float], pruned: type[BaseException] | None) -> None:
        self.objective: float | None = None
        self._trial = trial
        self._compute = compute_objective
        self._pruned = pruned

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the objective."""
        self.objective = objective_of(kwargs["metrics"], self._compute)
        if self._pruned is not None:
            self._trial.report(self.objective, state.global_step)
            if self._trial.should_prune():
                raise self._pruned


def objective_of(metrics: Mapping[str, Any], compute_objective: Callable[..., float]) -> float:
    """Returns an evaluation's objective.

    Args:
        metrics: What the evaluation returned.
        compute_objective: Turns it into a number.

    Returns:
        The number.

    Raises:
        ConfigError: If it is none.
    """
    made = compute_objective({name: value for name, value in metrics.items() if name != "step"})
    try:
        return float(made)
    except (TypeError, ValueError):
        raise ConfigError(f"compute_objective returned {made!r}: expected a number") from None


def settings_of(params: Any) -> dict[str, Any]:
    """Returns what of a draw are settings of the run.

    Args:
        params: What `hp_space` returned.

    Returns:
        Fields of the settings by name. Other names are for `model_init(trial)`, which is told in one line.

    Raises:
        ConfigError: If it is no mapping, or holds what cannot change from run to run.
    """
    if not isinstance(params, Mapping):
        raise ConfigError(f"hp_space returned {type(params).__name__}: expected a dict of settings by name")
    known = {entry.name for entry in fields(TrainingArguments)}
    for name in params:
        if name in _FIXED:
            raise ConfigError(f"hp_space: {name}: is the same for all runs; set it in the trainer's args")
        if name not in known:
            tell_once(f"hp_space: {name} is no setting of the run; model_init(trial) finds it in trial.params")
    return {name: value for name, value in params.items() if name in known}


def search(
    trainer: Any,
    hp_space: Callable[[Any], Mapping[str, Any]],
    compute_objective: Callable[[dict[str, float]], float],
    n_trials: int,
    direction: str,
    backend: Any,
    hp_name: Callable[[Any], str] | None,
    options: Mapping[str, Any],
) -> BestRun:
    """Runs a search; see `SFTTrainer.hyperparameter_search`.

    Args:
        trainer: The trainer.
        hp_space: Draws the settings of a run.
        compute_objective: Turns an evaluation into a number.
        n_trials: Runs.
        direction: `minimize` or `maximize`.
        backend: `optuna`, or None for draws of our own.
        hp_name: Names a run.
        options: What optuna takes besides.

    Returns:
        The best run.

    Raises:
        ConfigError: For an argument that cannot be used.
    """
    if not checks.is_one_of(direction, ("minimize", "maximize")):
        raise ConfigError(f'direction = {direction!r}: expected "minimize" or "maximize"')
    checks.check({"n_trials": checks.POSITIVE}, locals(), required=("n_trials",))
    name = backend.value if isinstance(backend, Enum) else backend
    if not checks.is_one_of(name, (None, "random", "optuna")):
        raise ConfigError(f'backend = {name!r}: expected "optuna", or None for draws of our own')
    worst = math.inf if direction == "minimize" else -math.inf

    def run(trial: Any, pruned: type[BaseException] | None) -> float:
        report = _Report(trial, compute_objective, pruned)
        trainer.add_callback(report)
        try:
            settings = settings_of(hp_space(trial))
            named = f"run-{trial.number}" if hp_name is None else str(hp_name(trial))
            with trainer.trying(trial, settings, named):
                trainer.train(trial=trial)
                if report.objective is None:
                    report.objective = objective_of(trainer.evaluate(), compute_objective)
        except DivergedError as error:
            warnings.warn(f"trial {trial.number}: {error}", stacklevel=2)
            return worst
        finally:
            trainer.remove_callback(report)
        return report.objective

    if name == "optuna":
        return _with_optuna(run, n_trials, direction, options)
    for option in options:
        raise unknown_argument("hyperparameter_search", option, _arguments(trainer))
    best: BestRun | None = None
    for number in range(int(n_trials)):
        trial = Trial(number, int(trainer.args.seed))
        reached = run(trial, None)
        # The first of equals; an objective that is no number never wins over one that is.
        sign = 1 if direction == "minimize" else -1
        if best is None or math.isnan(best.objective) or sign * reached < sign * best.objective:
            best = BestRun(str(number), reached, dict(trial.params))
    assert best is not None, "there is at least one trial"
    return best


def _with_optuna(
    run: Callable[[Any, type[BaseException]], float], n_trials: int, direction: str, options: Mapping[str, Any]
) -> BestRun:
    """Lets optuna choose what is tried."""
    try:
        optuna = importlib.import_module("optuna")
    except ImportError:
        raise ConfigError(
            'backend = "optuna": the package optuna is not installed; pip install optuna, or leave backend out'
        ) from None
    if options.get("n_jobs", 1) != 1:
        raise ConfigError(f"n_jobs = {options['n_jobs']!r}: expected 1: a run uses the whole machine")
    study = optuna.create_study(
        direction=direction,
        **{name: value for name, value in options.items() if name not in (*_OPTIMIZE, "n_jobs")},
    )
    running = {name: value for name, value in options.items() if name in _OPTIMIZE}
    study.optimize(lambda trial: run(trial, optuna.TrialPruned), n_trials=n_trials, **running)
    best = study.best_trial
    return BestRun(str(best.number), best.value, dict(best.params))


def _log_uniform(dice: random.Random, low: float, high: float) -> float:
    """A number whose logarithm is drawn evenly."""
    return math.exp(dice.uniform(math.log(low), math.log(high)))


def _within(low: float, value: float, high: float) -> float:
    """The value, or the bound it has passed by rounding."""
    return min(max(value, low), high)


def _check_range(name: str, low: float, high: float, step: float | None, log: bool) -> None:
    if not low <= high:
        raise ConfigError(f"hp_space: {name}: from {low} to {high}: expected an ascending range")
    if log and (low <= 0 or step is not None):
        raise ConfigError(f"hp_space: {name}: log=True: expected a range above 0, and no step")
    if step is not None and step <= 0:
        raise ConfigError(f"hp_space: {name}: step = {step}: expected above 0")


def _arguments(trainer: Any) -> list[str]:
    return list(inspect.signature(trainer.hyperparameter_search).parameters)
