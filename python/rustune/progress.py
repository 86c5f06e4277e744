"""How a run is shown: a bar in a terminal, a live table in a notebook, plain lines elsewhere."""

from __future__ import annotations

import html
import importlib
import shutil
import sys
import time
from typing import Any, TextIO

_REDRAW_SECONDS = 0.1
_REDRAW_NOTEBOOK_SECONDS = 0.5
# A long table is sent to the browser less often: half a second more for each so many rows.
_ROWS_PER_REDRAW = 200
# The expected time is told once, after so many steps or seconds, and only of runs that take longer than a glance.
_MEASURED_STEPS = 3
_MEASURED_SECONDS = 10.0
_SHORT_SECONDS = 10.0
# What an evaluation's entry holds beside its results.
_NO_RESULTS = ("_runtime", "_samples_per_second", "_steps_per_second")


def in_notebook() -> bool:
    """Tells whether this is a Jupyter or Colab cell, without importing IPython.

    Returns:
        Whether rich output can be displayed.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return shell is not None and hasattr(shell, "kernel")


def duration(seconds: float) -> str:
    """Writes a duration.

    Args:
        seconds: Its length.

    Returns:
        `m:ss` or `h:mm:ss`.
    """
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Shows nothing; the others show more.

    Attributes:
        step: Finished steps.
        max_steps: Steps of the run.
        tokens: Tokens trained on since the start.
        loss: Of the newest log entry.
    """

    def __init__(self) -> None:
        self.step = 0
        self.max_steps = 0
        self.tokens = 0
        self.loss: float | None = None
        self._first_step = 0
        self._expected = False
        self._started = time.monotonic()

    def banner(self, text: str, page: str | None = None) -> None:
        """Says what is about to be done.

        Args:
            text: One or more lines.
            page: The same as HTML, for displays that can show it.
        """

    def begin(self, step: int, max_steps: int) -> None:
        """Starts the clock.

        Args:
            step: Steps already made, in a run that is taken up again.
            max_steps: Steps of the run.
        """
        self.step = self._first_step = step
        self.max_steps = max_steps
        self.tokens = 0
        self._expected = False
        self._started = time.monotonic()
        self.draw()

    def advance(self, step: int, tokens: int) -> None:
        """Notes a finished step or part of a step.

        Args:
            step: Finished steps.
            tokens: Tokens trained on since `begin`.
        """
        self.step, self.tokens = step, tokens
        self._tell_expected()
        self.draw()

    def log(self, entry: dict[str, Any]) -> None:
        """Shows a log entry.

        Args:
            entry: With step and loss.
        """
        self.loss = entry.get("loss", self.loss)

    def evaluation(self, entry: dict[str, Any]) -> None:
        """Shows an evaluation.

        Args:
            entry: With step and eval_loss.
        """

    def expected(self, text: str) -> None:
        """Shows how long the run will take, once that can be told from its first steps.

        Args:
            text: A line.
        """

    def draw(self) -> None:
        """Shows where the run stands, if it is time to."""

    def close(self) -> None:
        """Ends the display, whatever became of the run."""

    def rate(self) -> str:
        """Returns tokens per second and the time left, or of a finished run the time it took, as text."""
        elapsed = time.monotonic() - self._started
        done = self.step - self._first_step
        if done <= 0 or elapsed <= 0:
            return ""
        speed = f"{self.tokens / elapsed:,.0f} tok/s"
        if self.step >= self.max_steps:
            return f"{speed}  in {duration(elapsed)}"
        return f"{speed}  ETA {duration(elapsed / done * (self.max_steps - self.step))}"

    def _tell_expected(self) -> None:
        elapsed = time.monotonic() - self._started
        done = self.step - self._first_step
        if self._expected or not done or (done < _MEASURED_STEPS and elapsed < _MEASURED_SECONDS):
            return
        self._expected = True
        whole = elapsed / done * (self.max_steps - self._first_step)
        if whole >= _SHORT_SECONDS:
            steps = f"the first {done} steps" if done > 1 else "the first step"
            self.expected(
                f"expected time: {duration(whole)}, {self.tokens / elapsed:,.0f} tokens/s (measured over {steps})"
            )


