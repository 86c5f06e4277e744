"""Functions that end a generation, by transformers' protocol: `(input_ids, scores)` to which rows end here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rustune._native import ConfigError
from rustune.batches import plain_array, tensors


class StoppingCriteria:
    """The parent of criteria; override `__call__`.

    Example:
        >>> class AfterNewline(StoppingCriteria):
        ...     def __call__(self, input_ids, scores, **kwargs):
        ...         return input_ids[:, -1] == 198
    """

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Says which rows end.

        Args:
            input_ids: `[batch, seq]`: prompts and new tokens, as tensors where torch is in use, else numpy's arrays.
            scores: None.
            **kwargs: Nothing.

        Returns:
            True or False for all rows, or one for each.

        Raises:
            NotImplementedError: Unless it is overridden.
        """
        raise NotImplementedError("a StoppingCriteria needs a method __call__(self, input_ids, scores, **kwargs)")


class StoppingCriteriaList(list[Any]):
    """Several criteria; a row ends as soon as one of them says so."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> NDArray[np.bool_]:
        """Says which rows end.

        Args:
            input_ids: As of `StoppingCriteria`.
            scores: As of `StoppingCriteria`.
            **kwargs: As of `StoppingCriteria`.

        Returns:
            `[batch]`.

        Raises:
            ConfigError: If a criterion answers something else.
        """
        n_rows = len(input_ids)
        ends = np.zeros(n_rows, np.bool_)
        for criterion in self:
            ends |= _answer(criterion, criterion(input_ids, scores, **kwargs), n_rows)
        return ends


class MaxTimeCriteria(StoppingCriteria):
    """Ends all rows when a time is over.

    Args:
        max_time: Seconds.
        initial_timestamp: When the time began, in seconds of `time.time()`; now if not given.
    """

    def __init__(self, max_time: float, initial_timestamp: float | None = None) -> None:
        self.max_time = max_time
        self.initial_timestamp = time.time() if initial_timestamp is None else initial_timestamp

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> bool:
        """Says whether the time is over; arguments as of `StoppingCriteria`."""
        return time.time() - self.initial_timestamp > self.max_time


def criteria_of(asked: Any) -> StoppingCriteriaList:
    """Returns what `generate` was given as a list of criteria.

    Args:
        asked: A function, several, a `StoppingCriteriaList` of ours or of transformers, or None.

    Returns:
        The criteria; an empty list for None.

    Raises:
        ConfigError: If something in it cannot be called.
    """
    if asked is None:
        return StoppingCriteriaList()
    several = isinstance(asked, Iterable) and not isinstance(asked, (str, bytes))
    criteria = StoppingCriteriaList(asked if several else [asked])
    for criterion in criteria:
        if not callable(criterion):
            raise ConfigError(
                f"stopping_criteria = {criterion!r}: expected functions of input_ids and scores, or a list of them"
            )
    return criteria


class Steps:
    """Follows a generation step by step: feeds the streamer and asks the criteria.

    Args:
        prompts: `[prompts, seq]`, as they were given.
        n_each: Rows of each prompt.
        pad_token_id: What rows that are over are filled with.
        put: Takes each new token of a batch of one; None without a streamer.
        criteria: What may end rows.
    """

    def __init__(
        self,
        prompts: NDArray[np.int64],
        n_each: int,
        pad_token_id: int,
        put: Callable[[NDArray[np.int64]], Any] | None,
        criteria: StoppingCriteriaList,
    ) -> None:
        self._ids = prompts
        self._n_each = n_each
        self._pad = pad_token_id
        self._put = put
        self._criteria = criteria

    def __call__(self, tokens: list[int | None]) -> list[bool]:
        """Takes a step.

        Args:
            tokens: The new token of each row; None of rows that are over.

        Returns:
            Which rows end here; nothing if nobody was asked.
        """
        if self._put is not None:
            self._put(np.array(tokens, np.int64))
        if not self._criteria:
            return []
        if len(self._ids) < len(tokens):
            self._ids = np.repeat(self._ids, self._n_each, axis=0)
        column = np.array([self._pad if token is None else token for token in tokens], np.int64)
        self._ids = np.concatenate([self._ids, column[:, None]], axis=1)
        # A copy: what a criterion keeps or changes is its own.
        (ids,) = tensors(self._ids.copy())
        ends: list[bool] = self._criteria(ids, None).tolist()
        return ends


def _answer(criterion: Any, answer: Any, n_rows: int) -> NDArray[np.bool_]:
    """A criterion's answer for each row."""
    given = np.asarray(plain_array(answer))
    if given.dtype.kind not in "biu" or given.shape not in ((), (1,), (n_rows,)):
        name = getattr(criterion, "__name__", type(criterion).__name__)
        raise ConfigError(
            f"stopping_criteria: {name} returned {answer!r}: expected True or False, or one for each of {n_rows} rows"
        )
    return np.broadcast_to(given.astype(np.bool_), (n_rows,))
