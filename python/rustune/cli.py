"""The command `rustune`: finds the subcommand, and says what went wrong without a traceback."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Final

COMMANDS: Final = ("quickstart", "train", "generate", "chat", "estimate", "migrate", "info")

_EPILOG: Final = """\
exit status: 0 all went well, 1 something failed, 2 the arguments cannot be understood, 130 stopped by Ctrl-C.
`rustune COMMAND --help` tells more of each command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: What follows `rustune`; `sys.argv[1:]` if not given.

    Returns:
        The exit status: 0 if all went well, 1 if something failed, 130 after Ctrl-C.

    Raises:
        SystemExit: With status 2, if the arguments cannot be understood; with 0 after `--help`.
    """
    parser = argparse.ArgumentParser(
        prog="rustune",
        description="Fine-tune Llama-family models in 4 bits on a plain CPU.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and end")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from, for a bug report")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    # These modules only describe themselves; what is heavy is imported when a command runs, so that --help is quick.
    for name in COMMANDS:
        importlib.import_module(f"rustune.commands.{name}").add(commands)

    options = parser.parse_args(arguments)
    if options.version:
        from rustune import __version__

        print(__version__)
        return 0
    if options.command is None:
        parser.error("expected a COMMAND")
    run: Callable[[argparse.Namespace], int] = importlib.import_module(f"rustune.commands.{options.command}").run
    warnings.showwarning = _show_warning
    try:
        return run(options)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if options.traceback:
            raise
        print(f"rustune: error: {_said(error)}", file=sys.stderr)
        return 1


def _said(error: Exception) -> str:
    """What an error says; a bug is named as one."""
    from rustune import RustuneError

    if isinstance(error, RustuneError):
        return str(error)
    if isinstance(error, OSError):
        named = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror or error}{named}"
    return f"{type(error).__name__}: {error} (a bug? run it again with rustune --traceback ...)"


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning on one line, without the place in our source that it came from."""
    print(f"rustune: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
