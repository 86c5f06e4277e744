"""How a run is shown: a bar in a terminal, a live table in a notebook, plain lines elsewhere."""

from __future__ import annotations

import html
import shutil
import sys
import time
from typing import Any, TextIO

_REDRAW_SECONDS = 0.1
_REDRAW_NOTEBOOK_SECONDS = 0.5


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
    """

    def __init__(self) -> None:
        self.step = 0
        self.max_steps = 0
        self.tokens = 0
        self.loss: float | None = None
        self._first_step = 0
        self._started = time.monotonic()

    def banner(self, text: str) -> None:
        """Says what is about to be done.

        Args:
            text: One or more lines.
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
        self._started = time.monotonic()
        self.draw()

    def advance(self, step: int, tokens: int) -> None:
        """Notes a finished step or part of a step.

        Args:
            step: Finished steps.
            tokens: Tokens trained on since `begin`.
        """
        self.step, self.tokens = step, tokens
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

    def draw(self) -> None:
        """Shows where the run stands, if it is time to."""

    def close(self) -> None:
        """Ends the display, whatever became of the run."""

    def rate(self) -> str:
        """Returns tokens per second and the time left, as text."""
        elapsed = time.monotonic() - self._started
        done = self.step - self._first_step
        if done <= 0 or elapsed <= 0:
            return ""
        left = elapsed / done * (self.max_steps - self.step)
        return f"{self.tokens / elapsed:,.0f} tok/s  ETA {duration(left)}"


class Lines(Progress):
    """A line for each log entry: for files and pipes.

    Args:
        stream: Where to.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream if stream is not None else sys.stderr

    def banner(self, text: str) -> None:
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
        if "eval_loss" in entry:
            self._line(f"step {entry.get('step', self.step)}/{self.max_steps}  eval_loss {entry['eval_loss']:.4f}")

    def _line(self, text: str) -> None:
        self._stream.write(f"{text}\n")
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
        after = f" {self.step}/{self.max_steps}"
        after += "" if self.loss is None else f"  loss {self.loss:.4f}"
        after += f"  {self.rate()}".rstrip()
        width = max(10, min(40, shutil.get_terminal_size().columns - len(after) - 1))
        full = width * self.step // self.max_steps
        # \x1b[K clears what a longer line left behind.
        self._stream.write(f"\r{'█' * full}{'░' * (width - full)}{after}\x1b[K")
        self._stream.flush()
        self._open = True

    def close(self) -> None:
        """Leaves the bar as it is and goes to a new line."""
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
            self._open = False

    def _line(self, text: str) -> None:
        if self._open:
            self._stream.write("\r\x1b[K")
        super()._line(text)
        self._open = False


class Table(Progress):
    """A table that grows in place: for notebooks."""

    def __init__(self) -> None:
        super().__init__()
        # The one optional import, and only inside a notebook, where it is loaded already.
        from IPython.display import HTML, display

        self._html: Any = HTML
        self._handle: Any = display(HTML(""), display_id=True)
        self._rows: dict[int, tuple[float | None, float | None]] = {}
        self._drawn = 0.0

    def banner(self, text: str) -> None:
        """Prints the text above the table."""
        print(text)

    def log(self, entry: dict[str, Any]) -> None:
        """Adds a row, or the loss to the row of this step."""
        super().log(entry)
        if "loss" in entry:
            step = entry.get("step", self.step)
            self._rows[step] = (entry["loss"], self._rows.get(step, (None, None))[1])
        self.draw()

    def evaluation(self, entry: dict[str, Any]) -> None:
        """Adds a row, or the validation loss to the row of this step."""
        if "eval_loss" in entry:
            step = entry.get("step", self.step)
            self._rows[step] = (self._rows.get(step, (self.loss, None))[0], entry["eval_loss"])
        self.draw()

    def draw(self) -> None:
        """Redraws, a few times a second at most: every redraw is sent to the browser whole."""
        now = time.monotonic()
        if now - self._drawn >= _REDRAW_NOTEBOOK_SECONDS:
            self._drawn = now
            self._update()

    def close(self) -> None:
        """Shows the last state."""
        self._update()

    def _update(self) -> None:
        self._handle.update(self._html(self.render()))

    def render(self) -> str:
        """Returns the progress and the table as HTML."""
        validated = any(validation is not None for _, validation in self._rows.values())
        head = ["Step", "Training Loss"] + (["Validation Loss"] if validated else [])
        rows = "".join(
            "<tr>"
            + f"<td>{step}</td>"
            + "".join(f"<td>{'' if x is None else f'{x:.4f}'}</td>" for x in losses[: len(head) - 1])
            + "</tr>"
            for step, losses in sorted(self._rows.items())
        )
        return (
            f"<progress value='{self.step}' max='{self.max_steps}' style='width:300px'></progress> "
            f"{self.step}/{self.max_steps} {html.escape(self.rate())}"
            f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{rows}</table>"
        )


def choose(disabled: bool | None = None) -> Progress:
    """Chooses the display that fits where this runs.

    Args:
        disabled: Whether to show nothing.

    Returns:
        A display that has shown nothing yet.
    """
    if disabled:
        return Progress()
    if in_notebook():
        return Table()
    return Bar() if sys.stderr is not None and sys.stderr.isatty() else Lines()
