"""Reading datasets of any kind batch by batch, as columns."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
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
            `IterableDataset`, a pandas DataFrame, a pyarrow Table, or the path of a .jsonl, .json or .parquet file.
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
        for part in dataset.to_batches(max_chunksize=batch):
            if part.num_rows:
                yield part.to_pydict()
    elif hasattr(dataset, "iloc") and hasattr(dataset, "columns"):  # pandas
        for start in range(0, len(dataset), batch):
            part = dataset.iloc[start : start + batch]
            yield {str(name): part[name].tolist() for name in part.columns}
    elif hasattr(dataset, "iter") and hasattr(dataset, "column_names"):  # datasets
        for part in dataset.iter(batch_size=batch):
            yield {name: _listed(values) for name, values in part.items()}
    elif isinstance(dataset, Iterable) and not isinstance(dataset, (bytes, bytearray)):
        yield from _rows(iter(dataset), batch, "dataset")
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):  # torch's map-style datasets
        yield from _rows((dataset[i] for i in range(len(dataset))), batch, "dataset")
    else:
        raise DataError(
            f"dataset: expected a list of dicts, a datasets.Dataset, pandas, pyarrow or a path, "
            f"got {type(dataset).__name__}"
        )


def _listed(values: Any) -> list[Any]:
    """A column as a list, whatever format the dataset was set to."""
    return list(values.tolist()) if hasattr(values, "tolist") else list(values)


def _mapping(columns: Mapping[str, Any], batch: int) -> Iterator[Columns]:
    """A dict of columns; a dict of splits is asked back."""
    if any(hasattr(value, "column_names") for value in columns.values()):
        raise DataError(f"dataset: has the splits {', '.join(map(str, columns))}; give one of them")
    plain = {str(name): _listed(values) for name, values in columns.items()}
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
