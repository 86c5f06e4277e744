"""`logging` as transformers has it, for notebooks that quiet it: how much is told goes to Python's own logging."""

from __future__ import annotations

import logging
from logging import CRITICAL, DEBUG, ERROR, FATAL, INFO, WARN, WARNING

__all__ = [
    "CRITICAL",
    "DEBUG",
    "ERROR",
    "FATAL",
    "INFO",
    "WARN",
    "WARNING",
    "get_logger",
    "get_verbosity",
    "set_verbosity",
    "set_verbosity_debug",
    "set_verbosity_error",
    "set_verbosity_info",
    "set_verbosity_warning",
]


def get_logger(name: str | None = None) -> logging.Logger:
    """Returns a logger.

    Args:
        name: Its name; the one of `transformers` if not given.

    Returns:
        Python's logger of that name.
    """
    return logging.getLogger(name or "transformers")


def get_verbosity() -> int:
    """Returns how much is told: a level of Python's logging."""
    return get_logger().getEffectiveLevel()


def set_verbosity(verbosity: int) -> None:
    """Sets how much is told.

    Args:
        verbosity: A level of Python's logging.
    """
    get_logger().setLevel(verbosity)


def set_verbosity_debug() -> None:
    """Tells everything."""
    set_verbosity(DEBUG)


def set_verbosity_info() -> None:
    """Tells what goes on."""
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    """Tells what may be wrong."""
    set_verbosity(WARNING)


def set_verbosity_error() -> None:
    """Tells errors only."""
    set_verbosity(ERROR)
