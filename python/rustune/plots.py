"""Pictures of runs and of data, drawn by matplotlib, which is imported when one is asked for."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rustune._native import ConfigError, DataError

_COLOURS: Final = ("#1a5cb3", "#d9690f", "#2a8a4a", "#a03aa8", "#b3261a", "#5f6b7a", "#0f8f9c", "#8a6d1a")
_PERCENTILE: Final = 90


def loss_curves(
    *runs: Any,
    labels: Iterable[str] | None = None,
    path: str | os.PathLike[str] | None = None,
    title: str | None = None,
    smooth: bool = True,
) -> Any:
    """Draws the training and validation losses of one or several runs.

    Args:
        *runs: Each a trainer, a log history, a `trainer_state.json`, or the folder of a run or checkpoint; or a single
            mapping of names to these.
        labels: Names of the runs.
        path: A file to write the picture to as well, whose ending says the format.
        title: A line above the picture.
        smooth: Whether to draw a running mean over twenty or more losses, which are then faint.

    Returns:
        A figure of matplotlib, which a notebook shows.

    Raises:
        ConfigError: If matplotlib is not installed.
        DataError: If a run logged no loss, or there are not as many labels as runs.
        FileNotFoundError: If a folder holds no `trainer_state.json`.

    Example:
        >>> loss_curves("outputs-r8", "outputs-r16", path="ranks.png")  # doctest: +SKIP
    """
    names, given = _named(runs, labels)
    figure = _figure()
    axes = figure.subplots()
    validated = False
    for at, (name, run) in enumerate(zip(names, given, strict=True)):
        colour = _COLOURS[at % len(_COLOURS)]
        steps, losses, validation = _losses(run, name)
        prefix = f"{name}: " if len(given) > 1 else ""
        if smooth and len(losses) >= 20:
            axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=1)
            axes.plot(steps, _running_mean(losses), color=colour, linewidth=2, label=f"{prefix}training")
        elif len(losses):
            marker = "o" if len(losses) == 1 else None
            axes.plot(steps, losses, color=colour, linewidth=1.6, marker=marker, label=f"{prefix}training")
        for also, (dataset, scores) in enumerate(validation.items(), start=1):
            validated = True
            axes.plot(
                sorted(scores),
                [scores[step] for step in sorted(scores)],
                color=colour if len(given) > 1 else _COLOURS[also % len(_COLOURS)],
                linestyle="--",
                marker="o",
                markersize=5,
                label=f"{prefix}{dataset}",
            )
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(title if title is not None else "Loss" if len(given) > 1 or validated else "Training loss")
    if len(given) > 1 or validated:
        axes.legend(frameon=False)
    return _finished(figure, axes, path)


def sequence_lengths(
    data: Any,
    *,
    max_length: int | None = None,
    path: str | os.PathLike[str] | None = None,
    title: str = "Lengths of the rows",
) -> Any:
    """Draws how long rows are, in tokens, with the 90th percentile marked.

    Args:
        data: A trainer, its `train_dataset`, rows with `input_ids`, or the lengths themselves.
        max_length: The length after which rows are cut, drawn as a line.
        path: A file to write the picture to as well, whose ending says the format.
        title: A line above the picture.

    Returns:
        A figure of matplotlib, which a notebook shows.

    Raises:
        ConfigError: If matplotlib is not installed.
        DataError: If there are no rows, or they have no tokens.

    Example:
        >>> sequence_lengths(trainer, max_length=2048)  # doctest: +SKIP
    """
    lengths = _lengths(data)
    figure = _figure()
    axes = figure.subplots()
    ninetieth = percentile(lengths)
    span = int(lengths.max()) - int(lengths.min()) + 1
    # Every bar covers the same whole number of lengths, so that none looks full for having one more.
    wide = max(1, -(-span // 50))
    edges = np.arange(int(lengths.min()), int(lengths.max()) + wide + 1, wide) - 0.5
    axes.hist(lengths, bins=edges.tolist(), color=_COLOURS[0], alpha=0.85, edgecolor="white", linewidth=0.4)
    axes.axvline(ninetieth, color=_COLOURS[1], linewidth=2, label=f"{_PERCENTILE} % of the rows: up to {ninetieth:,}")
    axes.axvline(
        float(np.median(lengths)), color=_COLOURS[5], linestyle=":", label=f"median: {np.median(lengths):,.0f}"
    )
    if max_length is not None:
        over = float((lengths > max_length).mean())
        label = f"cut after {max_length:,}: {100 * over:.1f} % of the rows"
        axes.axvline(max_length, color=_COLOURS[4], linestyle="--", label=label)
    axes.set_xlabel("tokens in a row")
    axes.set_ylabel("rows")
    axes.set_title(f"{title} ({len(lengths):,} rows, longest {int(lengths.max()):,} tokens)")
    axes.legend(frameon=False)
    return _finished(figure, axes, path)


def percentile(lengths: Iterable[int], percent: float = _PERCENTILE) -> int:
    """Returns the shortest of the lengths that at least so many percent of the rows do not exceed.

    Args:
        lengths: Tokens of each row.
        percent: Above 0, at most 100.

    Returns:
        One of the lengths.

    Raises:
        DataError: If there are none.

    Example:
        >>> percentile(range(1, 101))
        90
    """
    ordered = sorted(int(length) for length in lengths)
    if not ordered:
        raise DataError("lengths: expected at least one row")
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


def log_history(run: Any) -> list[dict[str, Any]]:
    """Finds the log entries of a run.

    Args:
        run: A trainer, a log history, a `trainer_state.json`, or the folder of a run or checkpoint: of a run without
            the file itself, the newest checkpoint's.

    Returns:
        The entries, in order.

    Raises:
        DataError: If it is none of these, or the file cannot be read as one.
        FileNotFoundError: If there is no such file.
    """
    state = getattr(run, "state", run)
    entries = getattr(state, "log_history", state)
    if isinstance(entries, (str, os.PathLike)):
        path = _state_file(Path(entries))
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: expected a trainer_state.json with a log_history") from None
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in entries):
        raise DataError(f"run: expected a trainer, a log history or a run's folder, got {type(run).__name__}")
    return [dict(entry) for entry in entries]


def _state_file(path: Path) -> Path:
    """The file with the log history, given itself or a folder."""
    if not path.is_dir():
        return path
    if (path / "trainer_state.json").is_file():
        return path / "trainer_state.json"
    steps = {
        int(found[1]): folder
        for folder in path.glob("checkpoint-*")
        if (found := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and (folder / "trainer_state.json").is_file()
    }
    if not steps:
        raise FileNotFoundError(2, "No trainer_state.json in this folder or its checkpoints", str(path))
    return steps[max(steps)] / "trainer_state.json"


def _named(runs: tuple[Any, ...], labels: Iterable[str] | None) -> tuple[list[str], list[Any]]:
    """Names and runs."""
    if len(runs) == 1 and isinstance(runs[0], Mapping):
        return [str(name) for name in runs[0]], list(runs[0].values())
    if not runs:
        raise DataError("runs: expected at least one")
    if labels is not None:
        names = [str(label) for label in labels]
        if len(names) != len(runs):
            raise DataError(f"labels: expected {len(runs)}, one for each run, got {len(names)}")
        return names, list(runs)
    names = [
        Path(run).parent.name
        if isinstance(run, (str, os.PathLike)) and Path(run).suffix == ".json"
        else Path(run).name
        if isinstance(run, (str, os.PathLike))
        else f"run {at}"
        for at, run in enumerate(runs, start=1)
    ]
    return names, list(runs)


def _losses(run: Any, name: str) -> tuple[list[int], NDArray[np.float64], dict[str, dict[int, float]]]:
    """Steps and training losses; and for `validation`, or each of several evaluation datasets, steps with losses."""
    # A resumed run logs a step again: the newer entry counts.
    entries = [entry for entry in log_history(run) if "step" in entry]
    training = {int(entry["step"]): float(entry["loss"]) for entry in entries if "loss" in entry}
    validation: dict[str, dict[int, float]] = {}
    has_one = any("eval_loss" in entry for entry in entries)
    for entry in entries:
        for key, value in entry.items():
            if key == "eval_loss" or (not has_one and key.startswith("eval_") and key.endswith("_loss")):
                dataset = key.removeprefix("eval_").removesuffix("loss").rstrip("_") or "validation"
                validation.setdefault(dataset, {})[int(entry["step"])] = float(value)
    if not training and not validation:
        raise DataError(f"{name}: nothing to draw: no loss was logged")
    steps = sorted(training)
    return steps, np.array([training[step] for step in steps]), validation


def _running_mean(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Averages each value with as many neighbours on either side, a twentieth of the curve, fewer at its ends."""
    place = np.arange(len(losses))
    reach = np.minimum(np.minimum(place, place[::-1]), len(losses) // 20)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    return np.asarray((sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1))


def _lengths(data: Any) -> NDArray[np.int64]:
    """Tokens of each row."""
    data = getattr(data, "train_dataset", data)
    if hasattr(data, "column_names") and "input_ids" in (data.column_names or []):
        found = [len(ids) for ids in data["input_ids"]]
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        found = []
        for row in data:
            if isinstance(row, Mapping) and "input_ids" in row:
                found.append(len(row["input_ids"]))
            elif isinstance(row, (int, np.integer)) and not isinstance(row, bool):
                found.append(int(row))
            else:
                raise DataError("data: expected a trainer, rows with input_ids, or lengths; tokenise the rows first")
    else:
        raise DataError(f"data: expected a trainer, rows with input_ids, or lengths, got {type(data).__name__}")
    if not found:
        raise DataError("data: expected at least one row")
    return np.array(found, dtype=np.int64)


def _figure() -> Any:
    """An empty figure that a notebook can show, outside pyplot: nothing is kept, and no window opens."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("drawing needs matplotlib, which is not installed; pip install matplotlib") from None

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            import io

            file = io.BytesIO()
            self.savefig(file, format="png", dpi=100)
            return file.getvalue()

    return Picture(figsize=(8, 4.5), layout="constrained")


def _finished(figure: Any, axes: Any, path: str | os.PathLike[str] | None) -> Any:
    """The figure without clutter, also written to the file if there is one."""
    from matplotlib.ticker import MaxNLocator

    axes.grid(axis="y", color="#e6e8eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(os.fspath(path), dpi=150)
    return figure
