"""Lines told once: about arguments that mean nothing on a plain processor, and about arguments that do not exist."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from rustune._native import ConfigError

_told: Final[set[str]] = set()
_PACKAGE: Final = str(Path(__file__).parent)


def tell_once(text: str) -> None:
    """Warns, unless the same was said before in this process.

    Args:
        text: The line; it points at the nearest caller outside rustune.
    """
    if text in _told:
        return
    _told.add(text)
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(text, stacklevel=depth)


def forget() -> None:
    """Lets everything be told once more."""
    _told.clear()


def unknown_argument(owner: str, name: str, known: Iterable[str]) -> ConfigError:
    """Makes the error for an argument that does not exist.

    Args:
        owner: What was called.
        name: The argument.
        known: The names there are.

    Returns:
        The error, naming the nearest known argument.
    """
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return ConfigError(f"{name}: {owner} has no such argument{hint}")


def tell_meaningless(owner: str, names: Iterable[str]) -> None:
    """Tells in one line, once, which arguments mean nothing here.

    Args:
        owner: What was called.
        names: The arguments; none of them is no line.
    """
    if listed := sorted(names):
        verb = "means" if len(listed) == 1 else "mean"
        said = f"{', '.join(listed)} {verb} nothing here"
        tell_once(f"{owner}: {said}: the model runs in this machine's processor and memory")


def sort_arguments(owner: str, given: Mapping[str, Any], meaningless: Iterable[str], known: Iterable[str]) -> None:
    """Tells in one line which arguments mean nothing here, and refuses those that do not exist.

    Args:
        owner: What was called.
        given: The arguments nothing is done with, by name.
        meaningless: Names that are accepted.
        known: Names that do something; for the nearest one.

    Raises:
        ConfigError: For a name that is in neither.
    """
    accepted = set(meaningless)
    for name in given:
        if name not in accepted:
            raise unknown_argument(owner, name, accepted | set(known))
    tell_meaningless(owner, given)
