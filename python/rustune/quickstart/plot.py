"""A loss curve as a PNG file, drawn with numpy and zlib alone: axes, ticks, a small bitmap font, smooth lines."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Canvas = NDArray[np.float32]  # [height, width, 3], 0 is black and 1 is white
Colour = tuple[float, float, float]

_INK: Colour = (0.16, 0.18, 0.22)
_FAINT_INK: Colour = (0.45, 0.48, 0.53)
_GRID: Colour = (0.90, 0.91, 0.93)
_RAW: Colour = (0.66, 0.79, 0.94)
_SMOOTH: Colour = (0.10, 0.36, 0.70)
_VALIDATION: Colour = (0.88, 0.42, 0.10)

# Each character is up to nine rows of five dots, a row in two hexadecimal digits, from the top; missing rows are empty.
_GLYPHS = {
    character: [int(rows[i : i + 2], 16) for i in range(0, len(rows), 2)]
    for character, rows in (
        entry.split("=", 1) if not entry.startswith("==") else ("=", entry[2:])
        for entry in """
        0=0E11131519110E 1=040C040404040E 2=0E11010204081F 3=1F02040201110E 4=02060A121F0202 5=1F101E0101110E
        6=0608101E11110E 7=1F010204080808 8=0E11110E11110E 9=0E11110F01020C
        a=00000E010F110F b=1010161911111E c=00000E1010110E d=01010D1311110F e=00000E111F100E f=0609081C080808
        g=00000F1111110F010E h=10101619111111 i=04000C0404040E j=0200060202020212_C k=10101214181412 l=0C04040404040E
        m=00001A15151111 n=00001619111111 o=00000E1111110E p=00001E1111111E1010 q=00000F1111110F0101 r=00001619101010
        s=00000E100E011E t=08081C08080906 u=0000111111130D v=00001111110A04 w=0000111115150A x=0000110A040A11
        y=0000111111110F010E z=00001F0204081F
        A=0E1111111F1111 B=1E11111E11111E C=0E11101010110E D=1C12111111121C E=1F10101E10101F F=1F10101E101010
        G=0E11101711110F H=1111111F111111 I=0E04040404040E J=0702020202120C K=11121418141211 L=1010101010101F
        M=111B1515111111 N=11111915131111 O=0E11111111110E P=1E11111E101010 Q=0E11111115120D R=1E11111E141211
        S=0F10100E01011E T=1F040404040404 U=1111111111110E V=11111111110A04 W=1111111515150A X=11110A040A1111
        Y=1111110A040404 Z=1F01020408101F
        .=0000000000_C_C ,=0000000000_C0408 -=0000001F000000 +=0004041F040400 %=18190204081303 :=00_C_C00_C_C00
        (=02040808080402 )=08040202020408 /=00010204081000 ==00001F001F0000 _=00000000000000001F '=_C0408
        """.replace("_C", "0C").split()
    )
}
_GLYPH_WIDTH, _GLYPH_HEIGHT = 6, 9  # in dots, the gap to the next character included


def loss_curve(
    path: str | PathLike[str],
    losses: Sequence[float],
    *,
    steps: Sequence[int] | None = None,
    validation: Sequence[tuple[int, float]] = (),
    title: str = "Training loss",
    width: int = 800,
    height: int = 500,
) -> None:
    """Draws training losses over steps, faint as they are and bold as a running mean, and writes a PNG file.

    Args:
        path: The file to write.
        losses: One loss per logged step; at least one finite number.
        steps: The step of each loss; 1, 2, 3... if not given.
        validation: Pairs of step and validation loss, drawn as dots.
        title: A line of text above the plot; characters outside the small font are left blank.
        width: Of the picture, in pixels, at least 300.
        height: Of the picture, in pixels, at least 200.

    Raises:
        ValueError: If there is nothing to draw, the lengths differ or the picture is too small.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "loss.png"
        >>> loss_curve(file, [2.0, 1.5, 1.2, 1.1])
        >>> file.read_bytes()[1:4]
        b'PNG'
    """
    y = np.asarray(losses, dtype=np.float64)
    x = np.arange(1, len(y) + 1, dtype=np.float64) if steps is None else np.asarray(steps, dtype=np.float64)
    if x.shape != y.shape or y.ndim != 1:
        raise ValueError(f"steps and losses: expected two lists of one length, got {x.shape} and {y.shape}")
    if width < 300 or height < 200:
        raise ValueError(f"width, height = {width}, {height}: expected at least 300, 200")
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    dots = [(float(step), value) for step, value in validation if math.isfinite(value)]
    if not len(y):
        raise ValueError("losses: expected at least one finite number")

    # The plot's frame in pixels.
    left, right, top, bottom = 76, width - 24, 76, height - 56
    y_ticks = _ticks(0.0, max(float(y.max()), *(value for _, value in dots), 1e-6))
    x_ticks = _ticks(0.0, max(float(x.max()), *(step for step, _ in dots), 1.0), whole=True)
    x_top, y_top = max(x.max(), x_ticks[-1] if len(x) == 1 else x.max()), y_ticks[-1]

    def place(step: float, loss: float) -> tuple[float, float]:
        return left + (right - left) * step / x_top, bottom - (bottom - top) * loss / y_top

    canvas: Canvas = np.ones((height, width, 3), dtype=np.float32)
    for tick in y_ticks:
        _, row = place(0.0, tick)
        _line(canvas, (left, row), (right, row), 1.0, _GRID)
        label = f"{tick:.{_decimals(y_ticks)}f}"
        _text(canvas, label, left - 10 - _text_width(label), row - 7, _FAINT_INK)
    for tick in x_ticks:
        if tick <= x_top:
            column, _ = place(tick, 0.0)
            _line(canvas, (column, bottom), (column, bottom + 5), 1.0, _INK)
            label = f"{tick:.0f}"
            _text(canvas, label, column - _text_width(label) / 2, bottom + 11, _FAINT_INK)
    _line(canvas, (left, bottom), (right, bottom), 1.2, _INK)

    points = [place(step, loss) for step, loss in zip(x, y, strict=True)]
    means = [place(step, loss) for step, loss in zip(x, _running_mean(y), strict=True)]
    for curve, thickness, colour in ((points, 1.3, _RAW), (means, 2.6, _SMOOTH)):
        for start, end in zip(curve, curve[1:] or curve, strict=False):
            _line(canvas, start, end, thickness, colour)
    for step, value in dots:
        spot = place(step, value)
        _line(canvas, spot, spot, 8.0, _VALIDATION)

    _text(canvas, title, left, 18, _INK, bold=True)
    _text(canvas, "step", right - _text_width("step"), bottom + 32, _INK)
    legend = [("as logged", _RAW), ("running mean", _SMOOTH)] + ([("validation", _VALIDATION)] if dots else [])
    column = float(right)
    for label, colour in reversed(legend):
        column -= _text_width(label)
        _text(canvas, label, column, top - 28, _FAINT_INK)
        column -= 30
        _line(canvas, (column, top - 21), (column + 18, top - 21), 3.0, colour)
        column -= 18
    _text(canvas, "loss", left, top - 28, _INK)
    Path(path).write_bytes(_png(canvas))


def _running_mean(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Averages each value with as many neighbours on either side, a twentieth of the curve, fewer at its ends."""
    place = np.arange(len(y))
    reach = np.minimum(np.minimum(place, place[::-1]), len(y) // 20)
    sums = np.concatenate([[0.0], np.cumsum(y)])
    return np.asarray((sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1))


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Returns four to eight round numbers from `low` (itself round) to at least `high`."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, float(math.ceil(step)))
    return [low + step * n for n in range(math.ceil((high - low) / step - 1e-9) + 1)]


def _decimals(ticks: Sequence[float]) -> int:
    """Returns how many decimals tell the ticks apart."""
    return next(n for n in range(12) if all(abs(round(t, n) - t) < 1e-9 * max(1.0, abs(t)) for t in ticks) or n == 11)


def _line(canvas: Canvas, a: tuple[float, float], b: tuple[float, float], thickness: float, colour: Colour) -> None:
    """Draws a round-ended line from `a` to `b` (column, row), its edge softened over one pixel."""
    reach = thickness / 2 + 1
    height, width, _ = canvas.shape
    x0, x1 = max(0, int(min(a[0], b[0]) - reach)), min(width, int(max(a[0], b[0]) + reach) + 2)
    y0, y1 = max(0, int(min(a[1], b[1]) - reach)), min(height, int(max(a[1], b[1]) + reach) + 2)
    if x0 >= x1 or y0 >= y1:
        return
    px, py = np.meshgrid(np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5)
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = np.clip(((px - a[0]) * dx + (py - a[1]) * dy) / max(dx * dx + dy * dy, 1e-12), 0.0, 1.0)
    distance = np.hypot(px - a[0] - along * dx, py - a[1] - along * dy)
    cover = np.clip(thickness / 2 + 0.5 - distance, 0.0, 1.0)[..., None].astype(np.float32)
    canvas[y0:y1, x0:x1] += (np.asarray(colour, dtype=np.float32) - canvas[y0:y1, x0:x1]) * cover


def _text_width(text: str) -> int:
    return (len(text) * _GLYPH_WIDTH - 1) * 2


def _text(canvas: Canvas, text: str, x: float, y: float, colour: Colour, *, bold: bool = False) -> None:
    """Writes a line of text with its upper left corner at column `x`, row `y`; a dot of the font is two pixels wide."""
    dots = np.zeros((_GLYPH_HEIGHT, len(text) * _GLYPH_WIDTH), dtype=bool)
    for n, character in enumerate(text):
        for row, bits in enumerate(_GLYPHS.get(character, [])):
            for column in range(5):
                dots[row, n * _GLYPH_WIDTH + column] = bits >> (4 - column) & 1
    ink = dots.repeat(2, axis=0).repeat(2, axis=1)
    if bold:
        ink[:, 1:] |= ink[:, :-1]
    row0, column0 = max(0, round(y)), max(0, round(x))
    target = canvas[row0 : row0 + ink.shape[0], column0 : column0 + ink.shape[1]]
    target[ink[: target.shape[0], : target.shape[1]]] = colour


def _png(canvas: Canvas) -> bytes:
    """Encodes the picture as PNG: 8-bit RGB, no filter."""
    pixels = np.round(np.clip(canvas, 0.0, 1.0) * 255).astype(np.uint8)
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, width * 3)], axis=1)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
        + chunk(b"IEND", b"")
    )
