"""Batches of token ids as users give them: lists, arrays, tensors of torch, a tokenizer's whole output."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rustune._native import DataError


class Batch:
    """Token ids with their mask, as given.

    Attributes:
        ids: `[batch, seq]`.
        mask: True where a token is real, `[batch, seq]`.
    """

    def __init__(self, input_ids: Any, attention_mask: Any, pad_token_id: int | None, pad_is_eos: bool) -> None:
        if isinstance(input_ids, Mapping) or (hasattr(input_ids, "input_ids") and not hasattr(input_ids, "shape")):
            attention_mask = _field(input_ids, "attention_mask") if attention_mask is None else attention_mask
            input_ids = _field(input_ids, "input_ids")
        self.ids, present = rectangle("input_ids", input_ids, pad_token_id or 0)
        if attention_mask is not None:
            mask, _ = rectangle("attention_mask", attention_mask, 0)
            if mask.shape != self.ids.shape:
                raise DataError(f"attention_mask: expected the shape {self.ids.shape} of input_ids, got {mask.shape}")
            self.mask = (mask != 0) & present
        elif pad_token_id is None or pad_is_eos:
            self.mask = present
        else:
            # A pad token stands for nothing, so a row of several that holds one is a padded row.
            self.mask = present & (self.ids != pad_token_id)
        for row in np.flatnonzero(~self.mask.any(axis=1)):
            raise DataError(f"row {row} of input_ids: has no token that is not padding")
        real = self.ids[self.mask]
        if real.min() < 0 or real.max() >= 2**32:
            raise DataError(f"input_ids: holds {real.min() if real.min() < 0 else real.max()}: expected ids of tokens")

    def rows(self, values: NDArray[np.int64] | None = None) -> list[list[int]]:
        """The real entries of each row."""
        values = self.ids if values is None else values
        return [row[mask].tolist() for row, mask in zip(values, self.mask, strict=True)]


def _field(batch: Any, name: str) -> Any:
    """A field of a tokenizer's output, or None."""
    return batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)


def plain_array(value: Any) -> Any:
    """A torch tensor as a numpy array, without importing torch; other things as they are."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value


def tensors(*arrays: NDArray[Any]) -> tuple[Any, ...]:
    """Returns arrays as torch's tensors, if torch is in use: functions written for transformers call it.

    Args:
        *arrays: Of numpy.

    Returns:
        The same numbers.
    """
    from_numpy = getattr(sys.modules.get("torch"), "from_numpy", None)
    return arrays if from_numpy is None else tuple(from_numpy(array) for array in arrays)


def rectangle(name: str, value: Any, fill: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Whole numbers `[batch, seq]`, and where they were given: shorter rows are filled on the left."""
    value = plain_array(value)
    if value is None:
        raise DataError(f"{name}: not given")
    if isinstance(value, (list, tuple)):
        value = [plain_array(row) for row in value]
        if value and not isinstance(value[0], (int, np.integer)):
            rows = [np.asarray(row) for row in value]
            if any(row.ndim != 1 for row in rows):
                return rectangle(name, np.asarray(value), fill)
            width = max(len(row) for row in rows)
            ids = np.full((len(rows), width), fill, np.int64)
            present = np.zeros((len(rows), width), np.bool_)
            for at, row in enumerate(rows):
                _whole(name, row)
                ids[at, width - len(row) :] = row
                present[at, width - len(row) :] = True
            return ids, present
    array = np.asarray(value)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.size == 0:
        raise DataError(f"{name}: expected ids of shape [batch, seq], got shape {list(array.shape)}")
    _whole(name, array)
    return array.astype(np.int64), np.ones(array.shape, np.bool_)


def _whole(name: str, array: NDArray[Any]) -> None:
    # A mask made by np.ones is of floats.
    if array.size and array.dtype.kind not in ("iubf" if name == "attention_mask" else "iub"):
        raise DataError(f"{name}: expected whole numbers, got {array.dtype}")
