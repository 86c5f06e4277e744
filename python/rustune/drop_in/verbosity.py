"""`transformers.logging` where transformers is absent: how much is told goes to Python's own logging."""

from __future__ import annotations

import logging


def get_logger(name: str | None = None) -> logging.Logger:
    """Returns a logger.

    Args:
        name: Its name; the one of `transformers` if not given.

    Returns:
        Python's logger of that name.
    """
    return logging.getLogger(name or "transformers")


def set_verbosity(verbosity: int) -> None:
    """Sets how much is told.

    Args:
        verbosity: A level of Python's logging.
    """
    get_logger().setLevel(verbosity)


def set_verbosity_debug() -> None:
    """Tells everything."""
    set_verbosity(logging.DEBUG)


def set_verbosity_info() -> None:
    """Tells what goes on."""
    set_verbosity(logging.INFO)


def set_verbosity_warning() -> None:
    """Tells what may be wrong."""
    set_verbosity(logging.WARNING)


def set_verbosity_error() -> None:
    """Tells errors only."""
    set_verbosity(logging.ERROR)
