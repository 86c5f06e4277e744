"""Reading datasets of any kind batch by batch, as columns; telling streams; applying formatting functions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rustune._native import DataError

Columns = dict[str, list[Any]]
"""A batch: every column's values, in the order of the rows."""


def iter_columns(dataset: Any, batch: int = 1000) -> Iterator[Columns]:
    """Reads a dataset batch by batch, never row by row where its library can do better.

    Args:
        dataset: A list of dicts (or any iterable of them), a dict of columns, a `datasets.Dataset` or
            `IterableDataset`, a pandas DataFrame, a pyarrow Table, RecordBatch or Dataset, or the path of a .jsonl,
            .json or .parquet file.
        batch: Rows a batch.

    Yields:
        Columns of equal lengths; a column that a row lacks holds None there.

    Raises:
        DataError: If it is none of these, or a row makes no sense.
        FileNotFoundError: If there is no such file.

    Example:
        >>> list(iter_columns([{"text": "a"}, {"text": "b"}], batch=1))
        [{'text': ['a']}, {'text': ['b']}]
    """
    if isinstance(dataset, (str, os.PathLike)):
        yield from _file(Path(dataset), batch)
    elif isinstance(dataset, Mapping):
        yield from _mapping(dataset, batch)
    elif hasattr(dataset, "to_batches") and hasattr(dataset, "schema"):  # pyarrow
        # A table cuts itself up; a dataset of files reads batches.
        size = "max_chunksize" if hasattr(dataset, "num_rows") else "batch_size"
        for part in dataset.to_batches(**{size: batch}):
            if part.num_rows:
                yield part.to_pydict()
    elif hasattr(dataset, "to_pydict") and hasattr(dataset, "schema"):  # pyarrow's RecordBatch
        yield from _mapping(dataset.to_pydict(), batch)
    elif hasattr(dataset, "iloc") and hasattr(dataset, "columns"):  # pandas
        for start in range(0, len(dataset), batch):
            part = dataset.iloc[start : start + batch]
            # Missing values have several forms there (NaN, NA, NaT), which none of its rows may become text of.
            yield {str(name): _without_na(part[name]) for name in part.columns}
    elif hasattr(dataset, "iter") and hasattr(dataset, "column_names"):  # datasets
        for part in dataset.iter(batch_size=batch):
            yield {name: listed(values) for name, values in part.items()}
    elif isinstance(dataset, Iterable) and not isinstance(dataset, (bytes, bytearray)):
        yield from _rows(iter(dataset), batch, "dataset")
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):  # torch's map-style datasets
        yield from _rows((dataset[i] for i in range(len(dataset))), batch, "dataset")
    else:
        raise DataError(
            f"dataset: expected a list of dicts, a datasets.Dataset, pandas, pyarrow or a path, "
            f"got {type(dataset).__name__}"
        )


def is_streamed(dataset: Any) -> bool:
    """Tells whether a dataset can only be read from its beginning and has no length: an `IterableDataset`.

    Args:
        dataset: What `iter_columns` takes.

    Returns:
        Whether a run over it needs `max_steps`.

    Example:
        >>> is_streamed([{"text": "a"}])
        False
    """
    return hasattr(dataset, "column_names") and hasattr(dataset, "take") and not hasattr(dataset, "__len__")


