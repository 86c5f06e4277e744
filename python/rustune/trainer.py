"""`SFTTrainer`: rows in, a trained adapter out; the loop itself runs in Rust."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from rustune import _native, banner, evaluation, hub, progress, reporting
from rustune._native import ConfigError, DataError, HubError
from rustune.callbacks import CallbackHandler, Observer, TrainerControl, TrainerState
from rustune.config import SFTConfig, TrainingArguments, settings_from, unknown_argument
from rustune.data import formatted, is_streamed, iter_columns
from rustune.model import Model, checkpointing_name, native_tokenizer

# Collators that only pad and copy ids to labels: rows are put together in the engine, which does neither need.
_PLAIN_COLLATORS: Final = (
    "DataCollatorForSeq2Seq",
    "DataCollatorForLanguageModeling",
    "DataCollatorWithPadding",
    "DefaultDataCollator",
    "default_data_collator",
)
# Arguments of other trainers' versions that only pass when they ask for nothing.
_MISSING: Final = (
    "compute_loss_func",
    "dataset_kwargs",
    "eval_packing",
    "formatting_kwargs",
    "infinite",
    "model_init",
    "model_init_kwargs",
    "num_of_sequences",
    "optimizer_cls_and_kwargs",
)


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
        model: From `FastLanguageModel`.
        args: `SFTConfig` or `TrainingArguments`, ours or transformers'.
        tokenizer: Ours or transformers'; the one the model was loaded with if not given.
        processing_class: Another name of `tokenizer`.
        train_dataset: `datasets`, lists of dicts, pandas, pyarrow, or a path to .jsonl or .parquet. Of an
            `IterableDataset` as many rows are read, here and at once, as `max_steps` need; they keep their order.
        eval_dataset: The same, for evaluation; an `IterableDataset` is read to its end.
        dataset_text_field: The column of plain text; `args.dataset_text_field` if not given.
        max_seq_length: Longest row in tokens; `args.max_length`, then the model's, if not given.
        data_collator: A collator of transformers; it changes nothing.
        dataset_num_proc: Makes no difference: all threads tokenise.
        packing: Put rows together to packed rows of up to `max_seq_length` tokens, as `args.packing`.
        formatting_func: Turns a row, or a batch of columns, into a text or a list of them.
        peft_config: A `LoraConfig` for a model that has no adapter yet.
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
        model: Model,
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
        compute_metrics: Callable[..., Any] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        neftune_noise_alpha: float | None = None,
        callbacks: Iterable[Any] | None = None,
        optimizers: Any = (None, None),
        **unknown: Any,
    ) -> None:
        for name, value in unknown.items():
            if name not in _MISSING:
                raise unknown_argument("SFTTrainer", name, _arguments())
            if value:
                raise ConfigError(f"{name}: not there yet; leave it out")
        if not isinstance(model, Model):
            raise ConfigError(
                f"model = {type(model).__name__}: expected what FastLanguageModel.from_pretrained returns"
            )
        for name, function in (
            ("compute_metrics", compute_metrics),
            ("preprocess_logits_for_metrics", preprocess_logits_for_metrics),
        ):
            if function is not None and not callable(function):
                raise ConfigError(f"{name} = {function!r}: expected a function")
        if any(part is not None for part in optimizers or ()):
            raise ConfigError("optimizers: not there yet; use args.optim and args.lr_scheduler_type")
        _check_collator(data_collator)
        if peft_config is not None:
            # Here and not above: its module knows this one.
            from rustune.peft_names import get_peft_model

            model = get_peft_model(model, peft_config)
        self.model = model
        self.args = settings_from(args)
        if packing is not None and packing != self.args.packing:
            self.args = replace(self.args, packing=bool(packing))
        if neftune_noise_alpha is not None:
            self.args.neftune_noise_alpha = neftune_noise_alpha
            self.args.engine_options()
        self.compute_metrics = compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        if self.args.batch_eval_metrics and compute_metrics is not None:
            _check_takes_compute_result(compute_metrics)
        chosen = tokenizer if processing_class is None else processing_class
        self.processing_class: Any = model.tokenizer if chosen is None else chosen
        self._native_tokenizer = native_tokenizer(self.processing_class)
        length = self.args.max_length if max_seq_length is None else max_seq_length
        self.max_seq_length: int = model.max_seq_length if length is None else int(length)
        self._text_field = dataset_text_field or self.args.dataset_text_field
        self._formatting_func = formatting_func
        self._keeps_order = False
        self.train_dataset = self._read("train_dataset", train_dataset)
        self.eval_dataset = self._read("eval_dataset", eval_dataset)
        self.state = TrainerState()
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

    def train(self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None) -> TrainOutput:
        """Trains.

        Args:
            resume_from_checkpoint: A checkpoint's folder to go on from, or True for the newest complete one in
                `output_dir`.

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
        rows = self.train_dataset.rows
        plan = self.args.plan(rows.n_packed(self.max_seq_length) if self.args.packing else len(rows))
        self._begin(plan, resume)
        shown = progress.choose(self.args.disable_tqdm)
        shown.banner(*banner.texts(self, plan))
        eval_rows = None if self.eval_dataset is None else self.eval_dataset.rows
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
            eval_dataset: Rows; those the trainer was made with if not given.
            ignore_keys: Makes no difference.
            metric_key_prefix: What the names of the metrics begin with.

        Returns:
            The mean token loss, what `compute_metrics` returns, the time it took, and where training stands.

        Raises:
            DataError: If there are no rows, or no token has a label.
        """
        dataset = self.eval_dataset if eval_dataset is None else self._read("eval_dataset", eval_dataset)
        if dataset is None:
            raise DataError("eval_dataset: not given; pass it here or to SFTTrainer")
        metrics = {**self._score(dataset, metric_key_prefix)[0], "epoch": self.state.epoch}
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

    def hyperparameter_search(self, *_: Any, **__: Any) -> None:
        """Says that there is no search.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "hyperparameter_search: there is none; train with each SFTConfig in a loop, on a model loaded anew, and "
            "compare what evaluate() returns"
        )

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
        args = self.args
        known = {name: options[name] for name in ("token", "revision", "private", "create_pr") if name in options}
        settings = {"token": args.hub_token, "private": args.hub_private_repo, **known}
        with tempfile.TemporaryDirectory() as folder:
            self.save_model(folder)
            return hub.upload_folder(
                folder,
                args.hub_model_id or Path(args.output_dir).resolve().name,
                commit_message=commit_message or "End of training",
                **settings,
            )

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
        }
        made = TokenisedDataset(_native.Rows.read(self._native_tokenizer, json.dumps(options), batches))
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

    def _evaluator(self) -> Callable[[], dict[str, float]] | None:
        """What evaluates in the course of a run, if the engine's own evaluation is not enough."""
        dataset = self.eval_dataset
        if self.compute_metrics is None or self.args.prediction_loss_only or dataset is None:
            return None
        return lambda: self._score(dataset, "eval")[0]

    def _upload_step(self) -> None:
        """Uploads what a checkpoint holds; a hub that fails does not end the run."""
        try:
            self.push_to_hub(f"Training in progress, step {self.state.global_step}")
        except (HubError, OSError) as error:
            warnings.warn(f"push_to_hub: step {self.state.global_step} was not uploaded: {error}", stacklevel=2)

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
            elif name == "save" and self.args.push_to_hub and self.args.hub_strategy == "every_save":
                self._upload_step()

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
    if return_function:
        raise ConfigError("return_function = True: not there yet; give a trainer")
    if not isinstance(trainer, SFTTrainer):
        raise ConfigError(f"trainer = {type(trainer).__name__}: expected an SFTTrainer")
    native = native_tokenizer(trainer.processing_class if tokenizer is None else tokenizer)
    if native is None:
        raise ConfigError("train_on_responses_only: needs a tokenizer; give one to SFTTrainer")
    for name in ("train_dataset", "eval_dataset"):
        dataset: TokenisedDataset | None = getattr(trainer, name)
        if dataset is None:
            continue
        rows, _, _, dropped = dataset.rows.train_on_responses_only(native, instruction_part, response_part)
        if dropped:
            warnings.warn(f"{name}: {dropped} of {len(dataset)} rows have no answer and are left out", stacklevel=2)
        setattr(trainer, name, TokenisedDataset(rows))
    return trainer


def _arguments() -> set[str]:
    code = SFTTrainer.__init__.__code__
    return set(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])


def _check_takes_compute_result(compute_metrics: Callable[..., Any]) -> None:
    """Refuses a function that batch_eval_metrics cannot call."""
    taken = inspect.signature(compute_metrics).parameters
    if "compute_result" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise ConfigError("compute_metrics: with batch_eval_metrics = True it must take an argument compute_result")


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
