"""`SFTTrainer`: rows in, a trained adapter out; the loop itself runs in Rust."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from rustune import _native, banner, checks, evaluation, hub, progress, reporting, search
from rustune._native import ConfigError, DataError, HubError, TokenizerError
from rustune.callbacks import CallbackHandler, Observer, TrainerControl, TrainerState
from rustune.config import SFTConfig, TrainingArguments, settings_from
from rustune.data import formatted, is_several, is_streamed, iter_columns
from rustune.model import Model, checkpointing_name, native_tokenizer
from rustune.notices import sort_arguments, unknown_argument
from rustune.tokenizer import Tokenizer

# Collators that only pad and copy ids to labels: rows are put together in the engine, which does neither need.
_PLAIN_COLLATORS: Final = (
    "DataCollatorForSeq2Seq",
    "DataCollatorForLanguageModeling",
    "DataCollatorWithPadding",
    "DefaultDataCollator",
    "default_data_collator",
)
_KINDS: Final = {
    "callbacks": checks.LIST,
    "compute_metrics": checks.FUNCTION,
    "preprocess_logits_for_metrics": checks.FUNCTION,
    "model_init": checks.FUNCTION,
    "dataset_text_field": checks.TEXT,
    "max_seq_length": checks.WHOLE,
    "packing": checks.BOOL,
    "neftune_noise_alpha": checks.NUMBER,
    "dataset_num_proc": checks.WHOLE,
    "dataset_batch_size": checks.WHOLE,
}
# Arguments of other trainers that only pass when they ask for nothing, and what to do instead.
_MISSING: Final = {
    "compute_loss_func": "the loss is the cross entropy of the next token",
    "optimizer_cls_and_kwargs": "use args.optim and args.optim_args",
}
# Arguments of trl's earlier trainers that are settings today.
_SETTINGS: Final = ("dataset_kwargs", "eval_packing", "model_init_kwargs")
# And those that mean nothing here.
_IDLE: Final = ("chars_per_token", "formatting_kwargs", "infinite", "num_of_sequences")


class TrainOutput(NamedTuple):
    """How a run ended.

    Attributes:
        global_step: Optimizer steps made in all.
        training_loss: Mean of the steps' losses.
        metrics: train_runtime, train_samples_per_second, train_steps_per_second, train_tokens_per_second,
            total_flos, train_loss and epoch.
    """

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class TokenisedDataset:
    """Tokenised rows, by number or by column.

    Args:
        rows: The compiled rows.

    Example:
        >>> trainer.train_dataset[0]["labels"]  # doctest: +SKIP
        [-100, -100, 512, 2]
    """

    column_names: Final = ["input_ids", "labels"]

    def __init__(self, rows: _native.Rows) -> None:
        self.rows = rows
        self.report: dict[str, int] = json.loads(rows.report)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str | slice) -> Any:
        if isinstance(key, str):
            return [row[key] for row in self]
        if isinstance(key, slice):
            picked = [self.rows[i] for i in range(*key.indices(len(self)))]
            return {name: [row[name] for row in picked] for name in self.column_names}
        return self.rows[int(key)]

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self.rows[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"TokenisedDataset({len(self)} rows, {self.rows.n_tokens} tokens, {self.rows.n_trained} trained)"


class SFTTrainer:
    """Fine-tunes a model on text, conversations or rows of token ids.

    Args:
        model: From `FastLanguageModel`; or the name of one, which is loaded with `args.model_init_kwargs`.
        args: `SFTConfig` or `TrainingArguments`, ours or transformers'.
        tokenizer: Ours or transformers'; the one the model was loaded with if not given.
        processing_class: Another name of `tokenizer`.
        train_dataset: `datasets`, lists of dicts, pandas, pyarrow, or a path to .jsonl or .parquet. Of an
            `IterableDataset` as many rows are read, here and at once, as `max_steps` need; they keep their order.
        eval_dataset: The same, for evaluation; an `IterableDataset` is read to its end. Several by name give metrics
            such as `eval_{name}_loss`.
        dataset_text_field: The column of plain text; `args.dataset_text_field` if not given.
        max_seq_length: Longest row in tokens; `args.max_length`, then the model's, if not given.
        data_collator: A collator of transformers; it changes nothing.
        dataset_num_proc: Makes no difference: all threads tokenise.
        packing: Put rows together to packed rows of up to `max_seq_length` tokens, as `args.packing`.
        formatting_func: Turns a row, or a batch of columns, into a text or a list of them.
        peft_config: A `LoraConfig` for a model that has no adapter yet.
        model_init: Instead of `model`: a function, of a trial or of nothing, that makes the model anew for each run.
        compute_metrics: Turns an `EvalPrediction` into names and numbers, which every evaluation then reports; its
            predictions are computed batch by batch when it asks for them.
        preprocess_logits_for_metrics: Turns a batch's logits and labels into what `compute_metrics` gets of them.
        neftune_noise_alpha: Another place for the setting of that name.
        callbacks: `TrainerCallback` objects or classes, ours or transformers'.
        optimizers: Not there yet.
        **unknown: An error that names the nearest argument.

    Raises:
        ConfigError: For a setting that cannot be used.
        DataError: If the rows cannot be read, or none can be trained on.

    Example:
        >>> SFTTrainer(model, SFTConfig(max_steps=60), train_dataset=rows).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Model | str | os.PathLike[str] | None = None,
        args: SFTConfig | TrainingArguments | Any = None,
        *,
        tokenizer: Any = None,
        processing_class: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        dataset_text_field: str | None = None,
        max_seq_length: int | None = None,
        data_collator: Any = None,
        dataset_num_proc: int | None = None,
        dataset_batch_size: int | None = None,
        packing: bool | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
        peft_config: Any = None,
        model_init: Callable[..., Model] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        neftune_noise_alpha: float | None = None,
        callbacks: Iterable[Any] | None = None,
        optimizers: Any = (None, None),
        **unknown: Any,
    ) -> None:
        own: dict[str, Any] = {name: unknown.pop(name) for name in _SETTINGS if name in unknown}
        for name, instead in _MISSING.items():
            if unknown.pop(name, None) is not None:
                raise ConfigError(f"{name}: not there yet; {instead}")
        sort_arguments("SFTTrainer", unknown, _IDLE, {*_arguments(), *_SETTINGS, *_MISSING})
        checks.check(_KINDS, locals())
        if max_seq_length is not None and max_seq_length < 1:
            raise ConfigError(f"max_seq_length = {max_seq_length}: expected at least 1")
        if not (optimizers is None or (isinstance(optimizers, (tuple, list)) and not any(map(_is_given, optimizers)))):
            raise ConfigError("optimizers: not there yet; use args.optim and args.lr_scheduler_type")
        _check_collator(data_collator)
        changes: dict[str, Any] = {**own, "packing": packing, "neftune_noise_alpha": neftune_noise_alpha}
        changes = {name: value for name, value in changes.items() if value is not None}
        self.args = settings_from(args)
        if changes:
            self.args = replace(self.args, **changes)
        self._peft_config = peft_config
        self.model_init = model_init
        # A model that was made and not trained yet is not made anew.
        self._model_is_new = True
        self.model = model = self._first_model(model)
        self.compute_metrics = compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        if self.args.batch_eval_metrics and compute_metrics is not None:
            _check_takes_compute_result(compute_metrics)
        chosen = tokenizer if processing_class is None else processing_class
        self.processing_class: Any = model.tokenizer if chosen is None else chosen
        _set_tokens(self.processing_class, self.args)
        self._native_tokenizer = native_tokenizer(self.processing_class)
        length = self.args.max_length if max_seq_length is None else max_seq_length
        self.max_seq_length: int = model.max_seq_length if length is None else int(length)
        self._text_field = dataset_text_field or self.args.dataset_text_field
        self._formatting_func = formatting_func
        self._keeps_order = False
        self.train_dataset = self._read("train_dataset", train_dataset)
        self.eval_dataset = self._read_evaluation(eval_dataset)
        self.state = TrainerState()
        self._trial: tuple[Any, str] | None = None
        context = {
            "model": model,
            "tokenizer": self.processing_class,
            "processing_class": self.processing_class,
            "optimizer": None,
            "lr_scheduler": None,
            "train_dataloader": None,
            "eval_dataloader": None,
        }
        reporters = reporting.callbacks(self.args.report_to)
        self._handler = CallbackHandler([*reporters, *(callbacks or ())], self.args, self.state, context)
        self._handler.call("on_init_end")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; the older name of `processing_class`."""
        return self.processing_class

    @property
    def control(self) -> TrainerControl:
        """What the callbacks asked for."""
        return self._handler.control

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, trial: Any = None
    ) -> TrainOutput:
        """Trains.

        Args:
            resume_from_checkpoint: A checkpoint's folder to go on from, or True for the newest complete one in
                `output_dir`.
            trial: What `model_init` is called with, in a search for hyperparameters.

        Returns:
            Steps, loss and metrics.

        Raises:
            DataError: If there are no rows.
            DivergedError: If the loss is no longer finite; the weights are those of the step before.
            CheckpointError: If a checkpoint cannot be written or resumed from.
            KeyboardInterrupt: On Ctrl-C, within a step; the model can be used as it is then.

        Callbacks may use the model: generate from it, call it, save it.
        """
        if self.train_dataset is None:
            raise DataError("train_dataset: not given")
        if self.eval_dataset is None and self.args.eval_strategy != "no":
            raise DataError(f"eval_dataset: not given, but eval_strategy = {self.args.eval_strategy}")
        resume = self._checkpoint(
            self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        )
        if self.model_init is not None and not self._model_is_new:
            self._make_anew(trial)
        self._model_is_new = False
        rows = self.train_dataset.rows
        plan = self.args.plan(rows.n_packed(self.max_seq_length) if self.args.packing else len(rows))
        self._begin(plan, resume)
        shown = progress.choose(self.args.disable_tqdm)
        shown.banner(*banner.texts(self, plan))
        eval_rows = self.eval_dataset.rows if isinstance(self.eval_dataset, TokenisedDataset) else None
        try:
            outcome = json.loads(
                self.model.native.train(
                    rows,
                    eval_rows,
                    self._engine_options(),
                    self._checkpointing(),
                    resume,
                    Observer(self._handler, self._watcher(shown), self._evaluator()),
                    self._native_tokenizer,
                    self.model.base_model,
                )
            )
            metrics = self._metrics(outcome)
            self._handler.logged({**metrics, "step": self.state.global_step})
        finally:
            shown.close()
        self._handler.call("on_train_end")
        if self.args.push_to_hub:
            print(f"uploaded to {self.push_to_hub()}")
        return TrainOutput(outcome["global_step"], outcome["training_loss"], metrics)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluates.

        Args:
            eval_dataset: Rows; those the trainer was made with if not given. The name of one of several of those, or
                several by name, too.
            ignore_keys: Makes no difference.
            metric_key_prefix: What the names of the metrics begin with.

        Returns:
            The mean token loss, what `compute_metrics` returns, the time it took, and where training stands.

        Raises:
            DataError: If there are no rows, or no token has a label.
        """
        own = self.eval_dataset
        if eval_dataset is None:
            dataset = own
        elif isinstance(own, dict) and isinstance(eval_dataset, str) and eval_dataset in own:
            dataset = own[eval_dataset]
        else:
            dataset = self._read_evaluation(eval_dataset)
        if dataset is None:
            raise DataError("eval_dataset: not given; pass it here or to SFTTrainer")
        metrics = {**self._score_each(dataset, metric_key_prefix), "epoch": self.state.epoch}
        self._handler.evaluated({**metrics, "step": self.state.global_step})
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test"
    ) -> evaluation.PredictionOutput:
        """Evaluates, and returns predictions as well.

        Args:
            test_dataset: Rows, as of `train_dataset`.
            ignore_keys: Makes no difference.
            metric_key_prefix: What the names of the metrics begin with.

        Returns:
            Predictions, labels and metrics. The predictions are logits computed when asked for, batch by batch, or
            what `preprocess_logits_for_metrics` made of them.

        Raises:
            DataError: If there are no rows, or no token has a label.
        """
        dataset = self._read("test_dataset", test_dataset)
        if dataset is None:
            raise DataError("test_dataset: not given")
        metrics, outcome = self._score(dataset, metric_key_prefix, keeps=True)
        self._handler.call("on_predict", metrics=dict(metrics))
        return evaluation.PredictionOutput(outcome.predictions, outcome.label_ids, metrics)

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], Mapping[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str = "minimize",
        backend: Any = None,
        hp_name: Callable[[Any], str] | None = None,
        **options: Any,
    ) -> search.BestRun:
        """Trains with one draw of hyperparameters after another, each on a model made anew by `model_init`.

        Afterwards the settings are as before, and the model is that of the last run.

        Args:
            hp_space: Turns a trial into settings of a run by name, by `trial.suggest_float(name, low, high, log=...)`,
                `suggest_int` and `suggest_categorical`; transformers' space of learning rate, epochs, seed and batch
                size if not given.
            compute_objective: Turns the newest evaluation of a run into a number; the loss, or the sum of what
                `compute_metrics` gives, if not given.
            n_trials: Runs.
            direction: `minimize` or `maximize`.
            backend: `optuna` if it is to choose; None draws at random, by `args.seed`.
            hp_name: Names a trial's run and its folder in `output_dir`; `run-{number}` if not given.
            **options: For optuna: what `create_study` and `Study.optimize` take.

        Returns:
            Number, objective and hyperparameters of the best run.

        Raises:
            ConfigError: Without `model_init`, or for an argument that cannot be used.
            DataError: If there are no evaluation rows.

        Example:
            >>> best = trainer.hyperparameter_search(  # doctest: +SKIP
            ...     lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True)},
            ...     n_trials=5,
            ... )
        """
        if self.model_init is None:
            raise ConfigError(
                "hyperparameter_search: every run needs a new model; give SFTTrainer model_init=, a function that "
                "makes one, instead of model="
            )
        checks.check(dict.fromkeys(("hp_space", "compute_objective", "hp_name"), checks.FUNCTION), locals())
        if self.eval_dataset is None:
            raise DataError("eval_dataset: not given, but hyperparameter_search compares evaluations")
        return search.search(
            self,
            hp_space or search.default_hp_space,
            compute_objective or search.default_compute_objective,
            n_trials,
            direction,
            backend,
            hp_name,
            options,
        )

    @contextmanager
    def trying(self, trial: Any, settings: Mapping[str, Any], name: str) -> Iterator[None]:
        """Changes the settings for a trial of a search, and changes them back.

        Args:
            trial: The trial.
            settings: Fields of the settings that differ.
            name: The run's name, and its folder in `output_dir`.

        Yields:
            Nothing.

        Raises:
            ConfigError: If a setting cannot be used.
        """
        before = self.args
        folder = os.path.join(before.output_dir, name)
        self.args = replace(before, **{"run_name": name, **settings}, output_dir=folder)
        self._trial = trial, name
        self._model_is_new = False
        try:
            self._handler.args = self.args
            yield
        finally:
            self.args = self._handler.args = before
            self._trial = None

    def push_to_hub(self, commit_message: str | None = "End of training", **options: Any) -> str:
        """Uploads what `save_model` writes, to `args.hub_model_id` or a repository named like `args.output_dir`.

        Args:
            commit_message: The commit's title.
            **options: token, revision, private and create_pr; `blocking` and the like make no difference.

        Returns:
            The address of the commit.

        Raises:
            ConfigError: If there is no token.
            HubError: If the hub refuses.
        """
        known = {name: options[name] for name in ("token", "revision", "private", "create_pr") if name in options}
        with tempfile.TemporaryDirectory() as folder:
            self.save_model(folder)
            return self._upload(folder, commit_message or "End of training", **known)

    def save_model(self, output_dir: str | os.PathLike[str] | None = None) -> None:
        """Writes the adapter (or the whole model after full fine-tuning) and the tokenizer.

        Args:
            output_dir: A folder; `args.output_dir` if not given.

        Raises:
            OSError: If it cannot be written.
        """
        folder = os.fspath(self.args.output_dir if output_dir is None else output_dir)
        self.model.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def save_state(self) -> None:
        """Writes `trainer_state.json` into `args.output_dir`.

        Raises:
            OSError: If it cannot be written.
        """
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def add_callback(self, callback: Any) -> None:
        """Adds a callback.

        Args:
            callback: An object, or a class that needs no arguments.

        Raises:
            ConfigError: If it is no callback.
        """
        self._handler.add(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Takes out a callback.

        Args:
            callback: The object, or its class.

        Returns:
            The callback, or None if there was none.
        """
        return self._handler.pop(callback)

    def remove_callback(self, callback: Any) -> None:
        """Takes out a callback.

        Args:
            callback: The object, or its class.
        """
        self._handler.pop(callback)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Makes a log entry.

        Args:
            logs: Names and values; epoch and step are added.
            start_time: Makes no difference.
        """
        self._handler.logged({**logs, "epoch": self.state.epoch, "step": self.state.global_step})

    def plot_loss(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws the losses of training and evaluation.

        Args:
            path: A file to write it to as well, whose ending says the format.

        Returns:
            A figure of matplotlib, which a notebook shows.

        Raises:
            ConfigError: If matplotlib is not installed.
            DataError: If nothing was logged yet.

        Example:
            >>> trainer.plot_loss("loss.png")  # doctest: +SKIP
        """
        from rustune import plots

        return plots.loss_curves(self, path=path)

    def _first_model(self, model: Any) -> Model:
        """The model a trainer begins with: as given, loaded by its name, or made."""
        if self.model_init is not None:
            if model is not None:
                raise ConfigError("model_init: not together with model; give one of them")
            return self._made(None)
        loading = self.args.model_init_kwargs
        if isinstance(model, (str, os.PathLike)):
            # Here and not above: its module knows this one.
            from rustune.auto import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(model, **(loading or {}))
        elif loading:
            raise ConfigError(f"model_init_kwargs = {loading}: the model is loaded already; give its name as model")
        return self._with_adapter(model)

    def _made(self, trial: Any) -> Model:
        """A model of `model_init`."""
        assert self.model_init is not None, "called where there is one"
        model = self.model_init(trial) if inspect.signature(self.model_init).parameters else self.model_init()
        if not isinstance(model, Model):
            raise ConfigError(
                f"model_init returned {type(model).__name__}: expected a model, as of FastLanguageModel.get_peft_model"
            )
        return self._with_adapter(model)

    def _with_adapter(self, model: Any) -> Model:
        """The model with the adapter of `peft_config`, if there is one."""
        if not isinstance(model, Model):
            raise ConfigError(
                f"model = {type(model).__name__}: expected what FastLanguageModel.from_pretrained returns"
            )
        if self._peft_config is None:
            return model
        # Here and not above: its module knows this one.
        from rustune.peft_names import get_peft_model

        return get_peft_model(model, self._peft_config)

    def _make_anew(self, trial: Any) -> None:
        """Puts a new model in the place of the old one, which is let go first: there is no room for two."""
        del self.model
        self._handler.kwargs["model"] = None
        self.model = self._handler.kwargs["model"] = self._made(trial)

    def _read_evaluation(self, dataset: Any) -> TokenisedDataset | dict[str, TokenisedDataset] | None:
        """Tokenises the rows of evaluation, of one dataset or of several by name."""
        if not is_several(dataset):
            return self._read("eval_dataset", dataset)
        read = {str(name): self._read(f"eval_dataset[{name!r}]", one) for name, one in dataset.items()}
        return {name: one for name, one in read.items() if one is not None}

    def _read(self, what: str, dataset: Any) -> TokenisedDataset | None:
        """Tokenises a dataset, and says what was left out."""
        if dataset is None:
            return None
        if isinstance(dataset, TokenisedDataset):
            return dataset
        max_rows = self._rows_of_stream(dataset) if what == "train_dataset" else None
        batches = iter_columns(dataset, 1000 if max_rows is None else min(max_rows, 1000))
        text_field = self._text_field
        if self._formatting_func is not None:
            batches, text_field = formatted(batches, self._formatting_func), "text"
        options = {
            "text_field": text_field,
            "max_length": self.max_seq_length,
            "max_rows": max_rows,
            "completion_only_loss": self.args.completion_only_loss,
            "assistant_only_loss": self.args.assistant_only_loss,
            "add_special_tokens": (self.args.dataset_kwargs or {}).get("add_special_tokens", True),
        }
        try:
            made = TokenisedDataset(_native.Rows.read(self._native_tokenizer, json.dumps(options), batches))
        except (DataError, TokenizerError) as error:
            raise type(error)(f"{what}: {str(error).removeprefix('dataset: ')}") from None
        left_out = [f"{made.report[why]} {said}" for why, said in _LEFT_OUT if made.report.get(why)]
        if left_out:
            warnings.warn(f"{what}: left out of {made.report['rows']} rows: {', '.join(left_out)}", stacklevel=3)
        return made

    def _rows_of_stream(self, dataset: Any) -> int | None:
        """How many rows of a stream the run needs; None for a dataset with a length."""
        self._keeps_order = is_streamed(dataset)
        if not self._keeps_order:
            return None
        steps = int(self.args.max_steps or 0)
        if steps < 1:
            raise ConfigError(
                f"max_steps = {steps}: a streamed dataset has no length, so say how long to train: max_steps=60"
            )
        if self.args.packing or self.args.group_by_length:
            what = "packing" if self.args.packing else "group_by_length"
            raise ConfigError(f"{what} = True: a streamed dataset keeps its order, row by row; leave it out")
        return steps * self.args.train_batch_size * int(self.args.gradient_accumulation_steps)

    def _score(
        self, dataset: TokenisedDataset, prefix: str, keeps: bool = False
    ) -> tuple[dict[str, float], evaluation.Outcome]:
        """Loss, metrics and times under their prefix, and what they came from."""
        args, started = self.args, time.monotonic()
        outcome = evaluation.run(
            self.model.native,
            dataset.rows,
            args.eval_batch_size,
            compute_metrics=None if args.prediction_loss_only else self.compute_metrics,
            preprocess=self.preprocess_logits_for_metrics,
            by_batch=bool(args.batch_eval_metrics) and not keeps,
            keeps=keeps and not args.prediction_loss_only,
        )
        seconds = max(time.monotonic() - started, 1e-9)
        named = {
            name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": n for name, n in outcome.metrics.items()
        }
        metrics = {
            f"{prefix}_loss": outcome.loss,
            **named,
            f"{prefix}_runtime": seconds,
            f"{prefix}_samples_per_second": len(dataset) / seconds,
            f"{prefix}_steps_per_second": -(-len(dataset) // args.eval_batch_size) / seconds,
        }
        return metrics, outcome

    def _score_each(self, datasets: TokenisedDataset | dict[str, TokenisedDataset], prefix: str) -> dict[str, float]:
        """Loss, metrics and times of one dataset, or of several, each under its name."""
        if isinstance(datasets, TokenisedDataset):
            return self._score(datasets, prefix)[0]
        metrics: dict[str, float] = {}
        for name, dataset in datasets.items():
            metrics |= self._score(dataset, f"{prefix}_{name}")[0]
        return metrics

    def _evaluator(self) -> Callable[[], dict[str, float]] | None:
        """What evaluates in the course of a run, if the engine's own evaluation is not enough."""
        datasets = self.eval_dataset
        has_metrics = self.compute_metrics is not None and not self.args.prediction_loss_only
        if datasets is None or not (has_metrics or isinstance(datasets, dict)):
            return None
        return lambda: self._score_each(datasets, "eval")

    def _upload_step(self, checkpoint: str) -> None:
        """Uploads what a checkpoint is to give the hub; a hub that fails does not end the run."""
        args, state = self.args, self.state
        at = f"epoch {int(state.epoch)}" if args.save_strategy == "epoch" else f"step {state.global_step}"
        try:
            self.push_to_hub(f"Training in progress, {at}")
            if args.hub_strategy != "every_save":
                folder = "last-checkpoint" if args.hub_strategy == "checkpoint" else Path(checkpoint).name
                self._upload(checkpoint, f"Training in progress, {at}, checkpoint", folder_there=folder)
        except (HubError, OSError) as error:
            warnings.warn(f"push_to_hub: {at} was not uploaded: {error}", stacklevel=2)

    def _upload(self, folder_here: str, commit_message: str, **options: Any) -> str:
        """Uploads a folder to the repository of the settings."""
        args = self.args
        settings = {"token": args.hub_token, "private": args.hub_private_repo, "revision": args.hub_revision, **options}
        repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
        return hub.upload_folder(folder_here, repo_id, commit_message=commit_message, **settings)

    def _checkpoint(self, wanted: str | os.PathLike[str] | bool | None) -> str | None:
        """The checkpoint to go on from."""
        if wanted is None or wanted is False:
            return None
        if wanted is not True:
            return os.fspath(wanted)
        path, skipped = _native.newest_checkpoint(self.args.output_dir)
        for folder, reason in skipped:
            warnings.warn(f"{folder}: passed over: {reason}", stacklevel=3)
        if path is None:
            print(f"{self.args.output_dir} holds no checkpoint to go on from: starting afresh")
        else:
            print(f"going on from {path}")
        return None if path is None else os.fspath(path)

    def _begin(self, plan: dict[str, int], resume: str | None) -> None:
        """Sets the state to the run's start, or to a checkpoint's."""
        state, args = self.state, self.args
        fresh = TrainerState(
            max_steps=plan["total_steps"],
            num_train_epochs=plan["epochs"],
            train_batch_size=args.train_batch_size,
            logging_steps=args.logging_steps,
            eval_steps=args.eval_steps,
            save_steps=args.save_steps,
        )
        if resume is not None and (file := Path(resume) / "trainer_state.json").is_file():
            saved = json.loads(file.read_text(encoding="utf-8"))
            fresh.log_history = saved.get("log_history") or []
        if self._trial is not None:
            fresh.is_hyper_param_search, fresh.trial_name = True, self._trial[1]
            fresh.trial_params = dict(self._trial[0].params)
        # The object stays the same: callbacks may hold it.
        for entry in fields(TrainerState):
            setattr(state, entry.name, getattr(fresh, entry.name))

    def _engine_options(self) -> str:
        options = json.loads(self.args.engine_options())
        if self._keeps_order:
            options["train_sampling_strategy"] = "sequential"
        return json.dumps({**options, "max_length": self.max_seq_length})

    def _checkpointing(self) -> str:
        asked = self.args.gradient_checkpointing
        return self.model.checkpointing if asked is None else checkpointing_name(asked)

    def _watcher(self, shown: progress.Progress) -> Callable[[str, Any], None]:
        """Passes events on to the display."""

        def watch(name: str, payload: Any) -> None:
            if name == "train_begin":
                shown.begin(self.state.global_step, self.state.max_steps)
            elif name in ("substep_end", "step_end"):
                shown.advance(self.state.global_step, self.state.num_input_tokens_seen)
            elif name == "log":
                shown.log(payload)
            elif name == "evaluate":
                shown.evaluation(payload)
            elif name == "save" and self.args.push_to_hub and self.args.hub_strategy != "end":
                self._upload_step(payload)

        return watch

    def _metrics(self, outcome: dict[str, Any]) -> dict[str, float]:
        seconds = max(outcome["seconds"], 1e-9)
        self.state.total_flos = 6.0 * self.model.num_parameters() * outcome["tokens"]
        return {
            "train_runtime": seconds,
            "train_samples_per_second": outcome["rows"] / seconds,
            "train_steps_per_second": outcome["steps"] / seconds,
            "train_tokens_per_second": outcome["tokens"] / seconds,
            "total_flos": self.state.total_flos,
            "train_loss": outcome["training_loss"],
            "epoch": outcome["epoch"],
        }


_MASKING_KINDS: Final = {
    "instruction_part": checks.TEXT,
    "response_part": checks.TEXT,
    "force_match": checks.BOOL,
    "return_function": checks.BOOL,
    "num_proc": checks.WHOLE,
}
_LEFT_OUT: Final = (("empty", "without text"), ("untrained", "without a trained token"))


def train_on_responses_only(
    trainer: SFTTrainer,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
    **unknown: Any,
) -> SFTTrainer:
    """Leaves only the answers to be trained, in the training and the evaluation rows.

    Args:
        trainer: The trainer; its datasets are replaced.
        instruction_part: The text before each question; found from the chat template if not given.
        response_part: The text before each answer; found from the chat template if not given.
        force_match: Makes no difference: markers are found by their text, not by their ids.
        tokenizer: The one the rows were made with; the trainer's if not given.
        return_function: Not there yet.
        num_proc: Makes no difference: all threads search.
        **unknown: An error that names the nearest argument.

    Returns:
        The same trainer.

    Raises:
        ConfigError: If only one of the two was given, or there is no tokenizer, or for an argument that does not exist.
        DataError: If no token would be trained, naming the marker and the nearest text found.

    Example:
        >>> trainer = train_on_responses_only(trainer)  # doctest: +SKIP
    """
    for name in unknown:
        raise unknown_argument("train_on_responses_only", name, train_on_responses_only.__annotations__)
    checks.check(_MASKING_KINDS, locals())
    if return_function:
        raise ConfigError("return_function = True: not there yet; give a trainer")
    if not isinstance(trainer, SFTTrainer):
        raise ConfigError(f"trainer = {type(trainer).__name__}: expected an SFTTrainer")
    native = native_tokenizer(trainer.processing_class if tokenizer is None else tokenizer)
    if native is None:
        raise ConfigError("train_on_responses_only: needs a tokenizer; give one to SFTTrainer")

    def answers_of(name: str, dataset: TokenisedDataset) -> TokenisedDataset:
        rows, _, _, dropped = dataset.rows.train_on_responses_only(native, instruction_part, response_part)
        if dropped:
            warnings.warn(f"{name}: {dropped} of {len(dataset)} rows have no answer and are left out", stacklevel=3)
        return TokenisedDataset(rows)

    evaluated = trainer.eval_dataset
    if trainer.train_dataset is not None:
        trainer.train_dataset = answers_of("train_dataset", trainer.train_dataset)
    if isinstance(evaluated, dict):
        trainer.eval_dataset = {name: answers_of(f"eval_dataset[{name!r}]", one) for name, one in evaluated.items()}
    elif evaluated is not None:
        trainer.eval_dataset = answers_of("eval_dataset", evaluated)
    return trainer


def _arguments() -> set[str]:
    code = SFTTrainer.__init__.__code__
    return set(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])


def _set_tokens(tokenizer: Any, args: TrainingArguments) -> None:
    """Gives a tokenizer what the settings name of it: a chat template, and the tokens that end and fill texts."""
    wanted = {name: getattr(args, name) for name in ("eos_token", "pad_token") if getattr(args, name) is not None}
    if not wanted and args.chat_template_path is None:
        return
    if tokenizer is None:
        raise ConfigError("eos_token, pad_token, chat_template_path: need a tokenizer; give one to SFTTrainer")
    if (path := args.chat_template_path) is not None:
        tokenizer.chat_template = _template_at(path)
    for name, token in wanted.items():
        if token not in tokenizer.get_vocab():
            raise ConfigError(f"{name} = {token!r}: the vocabulary has no such token")
        setattr(tokenizer, name, token)


def _template_at(path: str) -> str:
    """The chat template of a file, or of the tokenizer in a folder or hub repository."""
    if Path(path).is_file():
        return Path(path).read_text(encoding="utf-8")
    template = Tokenizer.from_pretrained(path).chat_template
    if template is None:
        raise ConfigError(f"chat_template_path = {path!r}: this tokenizer has no chat template")
    return template


def _check_takes_compute_result(compute_metrics: Callable[..., Any]) -> None:
    """Refuses a function that batch_eval_metrics cannot call."""
    taken = inspect.signature(compute_metrics).parameters
    if "compute_result" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise ConfigError("compute_metrics: with batch_eval_metrics = True it must take an argument compute_result")


def _is_given(part: Any) -> bool:
    return part is not None


def _check_collator(collator: Any) -> None:
    """Refuses a collator that would do what the engine does not."""
    if collator is None:
        return
    name = getattr(collator, "__name__", type(collator).__name__)
    if name == "DataCollatorForCompletionOnlyLM":
        raise ConfigError(f"data_collator = {name}: use train_on_responses_only(trainer) instead")
    if name not in _PLAIN_COLLATORS:
        raise ConfigError(f"data_collator = {name}: not there yet; rows are put together without padding by the engine")
    if name == "DataCollatorForLanguageModeling" and getattr(collator, "mlm", False):
        raise ConfigError("data_collator.mlm = True: expected False: the model predicts the next token")
