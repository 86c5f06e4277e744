"""Reading datasets of every kind as columns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rustune import DataError
from rustune.data import iter_columns

ROWS = [{"text": f"t{i}", "n": i} for i in range(5)]
COLUMNS = {"text": [row["text"] for row in ROWS], "n": [row["n"] for row in ROWS]}


def gathered(dataset: object, batch: int = 2) -> tuple[dict[str, list[object]], list[int]]:
    whole: dict[str, list[object]] = {}
    sizes = []
    for part in iter_columns(dataset, batch):
        sizes.append(len(part["text"]))
        for name, values in part.items():
            assert type(values) is list
            whole.setdefault(name, []).extend(values)
    return whole, sizes


def test_lists_generators_and_columns() -> None:
    for dataset in (ROWS, (row for row in ROWS), COLUMNS):
        assert gathered(dataset) == (COLUMNS, [2, 2, 1])
    assert list(iter_columns([])) == []
    assert list(iter_columns([{"a": 1}, {"b": 2}])) == [{"a": [1, None], "b": [None, 2]}]


def test_files(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    assert gathered(lines) == (COLUMNS, [2, 2, 1])
    whole = tmp_path / "rows.json"
    whole.write_text(json.dumps(ROWS), encoding="utf-8")
    assert gathered(str(whole)) == (COLUMNS, [2, 2, 1])
    lines.write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        list(iter_columns(lines))
    lines.write_text('{"text": "a"}\n[1]\n', encoding="utf-8")
    with pytest.raises(DataError, match="row 1"):
        list(iter_columns(lines))
    with pytest.raises(FileNotFoundError):
        list(iter_columns(tmp_path / "gone.jsonl"))
    other = tmp_path / "rows.csv"
    other.write_text("a,b\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"\.jsonl"):
        list(iter_columns(other))


def test_parquet_without_pyarrow_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="pyarrow"):
        list(iter_columns(tmp_path / "rows.parquet"))


def test_what_is_no_dataset() -> None:
    for wrong in (3, b"x", None):
        with pytest.raises(DataError, match="expected"):
            list(iter_columns(wrong))
    with pytest.raises(DataError, match="different lengths"):
        list(iter_columns({"a": [1], "b": [1, 2]}))
    with pytest.raises(DataError, match="row 0"):
        list(iter_columns(["text"]))


def test_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    assert gathered(pandas.DataFrame(ROWS)) == (COLUMNS, [2, 2, 1])


def test_pyarrow(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(ROWS)
    assert gathered(table) == (COLUMNS, [2, 2, 1])
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert gathered(tmp_path / "rows.parquet") == (COLUMNS, [2, 2, 1])


def test_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(ROWS)
    assert gathered(made) == (COLUMNS, [2, 2, 1])
    assert gathered(made.with_format("numpy")) == (COLUMNS, [2, 2, 1])
    assert gathered(made.to_iterable_dataset()) == (COLUMNS, [2, 2, 1])
    with pytest.raises(DataError, match="train"):
        list(iter_columns(datasets.DatasetDict(train=made)))