class Lines(Progress):
    """A line for each log entry: for files and pipes.

    Args:
        stream: Where to.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream if stream is not None else sys.stderr

    def banner(self, text: str, page: str | None = None) -> None:
        """Writes the text."""
        self._line(text)

    def log(self, entry: dict[str, Any]) -> None:
        """Writes the entry on a line."""
        super().log(entry)
        parts = [f"step {entry.get('step', self.step)}/{self.max_steps}"]
        parts += [f"{key} {entry[key]:.4f}" for key in ("loss", "grad_norm") if key in entry]
        parts += [f"lr {entry['learning_rate']:.2e}"] if "learning_rate" in entry else []
        self._line("  ".join([*parts, self.rate()]).rstrip())

    def evaluation(self, entry: dict[str, Any]) -> None:
        """Writes the evaluation on a line."""
        found = [f"{name} {value:.4f}" for name, value in _results(entry).items()]
        if found:
            self._line("  ".join([f"step {entry.get('step', self.step)}/{self.max_steps}", *found]))

    def expected(self, text: str) -> None:
        """Writes the line."""
        self._line(text)

    def _line(self, text: str) -> None:
        self._stream.write(f"{_encodable(text, self._stream)}\n")
        self._stream.flush()


class Bar(Lines):
    """A bar that is redrawn in place: for terminals."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._drawn = 0.0
        self._open = False

    def log(self, entry: dict[str, Any]) -> None:
        """Puts the loss into the bar."""
        Progress.log(self, entry)
        self.draw()

    def draw(self) -> None:
        """Redraws the bar."""
        now = time.monotonic()
        if not self.max_steps or (now - self._drawn < _REDRAW_SECONDS and self.step < self.max_steps):
            return
        self._drawn = now
        self._draw()

    def close(self) -> None:
        """Leaves the bar as it is and goes to a new line."""
        if self._open:
            self._draw()
            self._stream.write("\n")
            self._stream.flush()
            self._open = False

    def _draw(self) -> None:
        after = f" {self.step}/{self.max_steps}"
        after += "" if self.loss is None else f"  loss {self.loss:.4f}"
        after += f"  {self.rate()}".rstrip()
        columns = shutil.get_terminal_size().columns
        width = max(0, min(40, columns - len(after) - 1))
        full = width * self.step // self.max_steps
        # A line that is too long would wrap, and then be drawn again and again below itself.
        line = _encodable(f"{'█' * full}{'░' * (width - full)}{after}", self._stream)[: max(columns - 1, 1)]
        # \x1b[K clears what a longer line left behind.
        self._stream.write(f"\r{line}\x1b[K")
        self._stream.flush()
        self._open = True

    def _line(self, text: str) -> None:
        if self._open:
            self._stream.write("\r\x1b[K")
        super()._line(text)
        if self._open:
            self._draw()


