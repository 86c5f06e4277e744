"""Runs our notebooks top to bottom, each in a folder and a kernel of its own, and says how long each took.

`run_notebooks.py [--keep DIR] [NOTEBOOK...]`: all of notebooks/ if none is named; `--keep` writes the executed ones.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CELL_SECONDS = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where executed notebooks go")
    options = parser.parse_args()
    paths = options.notebooks or sorted(NOTEBOOKS.glob("*.ipynb"))
    if not paths:
        print(f"{NOTEBOOKS}: no notebooks", file=sys.stderr)
        return 1
    failed = []
    for path in paths:
        notebook: Any = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            client = NotebookClient(
                notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}}
            )
            try:
                client.execute()
                problem = ""
            except CellExecutionError as error:
                problem = str(error)
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, options.keep / path.name)  # type: ignore[no-untyped-call]
        print(f"{path.name}: {'FAILED' if problem else 'passed'} in {time.monotonic() - started:.0f} s", flush=True)
        if problem:
            failed.append(path.name)
            print(problem, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
