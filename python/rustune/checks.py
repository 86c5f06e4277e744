"""Kinds of arguments, and the error for one that is of another kind: it names the argument and what was expected."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from rustune._native import ConfigError


class Kind(NamedTuple):
    """A kind of argument.

    Attributes:
        fits: Whether a value is of this kind; None always is.
        expected: What to say otherwise.
    """

    fits: Callable[[Any], bool]
    expected: str


def _is_bool(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_))


def _is_whole(value: Any) -> bool:
    # The engine counts with 64 bits.
    return isinstance(value, (int, np.integer)) and not _is_bool(value) and abs(int(value)) < 2**63


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, (float, np.floating)) and math.isfinite(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and is_unicode(value)


def is_unicode(text: str) -> bool:
    r"""Tells whether a text can be written in UTF-8, which halves of surrogate pairs cannot.

    Args:
        text: The text.

    Returns:
        Whether every sign of it is a character.

    Example:
        >>> is_unicode("Grüße"), is_unicode("\ud800")
        (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _several(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """One, or a list, a tuple, a set or an array of them."""

    def check(value: Any) -> bool:
        if isinstance(value, np.ndarray):
            value = value.tolist()
        return fits(value) or (isinstance(value, (list, tuple, set, frozenset)) and all(map(fits, value)))

    return check


def _is_id(value: Any) -> bool:
    return _is_whole(value) and 0 <= value < 2**32


def _is_list(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(fits, value))


def _table(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return isinstance(value, Mapping) and all(map(_is_text, value)) and all(map(fits, value.values()))

    return check


BOOL: Final = Kind(_is_bool, "True or False")
WHOLE: Final = Kind(_is_whole, "a whole number")
NATURAL: Final = Kind(lambda value: _is_whole(value) and value >= 0, "a whole number, at least 0")
POSITIVE: Final = Kind(lambda value: _is_whole(value) and value >= 1, "a whole number, at least 1")
NUMBER: Final = Kind(_is_number, "a finite number")
TEXT: Final = Kind(_is_text, "a text")
SWITCH: Final = Kind(lambda value: _is_bool(value) or _is_text(value), "True, False or a text")
TEXTS: Final = Kind(_several(_is_text), "a text or a list of texts")
WHOLES: Final = Kind(_several(_is_whole), "a whole number or a list of them")
IDS: Final = Kind(_is_list(_is_id), "a list of ids of tokens")
ID_ROWS: Final = Kind(_is_list(_is_list(_is_id)), "a list of lists of ids of tokens")
WHOLE_TABLE: Final = Kind(_table(_is_whole), "a dict from names to whole numbers")
NUMBER_TABLE: Final = Kind(_table(_is_number), "a dict from names to finite numbers")
TABLE: Final = Kind(lambda value: isinstance(value, Mapping) and all(map(_is_text, value)), "a dict with names")
LIST: Final = Kind(lambda value: isinstance(value, (list, tuple)), "a list")
FUNCTION: Final = Kind(callable, "a function")


def check(kinds: Mapping[str, Kind], arguments: Mapping[str, Any], required: Iterable[str] = ()) -> None:
    """Refuses arguments of another kind.

    Args:
        kinds: Name to kind.
        arguments: Name to value; None and names without a kind pass.
        required: Names of those for which None does not pass.

    Raises:
        ConfigError: For the first that does not fit.
    """
    for name, kind in kinds.items():
        value = arguments.get(name)
        if (value is not None or name in required) and (value is None or not kind.fits(value)):
            raise ConfigError(f"{name} = {value!r}: expected {kind.expected}")


def is_one_of(value: Any, usual: tuple[Any, ...]) -> bool:
    """Tells whether a value, of whatever kind, is one of some plain ones.

    Args:
        value: Anything, arrays too.
        usual: Plain values.

    Returns:
        Whether it is one of them.
    """
    return any(value is one or (isinstance(value, type(one)) and value == one) for one in usual)


def as_json(table: Mapping[str, Any]) -> str:
    """Writes settings as the engine takes them.

    Args:
        table: Values by name; numbers of numpy are numbers.

    Returns:
        JSON.
    """
    return json.dumps(table, default=lambda value: value.item())


def listed(values: Any) -> list[Any]:
    """Makes a list of what may be one or several.

    Args:
        values: A text, a number, or several.

    Returns:
        A list.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        return [values]
    return list(values)