def is_several(dataset: Any) -> bool:
    """Tells whether a mapping names datasets, as `eval_dataset` may, rather than columns of one.

    Args:
        dataset: Anything.

    Returns:
        Whether it is a mapping and each of its values is a dataset: a list of rows, a path, or an object of a library.

    Example:
        >>> is_several({"short": [{"text": "a"}]}), is_several({"text": ["a"]})
        (True, False)
    """

    def is_dataset(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(isinstance(row, Mapping) for row in value)
        return isinstance(value, (str, os.PathLike, Mapping)) or any(
            hasattr(value, name) for name in ("column_names", "schema", "columns")
        )

    return isinstance(dataset, Mapping) and bool(dataset) and all(map(is_dataset, dataset.values()))


def formatted(batches: Iterable[Columns], function: Callable[[Any], Any]) -> Iterator[Columns]:
    """Applies a user's formatting function, which may take a row or a batch of columns: tried out once.

    Args:
        batches: Columns, as of `iter_columns`.
        function: Gives a text, or a list of texts; or a dict that holds them as `text`.

    Yields:
        The texts as the column `text`. A function of rows may give several texts for one.

    Raises:
        DataError: If it gives something else.

    Example:
        >>> list(formatted([{"q": ["1", "2"]}], lambda row: row["q"] + "!"))
        [{'text': ['1!', '2!']}]
    """
    if not callable(function):
        raise DataError(f"formatting_func = {function!r}: expected a function of a row or of a batch of columns")
    by_batch: bool | None = None
    for batch in batches:
        n_rows = len(next(iter(batch.values()), []))
        if n_rows == 0:
            continue
        if by_batch is None:
            by_batch = _takes_batches(function, batch)
        rows = [batch] if by_batch else ({name: column[i] for name, column in batch.items()} for i in range(n_rows))
        texts = [text for row in rows for text in _texts_of(function(row))]
        if by_batch and len(texts) != n_rows:
            raise DataError(f"formatting_func: expected a text for each row, got {len(texts)} texts for {n_rows} rows")
        yield {"text": texts}


def _texts_of(made: Any) -> list[str]:
    """What a formatting function gave, as texts."""
    if isinstance(made, Mapping) and "text" in made:
        made = made["text"]
    texts = [made] if isinstance(made, str) else list(made) if isinstance(made, (list, tuple)) else [made]
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"formatting_func: expected a text for each row, got {type(text).__name__}")
    return texts


def _takes_batches(function: Callable[[Any], Any], batch: Columns) -> bool:
    """Whether the function makes as many texts as it is given rows as columns."""
    # Two numbers of rows, because a function of rows may always give two texts.
    for n_rows in (2, 3):
        columns = {name: [column[0], column[-1], column[0]][:n_rows] for name, column in batch.items()}
        try:
            made = function(columns)
            if isinstance(made, str) or len(_texts_of(made)) != n_rows:
                return False
        except Exception:  # whatever a function of the user's raises when it is given what it does not take
            return False
    return True


def listed(values: Any) -> list[Any]:
    """A column as a list, whatever format the dataset was set to.

    Args:
        values: A list, an array, a tensor or a lazy column.

    Returns:
        The same values.
    """
    return list(values.tolist()) if hasattr(values, "tolist") else list(values)


def _without_na(column: Any) -> list[Any]:
    """A pandas column as a list, None where a value is missing."""
    return [None if missing is True else value for value, missing in zip(column.tolist(), column.isna(), strict=True)]


def _mapping(columns: Mapping[str, Any], batch: int) -> Iterator[Columns]:
    """A dict of columns; a dict of splits is asked back."""
    if any(hasattr(value, "column_names") for value in columns.values()):
        raise DataError(f"dataset: has the splits {', '.join(map(str, columns))}; give one of them")
    for name, values in columns.items():
        if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
            raise DataError(f"dataset: column {name!r}: expected a list of values, got {type(values).__name__}")
    plain = {str(name): listed(values) for name, values in columns.items()}
    lengths = {name: len(values) for name, values in plain.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"dataset: columns of different lengths: {lengths}")
    for start in range(0, max(lengths.values(), default=0), batch):
        yield {name: values[start : start + batch] for name, values in plain.items()}


def _rows(rows: Iterator[Any], batch: int, source: str) -> Iterator[Columns]:
    """Rows gathered into columns; every batch has all columns seen so far."""
    names: dict[str, None] = {}
    first = 0
    while part := list(islice(rows, batch)):
        for i, row in enumerate(part):
            if not isinstance(row, Mapping):
                raise DataError(f"{source}, row {first + i}: expected a dict of columns, got {type(row).__name__}")
            names.update(dict.fromkeys(row))
        yield {str(name): [row.get(name) for row in part] for name in names}
        first += len(part)


def _file(path: Path, batch: int) -> Iterator[Columns]:
    """The rows of a file, by its ending."""
    if not path.exists():
        raise FileNotFoundError(2, "No such dataset file", str(path))
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        yield from _rows(_lines(path), batch, str(path))
    elif kind == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not JSON: {error}") from None
        if not isinstance(rows, list):
            raise DataError(f"{path}: expected a list of rows, got {type(rows).__name__}")
        yield from _rows(iter(rows), batch, str(path))
    elif kind == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise DataError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow, or use .jsonl") from None
        for part in parquet.ParquetFile(path).iter_batches(batch_size=batch):
            yield part.to_pydict()
    else:
        raise DataError(f"{path}: expected a .jsonl, .json or .parquet file")


def _lines(path: Path) -> Iterator[Any]:
    """The rows of a .jsonl file; blank lines are none."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}, line {number}: not JSON: {error}") from None