class Table(Progress):
    """A table that grows in place: for notebooks."""

    def __init__(self) -> None:
        super().__init__()
        # The one optional import, and only inside a notebook, where it is loaded already.
        ipython: Any = importlib.import_module("IPython.display")
        self._html: Any = ipython.HTML
        self._handle: Any = ipython.display(ipython.HTML(""), display_id=True)
        self._page = ""
        self._time = ""
        # Step to training loss and results of the evaluation, by the column's title.
        self._rows: dict[int, dict[str, float]] = {}
        self._drawn = 0.0
        self._closed = False

    def banner(self, text: str, page: str | None = None) -> None:
        """Shows the text above the table."""
        self._page = page if page is not None else f"<pre>{html.escape(text)}</pre>"
        self._update()

    def log(self, entry: dict[str, Any]) -> None:
        """Adds a row, or the loss to the row of this step."""
        super().log(entry)
        if "loss" in entry:
            self._row(entry)["Training Loss"] = entry["loss"]
        self.draw()

    def evaluation(self, entry: dict[str, Any]) -> None:
        """Adds a row, or the results to the row of this step."""
        results = _results(entry)
        if results:
            row = self._row(entry)
            if self.loss is not None:
                row.setdefault("Training Loss", self.loss)
            row |= {_title(name): value for name, value in results.items()}
        self.draw()

    def expected(self, text: str) -> None:
        """Shows the line below what was said before the run."""
        self._time = text

    def draw(self) -> None:
        """Redraws, a few times a second at most: every redraw is sent to the browser whole."""
        now = time.monotonic()
        if now - self._drawn >= _REDRAW_NOTEBOOK_SECONDS * (1 + len(self._rows) // _ROWS_PER_REDRAW):
            self._drawn = now
            self._update()

    def close(self) -> None:
        """Shows the last state."""
        self._closed = True
        self._update()

    def _row(self, entry: dict[str, Any]) -> dict[str, float]:
        return self._rows.setdefault(entry.get("step", self.step), {})

    def _update(self) -> None:
        self._handle.update(self._html(self.render()))

    def render(self) -> str:
        """Returns what was said before the run, the progress and the table as HTML."""
        titles = dict.fromkeys(["Training Loss", *(title for row in self._rows.values() for title in row)])
        cell = "style='text-align:right;padding:2px 12px;font-variant-numeric:tabular-nums'"
        head = "".join(f"<th {cell}>{html.escape(title)}</th>" for title in ["Step", *titles])
        body = "".join(
            f"<tr><td {cell}>{step}</td>"
            + "".join(f"<td {cell}>{f'{row[title]:.4f}' if title in row else ''}</td>" for title in titles)
            + "</tr>"
            for step, row in sorted(self._rows.items())
        )
        said = self._page + (f"<div>{html.escape(self._time)}</div>" if self._time else "")
        if not self.max_steps:
            return said
        ended = "stopped at " if self._closed and self.step < self.max_steps else ""
        rate = "" if ended else html.escape(self.rate())
        progress = (
            "<div style='margin:6px 0'>"
            f"<progress value='{self.step}' max='{self.max_steps}' style='width:300px;vertical-align:middle'>"
            "</progress> "
            f"{ended}{self.step}/{self.max_steps} <span style='white-space:pre'> {rate}</span></div>"
        )
        table = f"<table style='border-collapse:collapse'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        if len(self._rows) > 60:
            table = f"<div style='max-height:28em;overflow-y:auto;display:inline-block'>{table}</div>"
        return said + progress + (table if self._rows else "")


def _results(entry: dict[str, Any]) -> dict[str, float]:
    """What an evaluation found: the entry's numbers without times and places."""
    return {
        name: float(value)
        for name, value in entry.items()
        if name.startswith("eval_") and not name.endswith(_NO_RESULTS) and isinstance(value, (int, float))
    }


def _title(name: str) -> str:
    """The heading of a result: `Validation Loss` for `eval_loss`, `Rouge1` for `eval_rouge1`, `Short Loss`..."""
    return "Validation Loss" if name == "eval_loss" else name.removeprefix("eval_").replace("_", " ").title()


def _encodable(text: str, stream: TextIO) -> str:
    """The text with other signs where the stream's encoding lacks ours."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate({ord("█"): "#", ord("░"): "-", ord("«"): ">>", ord("»"): "<<", ord("…"): "..."})
        return text.encode(encoding, "replace").decode(encoding)
    return text


def choose(disabled: bool | None = None) -> Progress:
    """Chooses the display that fits where this runs.

    Args:
        disabled: Whether to show nothing.

    Returns:
        A display that has shown nothing yet.
    """
    # Without a console, as under pythonw, there is no stream.
    if disabled or (sys.stderr is None and not in_notebook()):
        return Progress()
    if in_notebook():
        return Table()
    return Bar() if sys.stderr.isatty() else Lines()
