"""Collators with transformers' names: rows in, one padded batch out.

`SFTTrainer` takes them and does not need them: the engine puts rows together without padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rustune._native import ConfigError
from rustune.batches import plain_array
from rustune.tokenizer import IGNORE, BatchEncoding, as_tokens

Rows = Sequence[Mapping[str, Any]]


@dataclass
class DataCollatorWithPadding:
    """Pads rows of ids to one length.

    Attributes:
        tokenizer: Ours or one of transformers; says what to pad with, and on which side.
        padding: True or "longest" for the longest row, "max_length" for `max_length`.
        max_length: Tokens.
        pad_to_multiple_of: Makes the padded length a multiple of this.
        return_tensors: Makes no difference: arrays are given.
    """

    tokenizer: Any
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __call__(self, features: Rows, return_tensors: str | None = None) -> BatchEncoding:
        """Makes a batch.

        Args:
            features: Rows with `input_ids`.
            return_tensors: Makes no difference.

        Returns:
            `input_ids` and `attention_mask`, `[batch, seq]`.

        Raises:
            DataError: If rows cannot be padded to one length.
        """
        rows = [_plain_row(row) for row in features]
        for row in rows:
            row.pop("labels", None)
        return _padded(self.tokenizer, rows, self.padding, self.max_length, self.pad_to_multiple_of)


@dataclass
class DataCollatorForSeq2Seq:
    """Pads rows of ids and of labels to one length.

    Attributes:
        tokenizer: As of `DataCollatorWithPadding`.
        model: Makes no difference.
        padding: As of `DataCollatorWithPadding`.
        max_length: Tokens.
        pad_to_multiple_of: Makes the padded length a multiple of this.
        label_pad_token_id: What labels are filled with.
        return_tensors: Makes no difference: arrays are given.
    """

    tokenizer: Any
    model: Any = None
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    label_pad_token_id: int = IGNORE
    return_tensors: str = "pt"

    def __call__(self, features: Rows, return_tensors: str | None = None) -> BatchEncoding:
        """Makes a batch.

        Args:
            features: Rows with `input_ids` and perhaps `labels`.
            return_tensors: Makes no difference.

        Returns:
            `input_ids`, `attention_mask` and, if the rows have them, `labels`, `[batch, seq]`.

        Raises:
            DataError: If rows cannot be padded to one length.
        """
        rows = [_plain_row(row) for row in features]
        labels = [row.pop("labels", None) for row in rows]
        batch = _padded(self.tokenizer, rows, self.padding, self.max_length, self.pad_to_multiple_of)
        if all(row is not None for row in labels):
            width = batch["input_ids"].shape[1]
            filled = np.full((len(rows), width), self.label_pad_token_id)
            left = self.tokenizer.padding_side == "left"
            for i, row in enumerate(labels):
                filled[i, slice(width - len(row), None) if left else slice(len(row))] = row
            batch["labels"] = as_tokens(filled)
        return batch


@dataclass
class DataCollatorForLanguageModeling:
    """Pads rows of ids; their labels are the ids themselves.

    Attributes:
        tokenizer: As of `DataCollatorWithPadding`.
        mlm: Whether tokens are hidden and guessed; models that predict the next token need False.
        mlm_probability: Share of hidden tokens.
        pad_to_multiple_of: Makes the padded length a multiple of this.
        return_tensors: Makes no difference: arrays are given.
    """

    tokenizer: Any
    mlm: bool = True
    mlm_probability: float = 0.15
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __call__(self, features: Rows, return_tensors: str | None = None) -> BatchEncoding:
        """Makes a batch.

        Args:
            features: Rows with `input_ids`.
            return_tensors: Makes no difference.

        Returns:
            `input_ids`, `attention_mask` and `labels`, `[batch, seq]`; labels are -100 where padded.

        Raises:
            ConfigError: If `mlm` is True.
            DataError: If rows cannot be padded to one length.
        """
        if self.mlm:
            raise ConfigError("data_collator.mlm = True: expected False: the model predicts the next token")
        rows = [_plain_row(row) for row in features]
        for row in rows:
            row.pop("labels", None)
        batch = _padded(self.tokenizer, rows, True, None, self.pad_to_multiple_of)
        labels = np.array(batch["input_ids"])
        labels[batch["attention_mask"] == 0] = IGNORE
        batch["labels"] = as_tokens(labels)
        return batch


def default_data_collator(features: Rows, return_tensors: str | None = None) -> BatchEncoding:
    """Makes a batch of rows that are of one length already.

    Args:
        features: Rows with equal columns.
        return_tensors: Makes no difference.

    Returns:
        Each column, `[batch, seq]`.

    Raises:
        ValueError: If lengths differ.
    """
    rows = [_plain_row(row) for row in features]
    return BatchEncoding({name: as_tokens([row[name] for row in rows]) for name in rows[0]})


def _padded(
    tokenizer: Any, rows: list[dict[str, Any]], padding: bool | str, max_length: int | None, multiple: int | None
) -> BatchEncoding:
    """Rows as one batch."""
    made = tokenizer.pad(rows, padding=padding, max_length=max_length, pad_to_multiple_of=multiple, return_tensors="np")
    return BatchEncoding({name: as_tokens(values) for name, values in made.items()})


def _plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose arrays and tensors are lists; columns of text, which nobody can pad, are left out."""
    plain = {name: plain_array(values) for name, values in row.items()}
    listed = {name: values.tolist() if hasattr(values, "tolist") else values for name, values in plain.items()}
    return {name: values for name, values in listed.items() if not isinstance(values, str) and values is not None}
