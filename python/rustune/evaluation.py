"""What `compute_metrics` and `predict` are given: predictions by batches, never all logits of a dataset at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rustune import _native
from rustune._native import ConfigError, DataError
from rustune.batches import plain_array, tensors

# What fills up short rows, of labels and of predictions, as transformers does.
PADDING: Final = -100
# The most bytes of logits that are put into one array.
_MOST_BYTES: Final = 1 << 30


class EvalPrediction:
    """What `compute_metrics` is called with; unpacks into its parts.

    Args:
        predictions: Logits `[rows, longest, vocab]`, or what `preprocess_logits_for_metrics` made of them.
        label_ids: Labels `[rows, longest]`, filled up with -100; label `i` is what the token before it predicts.
        inputs: None.
        losses: None.

    Example:
        >>> predictions, labels = EvalPrediction([[1, 2]], [[1, 3]])
    """

    def __init__(self, predictions: Any, label_ids: Any, inputs: Any = None, losses: Any = None) -> None:
        self.predictions = predictions
        self.label_ids = label_ids
        self.inputs = inputs
        self.losses = losses
        self.elements = (predictions, label_ids, *(part for part in (inputs, losses) if part is not None))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.elements)

    def __getitem__(self, at: int) -> Any:
        return self.elements[at]


class PredictionOutput(NamedTuple):
    """What `predict` returns.

    Attributes:
        predictions: As of `EvalPrediction`.
        label_ids: As of `EvalPrediction`.
        metrics: The loss, the times, and what `compute_metrics` returned.
    """

    predictions: Any
    label_ids: NDArray[np.int64]
    metrics: dict[str, float]


class Logits:
    """The logits of every token of a dataset, `[rows, longest, vocab]` f32, computed batch by batch when asked for.

    Short rows are filled up with -100. `argmax`, iteration, numbers and slices of rows compute no more than a batch
    at a time; the whole becomes an array only where it is small.

    Args:
        model: The compiled model.
        rows: The compiled rows.
        batch_size: Rows that are computed at a time.
        positions: Which tokens of each row.
    """

    def __init__(
        self, model: _native.Model, rows: _native.Rows, batch_size: int, positions: slice = slice(None)
    ) -> None:
        self._model, self._rows, self._batch_size, self._positions = model, rows, batch_size, positions
        longest = len(range(rows.longest)[positions])
        self.shape = (len(rows), longest, model.vocab_size)
        self.ndim, self.dtype = 3, np.dtype(np.float32)
        self.size = math.prod(self.shape)
        self.nbytes = 4 * self.size

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self) -> Iterator[NDArray[np.float32]]:
        """Computes the logits batch by batch.

        Yields:
            Arrays `[up to batch_size, longest, vocab]`.
        """
        for start in range(0, len(self), self._batch_size):
            yield self._compute(start, min(start + self._batch_size, len(self)))

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        for batch in self.batches():
            yield from batch

    def __getitem__(self, key: Any) -> Any:
        trimmed = self._trimmed(key) if isinstance(key, tuple) else None
        if trimmed is not None:
            return trimmed
        if isinstance(key, (int, np.integer)):
            row = range(len(self))[key]
            return self._compute(row, row + 1)[0]
        if isinstance(key, slice):
            chosen = range(len(self))[key]
            _check_size(4 * len(chosen) * self.shape[1] * self.shape[2])
            parts = [self[row] for row in chosen]
            return np.stack(parts) if parts else np.empty((0, *self.shape[1:]), np.float32)
        return np.asarray(self)[key]

    def argmax(self, axis: int | None = None, out: Any = None) -> NDArray[np.int64]:
        """Returns the most likely token after each token.

        Args:
            axis: -1 or 2: that of the vocabulary.
            out: None.

        Returns:
            `[rows, longest]`.

        Raises:
            ConfigError: For another axis, or `out`.
        """
        if axis not in (-1, 2) or out is not None:
            raise ConfigError(f"argmax: axis = {axis}: expected -1, the vocabulary's")
        best = np.empty(self.shape[:2], np.int64)
        start = 0
        for batch in self.batches():
            best[start : start + len(batch)] = batch.argmax(-1)
            start += len(batch)
        return best

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        _check_size(self.nbytes)
        whole = np.concatenate(list(self.batches())) if len(self) else np.empty(self.shape, np.float32)
        return whole if dtype is None else whole.astype(dtype)

    def __repr__(self) -> str:
        return f"Logits(shape={self.shape}, computed by {self._batch_size} rows)"

    def _trimmed(self, key: tuple[Any, ...]) -> Logits | None:
        """`self[:, a:b]`, which need not be computed to be taken; None for other keys."""
        if not (len(key) in (2, 3) and all(isinstance(part, slice) for part in key)):
            return None
        if key[0] != slice(None) or key[2:] not in ((), (slice(None),)):
            return None
        chosen = range(self._rows.longest)[self._positions][key[1]]
        if chosen.step != 1:
            return None
        return Logits(self._model, self._rows, self._batch_size, slice(chosen.start, chosen.stop))

    def _compute(self, start: int, stop: int) -> NDArray[np.float32]:
        rows, _, _ = self._model.predict(self._rows, start, stop)
        return _filled(rows, self._rows.longest)[:, self._positions]


class Outcome(NamedTuple):
    """How an evaluation ended.

    Attributes:
        loss: Mean token loss.
        predictions: As of `EvalPrediction`; None if nobody asked for them.
        label_ids: As of `EvalPrediction`; None if nobody asked for them.
        metrics: What `compute_metrics` returned, as numbers.
    """

    loss: float
    predictions: Any
    label_ids: Any
    metrics: dict[str, float]


def run(
    model: _native.Model,
    rows: _native.Rows,
    batch_size: int,
    *,
    compute_metrics: Callable[..., Any] | None = None,
    preprocess: Callable[[Any, Any], Any] | None = None,
    by_batch: bool = False,
    keeps: bool = False,
) -> Outcome:
    """Evaluates rows; at no time are there more logits than of one batch.

    Args:
        model: The compiled model.
        rows: The compiled rows.
        batch_size: Rows of a batch.
        compute_metrics: Turns an `EvalPrediction` into names and numbers.
        preprocess: Turns a batch's logits and labels into what is kept; gets torch's tensors if torch is in use.
        by_batch: Whether `compute_metrics` is called after every batch, with `compute_result=True` after the last.
        keeps: Whether predictions are asked for.

    Returns:
        Loss, predictions and metrics.

    Raises:
        ConfigError: If `compute_metrics` returns no numbers by name.
        DataError: If no token has a label.
    """
    if compute_metrics is None and not keeps:
        return Outcome(model.evaluate(rows, batch_size, None)[0], None, None, {})
    if preprocess is None and (compute_metrics is None or not by_batch):
        loss, _ = model.evaluate(rows, batch_size, None)
        lazy = Logits(model, rows, batch_size)
        labels = _filled([np.asarray(rows[i]["labels"], np.int64) for i in range(len(rows))], rows.longest)
        computed = {} if compute_metrics is None else _numbers(compute_metrics(EvalPrediction(lazy, labels)))
        return Outcome(loss, lazy, labels, computed)
    return _in_one_pass(model, rows, batch_size, compute_metrics, preprocess, by_batch)


def _in_one_pass(
    model: _native.Model,
    rows: _native.Rows,
    batch_size: int,
    compute_metrics: Callable[..., Any] | None,
    preprocess: Callable[[Any, Any], Any] | None,
    by_batch: bool,
) -> Outcome:
    """Takes loss and predictions from the same forward of each batch."""
    total, trained = 0.0, 0
    kept: list[Any] = []
    kept_labels: list[NDArray[Any]] = []
    metrics: Any = {}
    for start in range(0, len(rows), batch_size):
        stop = min(start + batch_size, len(rows))
        logits, loss, count = model.predict(rows, start, stop)
        total, trained = total + loss, trained + count
        longest = max(len(row) for row in logits)
        labels = _filled([np.asarray(rows[i]["labels"], np.int64) for i in range(start, stop)], longest)
        made: Any = _filled(logits, longest)
        if preprocess is not None:
            made = _arrays(preprocess(*tensors(made, labels)))
        if by_batch and compute_metrics is not None:
            metrics = compute_metrics(EvalPrediction(made, labels), compute_result=stop == len(rows))
        else:
            kept.append(made)
            kept_labels.append(labels)
    if trained == 0:
        raise DataError("eval_dataset: no token has a label: there is nothing to evaluate")
    if not kept:
        return Outcome(total / trained, None, None, _numbers(metrics))
    predictions, label_ids = _joined(kept), _joined(kept_labels)
    if compute_metrics is not None:
        metrics = compute_metrics(EvalPrediction(predictions, label_ids))
    return Outcome(total / trained, predictions, label_ids, _numbers(metrics))


def _filled(rows: list[NDArray[Any]], longest: int) -> NDArray[Any]:
    """Rows of different lengths as one array, filled up with -100."""
    filled = np.full((len(rows), longest, *rows[0].shape[1:]), PADDING, rows[0].dtype)
    for into, row in zip(filled, rows, strict=True):
        into[: len(row)] = row
    return filled


def _joined(parts: list[Any]) -> Any:
    """Batches of arrays, or of tuples of them, as one; the second axis is filled up with -100."""
    first = parts[0]
    if isinstance(first, (tuple, list)):
        return tuple(_joined([part[i] for part in parts]) for i in range(len(first)))
    if first.ndim < 2:
        return np.concatenate([np.atleast_1d(part) for part in parts])
    longest = max(part.shape[1] for part in parts)
    joined = np.full((sum(len(part) for part in parts), longest, *first.shape[2:]), PADDING, first.dtype)
    start = 0
    for part in parts:
        joined[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return joined


def _arrays(made: Any) -> Any:
    """What a user's function made, as arrays."""
    if isinstance(made, (tuple, list)):
        return tuple(_arrays(part) for part in made)
    return np.asarray(plain_array(made))


def _numbers(metrics: Any) -> dict[str, float]:
    """What `compute_metrics` returned, as numbers by name."""
    if not isinstance(metrics, Mapping):
        raise ConfigError(f"compute_metrics returned {type(metrics).__name__}: expected a dict of names and numbers")
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"compute_metrics: {name} = {value!r}: expected a number") from None
    return numbers


def _check_size(nbytes: int) -> None:
    if nbytes > _MOST_BYTES:
        raise ConfigError(
            f"predictions: all logits in one array would take {nbytes / 2**30:,.1f} GiB; reduce them batch by batch: "
            "give SFTTrainer preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1), set "
            "batch_eval_metrics=True, or take np.argmax(predictions, axis=-1)"
        )
