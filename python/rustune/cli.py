"""The command `rustune`: `rustune quickstart` shows everything once, `rustune info` says what this machine offers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: What follows `rustune`; `sys.argv[1:]` if not given.

    Returns:
        The exit status: 0 if all went well.

    Raises:
        SystemExit: If the arguments cannot be understood.
    """
    parser = argparse.ArgumentParser(
        prog="rustune", description="Fine-tune Llama-family models in 4 bits on a plain CPU."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    quickstart = commands.add_parser(
        "quickstart",
        help="fine-tune the model that comes with the package, offline, in about three minutes",
        description="Loads the shipped model in 4 bits, teaches it to answer questions with LoRA, and measures that.",
    )
    quickstart.add_argument(
        "--out", type=Path, default=Path("quickstart-out"), metavar="DIR", help="where the adapter and loss.png go"
    )
    quickstart.add_argument(
        "--seed", type=int, default=3407, help="of the adapter's first weights and the order of rows"
    )

    commands.add_parser("info", help="print version, kernels, threads and memory")

    options = parser.parse_args(arguments)
    # The imports wait until here so that `rustune --help` answers at once.
    if options.command == "quickstart":
        from rustune.quickstart.run import run

        return 0 if run(options.out, seed=options.seed).passed else 1
    import rustune

    for name, value in rustune.info().items():
        print(f"{name:>16}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
