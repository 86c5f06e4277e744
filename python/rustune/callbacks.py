"""Callbacks with transformers' events, and the handler that turns the engine's events into theirs."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from rustune._native import ConfigError

EVENTS: Final = (
    "on_init_end",
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_step_begin",
    "on_substep_end",
    "on_step_end",
    "on_log",
    "on_evaluate",
    "on_save",
    "on_predict",
)


@dataclass
class TrainerControl:
    """What a callback may ask the trainer for.

    Attributes:
        should_training_stop: End the run after this step.
        should_epoch_stop: Not there yet: setting it is an error.
        should_save: Write a checkpoint now.
        should_evaluate: Evaluate now.
        should_log: Make a log entry now.
    """

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False


@dataclass
class TrainerState:
    """Where a run stands.

    Attributes:
        epoch: Finished passes over the data, with a fraction.
        global_step: Finished optimizer steps.
        max_steps: Optimizer steps of the whole run.
        num_train_epochs: Passes over the data that are begun.
        train_batch_size: Rows of a micro-batch.
        num_input_tokens_seen: Tokens trained on since `train` was called.
        total_flos: Floating point operations, estimated as 6 for each parameter and token.
        log_history: Every log entry and evaluation, in order.
        best_metric: The best evaluation so far.
        best_global_step: The step it belongs to.
        best_model_checkpoint: The checkpoint written at such a step, the last time one was.
        logging_steps: Steps between log entries.
        eval_steps: Steps between evaluations.
        save_steps: Steps between checkpoints.
        is_local_process_zero: True: there is one process.
        is_world_process_zero: True: there is one process.
        is_hyper_param_search: False.
        trial_name: None.
        trial_params: None.
    """

    epoch: float = 0.0
    global_step: int = 0
    max_steps: int = 0
    num_train_epochs: int = 0
    train_batch_size: int | None = None
    num_input_tokens_seen: int = 0
    total_flos: float = 0.0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    logging_steps: float | None = None
    eval_steps: float | None = None
    save_steps: float | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None

    def save_to_json(self, json_path: str) -> None:
        """Writes the state as JSON.

        Args:
            json_path: The file.

        Raises:
            OSError: If it cannot be written.
        """
        Path(json_path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


class TrainerCallback:
    """Hears of a run's events; override what is wanted.

    Every method gets `args`, `state`, `control` and, by keyword, `model`, `tokenizer` and `processing_class`; `on_log`
    also `logs`, `on_evaluate` also `metrics`. Changing `control` steers the run.

    Example:
        >>> class StopAt(TrainerCallback):
        ...     def on_step_end(self, args, state, control, **kwargs):
        ...         control.should_training_stop = state.global_step >= 10
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """After the trainer was made."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Before the first step."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """After the last step and the summary."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Before the first step of a pass over the data."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """After the last step of a pass over the data."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Before an optimizer step."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """After a micro-batch that does not end its step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """After an optimizer step."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """After a log entry was made; it is `logs`."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """After an evaluation; its result is `metrics`."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """After a checkpoint was written."""

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """After a prediction."""


class EarlyStoppingCallback(TrainerCallback):
    """Stops when the evaluation has not become better for a while.

    Needs evaluations, and `load_best_model_at_end=True` or a `metric_for_best_model` to judge them by.

    Args:
        early_stopping_patience: Evaluations without improvement after which the run ends.
        early_stopping_threshold: The least change that counts as improvement.

    Raises:
        ConfigError: For a patience below 1 or a threshold below 0.
    """

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float = 0.0) -> None:
        if not isinstance(early_stopping_patience, int) or early_stopping_patience < 1:
            raise ConfigError(f"early_stopping_patience = {early_stopping_patience!r}: expected a whole number from 1")
        if not isinstance(early_stopping_threshold, (int, float)) or not early_stopping_threshold >= 0:
            raise ConfigError(f"early_stopping_threshold = {early_stopping_threshold!r}: expected a number from 0")
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = early_stopping_threshold
        self.early_stopping_patience_counter = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts counting anew; in a resumed run, counts the evaluations before."""
        if args.eval_strategy == "no":
            raise ConfigError('EarlyStoppingCallback: eval_strategy = no: expected "steps" or "epoch"')
        if not args.load_best_model_at_end:
            if args.metric_for_best_model is None:
                raise ConfigError(
                    "EarlyStoppingCallback: load_best_model_at_end = False: expected True, or a metric_for_best_model"
                )
            warnings.warn(
                "EarlyStoppingCallback without load_best_model_at_end=True: the model will be as after the last step, "
                "not as at its best",
                stacklevel=2,
            )
        self.early_stopping_patience_counter = 0
        best: float | None = None
        name = metric_name(args)
        for entry in state.log_history:
            if name in entry and entry.get("step", 0) > 0:
                self._count(entry[name], best, args)
                best = entry[name] if best is None or is_better(entry[name], best, args) else best

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts, and asks for the end when patience is over."""
        metrics: dict[str, float] = kwargs.get("metrics") or {}
        name = metric_name(args)
        if name not in metrics:
            known = ", ".join(metrics)
            raise ConfigError(f"metric_for_best_model = {name}: the evaluation gives {known}")
        self._count(metrics[name], state.best_metric, args)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def _count(self, value: float, best: float | None, args: Any) -> None:
        """Counts an evaluation that is no better than the best of those before."""
        better = best is None or (is_better(value, best, args) and abs(value - best) > self.early_stopping_threshold)
        self.early_stopping_patience_counter = 0 if better else self.early_stopping_patience_counter + 1


def metric_name(args: Any) -> str:
    """Returns the name of the metric that decides which evaluation is best.

    Args:
        args: The trainer's settings.

    Returns:
        `metric_for_best_model` with its prefix `eval_`; the loss if none was named.
    """
    name: str = getattr(args, "metric_for_best_model", None) or "loss"
    return name if name.startswith("eval_") else f"eval_{name}"


def is_better(value: float, best: float, args: Any) -> bool:
    """Tells whether an evaluation beats another.

    Args:
        value: The new one.
        best: The old one.
        args: The trainer's settings; without `greater_is_better`, less is better for names ending in `loss`.

    Returns:
        Whether `value` is strictly better.
    """
    greater = getattr(args, "greater_is_better", None)
    if greater is None:
        greater = not metric_name(args).endswith("loss")
    return value > best if greater else value < best


class CallbackHandler:
    """Calls the callbacks and keeps state and control.

    Args:
        callbacks: Callback objects or classes, ours or transformers'.
        args: The settings callbacks get to see.
        state: The state they get to see.
        kwargs: What they get by keyword: model, tokenizer, processing_class, ...

    Raises:
        ConfigError: If something is no callback.
    """

    def __init__(self, callbacks: Iterable[Any], args: Any, state: TrainerState, kwargs: dict[str, Any]) -> None:
        self.args = args
        self.state = state
        self.control = TrainerControl()
        self.kwargs = kwargs
        self.callbacks: list[Any] = []
        for callback in callbacks:
            self.add(callback)

    def add(self, callback: Any) -> None:
        """Adds a callback.

        Args:
            callback: An object or a class that needs no arguments.

        Raises:
            ConfigError: If it has none of the events.
        """
        made = callback() if inspect.isclass(callback) else callback
        if not any(callable(getattr(made, event, None)) for event in EVENTS):
            raise ConfigError(f"callbacks: {type(made).__name__} has no method on_...; expected a TrainerCallback")
        self.callbacks.append(made)

    def pop(self, callback: Any) -> Any:
        """Takes out a callback.

        Args:
            callback: The object, or its class.

        Returns:
            The callback, or None if there was none.
        """
        for at, known in enumerate(self.callbacks):
            if known is callback or (inspect.isclass(callback) and type(known) is callback):
                return self.callbacks.pop(at)
        return None

    def call(self, event: str, **kwargs: Any) -> None:
        """Calls one event of every callback, in order.

        Args:
            event: The method's name.
            **kwargs: What this event has besides the usual.

        Raises:
            ConfigError: If a callback asks for what is not there yet.
        """
        for callback in self.callbacks:
            method: Callable[..., Any] | None = getattr(callback, event, None)
            if method is None:
                continue
            control = method(self.args, self.state, self.control, **{**self.kwargs, **kwargs})
            if control is not None:
                self.control = control
        if self.control.should_epoch_stop:
            raise ConfigError("control.should_epoch_stop = True: not there yet; use should_training_stop")

    def logged(self, entry: dict[str, Any]) -> None:
        """Records a log entry and tells the callbacks.

        Args:
            entry: What was logged.
        """
        self.state.log_history.append(entry)
        self.control.should_log = False
        self.call("on_log", logs=dict(entry))

    def evaluated(self, metrics: dict[str, Any]) -> None:
        """Records an evaluation and tells the callbacks.

        Args:
            metrics: Its result.
        """
        self.logged(metrics)
        self.control.should_evaluate = False
        self.call("on_evaluate", metrics=dict(metrics))


class Observer:
    """What the engine calls during a run.

    Args:
        handler: Whom to tell.
        watch: Called with the event's name and payload after the callbacks, for the progress display.
        evaluator: Evaluates and returns the metrics; None leaves that to the engine.
    """

    def __init__(
        self,
        handler: CallbackHandler,
        watch: Callable[[str, Any], None],
        evaluator: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self.handler = handler
        self.watch = watch
        self.evaluator = evaluator

    def evaluate(self, status: str) -> dict[str, float] | None:
        """Evaluates in the course of a run; the model is free.

        Args:
            status: As of `event`.

        Returns:
            The metrics, or None to let the engine do it.
        """
        self._note(status)
        return None if self.evaluator is None else self.evaluator()

    def event(self, name: str, status: str, payload: Any) -> dict[str, bool] | None:
        """Hears of an event.

        Args:
            name: `train_begin`, `epoch_begin`, `step_begin`, `substep_end`, `step_end`, `log`, `evaluate`, `save`,
                `epoch_end`, `train_end` or `warning`.
            status: JSON with step, epoch, max_steps, tokens and the best evaluation so far.
            payload: A log entry, an evaluation, a path, a warning, or the control of `step_end` and `epoch_end`.

        Returns:
            What the callbacks ask for.
        """
        self._note(status)
        answer = self._tell(name, payload)
        self.watch(name, payload)
        return answer

    def _note(self, status: str) -> None:
        now = json.loads(status)
        state = self.handler.state
        state.global_step, state.epoch, state.max_steps = now["step"], now["epoch"], now["max_steps"]
        state.num_input_tokens_seen = now["tokens"]
        state.best_metric, state.best_global_step = now["best_metric"], now["best_global_step"]
        state.best_model_checkpoint = now["best_model_checkpoint"]

    def _tell(self, name: str, payload: Any) -> dict[str, bool] | None:
        handler, control = self.handler, self.handler.control
        if name == "warning":
            warnings.warn(str(payload), stacklevel=2)
            return None
        if name == "train_end":
            # The summary is logged before on_train_end, and it needs what the engine returns: the trainer calls both.
            return None
        if name == "log":
            handler.logged(dict(payload))
        elif name == "evaluate":
            handler.evaluated(dict(payload))
        elif name == "save":
            control.should_save = False
            handler.call("on_save")
        else:
            if name == "train_begin":
                control.should_training_stop = False
            elif name == "step_begin":
                control.should_log = control.should_evaluate = control.should_save = False
            elif isinstance(payload, dict):
                control.should_log |= payload.get("log", False)
                control.should_evaluate |= payload.get("evaluate", False)
                control.should_save |= payload.get("save", False)
            handler.call(f"on_{name}")
        control = handler.control
        wishes = {
            "stop": control.should_training_stop,
            "log": control.should_log,
            "evaluate": control.should_evaluate,
            "save": control.should_save,
        }
        if name in ("step_end", "epoch_end"):
            return wishes
        return {wish: True for wish, wanted in wishes.items() if wanted} or None
