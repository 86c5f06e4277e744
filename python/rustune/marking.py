"""Rows as text with their trained parts marked: what a model will see, and what it will learn to say."""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Iterable, Mapping
from itertools import groupby, islice
from typing import Any, Final, NamedTuple

from rustune import _native
from rustune._native import ConfigError, DataError
from rustune.config import unknown_argument
from rustune.data import is_streamed, iter_columns
from rustune.models import native_tokenizer
from rustune.tokenizer import IGNORE

# Green behind trained text; without colours it stands in brackets no text uses.
_ANSI: Final = ("\x1b[30;42m", "\x1b[0m")
_PLAIN: Final = ("⟦", "⟧")
_HTML: Final = ('<mark style="background:#b7e4c7;color:#000">', "</mark>")


class Part(NamedTuple):
    """Neighbouring tokens that are all trained, or all not.

    Attributes:
        text: What they stand for.
        trained: Whether they have labels.
        n_tokens: How many there are.
    """

    text: str
    trained: bool
    n_tokens: int


def parts_of(tokenizer: Any, input_ids: Iterable[int], labels: Iterable[int]) -> list[Part]:
    """Splits a row where training begins and ends.

    Args:
        tokenizer: Ours or one of transformers.
        input_ids: Token ids, `[n_tokens]`.
        labels: -100 where a token is not trained, `[n_tokens]`. The first token's label does not count: nothing comes
            before it.

    Returns:
        The parts, in order. A character whose bytes lie in several parts shows as `�` in each.

    Raises:
        DataError: If the two have different lengths.
    """
    native = native_tokenizer(tokenizer)
    if native is None:
        raise ConfigError("preview: needs a tokenizer; preview(rows, tokenizer=tokenizer)")
    ids, marks = [int(i) for i in input_ids], [int(label) != IGNORE for label in labels]
    if len(ids) != len(marks):
        raise DataError(f"labels: expected {len(ids)} numbers, as input_ids has, got {len(marks)}")
    marks[:1] = [False] * len(marks[:1])
    text, starts = native.spell(ids)
    parts = []
    for trained, run in groupby(range(len(ids)), key=marks.__getitem__):
        at = list(run)
        piece = text[starts[at[0]] : starts[at[-1] + 1]].decode("utf-8", errors="replace")
        parts.append(Part(piece, trained, len(at)))
    return parts


class Preview:
    """Rows with their trained parts marked: HTML in Jupyter, colours in a terminal, ⟦brackets⟧ elsewhere.

    Args:
        rows: The parts of each row.

    Attributes:
        rows: The parts of each row.
    """

    def __init__(self, rows: list[list[Part]]) -> None:
        self.rows = rows

    def __str__(self) -> str:
        return self.to_text(_ANSI if sys.stdout.isatty() else _PLAIN)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Returns what Jupyter shows."""
        blocks = []
        for number, row in enumerate(self.rows):
            body = "".join(_marked(html.escape(part.text), part.trained, _HTML) for part in row)
            blocks.append(f'<div><b>{_title(number, row)}</b><pre style="white-space:pre-wrap">{body}</pre></div>')
        return "".join(blocks)

    def to_text(self, marks: tuple[str, str] = _PLAIN) -> str:
        """Returns the rows as text.

        Args:
            marks: What stands before and after a trained part.

        Returns:
            A title and the text of each row.
        """
        return "\n\n".join(
            f"{_title(number, row)}\n" + "".join(_marked(part.text, part.trained, marks) for part in row)
            for number, row in enumerate(self.rows)
        )


def preview(trainer_or_rows: Any, n: int = 3, *, tokenizer: Any = None, **options: Any) -> Preview:
    """Shows what will be trained: the text of the first rows, the trained parts marked.

    Args:
        trainer_or_rows: A trainer; or rows, tokenised or of any form a trainer takes.
        n: How many rows.
        tokenizer: For rows; a trainer brings its own.
        **options: For rows that are not tokenised yet: `dataset_text_field`, `max_length`, `completion_only_loss` and
            `assistant_only_loss`, as of `SFTConfig`.

    Returns:
        An object that shows itself in Jupyter; in a script, print it.

    Raises:
        ConfigError: If there is no tokenizer, or an option is unknown.
        DataError: If the rows cannot be read.

    Example:
        >>> print(preview(trainer, 2))  # doctest: +SKIP
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ConfigError(f"n = {n!r}: expected at least 1")
    rows = trainer_or_rows
    if hasattr(rows, "train_dataset") and hasattr(rows, "processing_class"):
        tokenizer, rows = rows.processing_class if tokenizer is None else tokenizer, rows.train_dataset
        if rows is None:
            raise DataError("train_dataset: not given, so there is nothing to show")
    if not hasattr(rows, "rows"):  # ours, tokenised, has them
        rows = _read(rows, n, tokenizer, options)
    elif options:
        raise ConfigError(f"{next(iter(options))}: these rows are tokenised already")
    return Preview([parts_of(tokenizer, row["input_ids"], row["labels"]) for row in islice(iter(rows), n)])


def _read(rows: Any, n: int, tokenizer: Any, options: Mapping[str, Any]) -> list[dict[str, list[int]]]:
    """The first rows of a dataset of any form, tokenised."""
    known = {"dataset_text_field": "text_field"}
    known |= {name: name for name in ("max_length", "completion_only_loss", "assistant_only_loss")}
    for name in options:
        if name not in known:
            raise unknown_argument("preview", name, known)
    settings = {known[name]: value for name, value in options.items() if value is not None}
    batches = iter_columns(rows, n if is_streamed(rows) else max(n, 100))
    made = _native.Rows.read(native_tokenizer(tokenizer), json.dumps({**settings, "max_rows": n}), batches)
    return [made[i] for i in range(len(made))]


def _title(number: int, row: list[Part]) -> str:
    trained = sum(part.n_tokens for part in row if part.trained)
    return f"Row {number}: {trained} of {sum(part.n_tokens for part in row)} tokens trained"


def _marked(text: str, trained: bool, marks: tuple[str, str]) -> str:
    """A part between its marks; a line break that is trained is shown, since it has no colour of its own."""
    return f"{marks[0]}{text.replace(chr(10), '↵' + chr(10))}{marks[1]}" if trained else text
