"""`rustune quickstart`: everything once, on the model that comes with the package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Describes the command.

    Args:
        commands: The parser's subcommands.
    """
    parser = commands.add_parser(
        "quickstart",
        help="fine-tune the model that comes with the package, offline, in about three minutes",
        description="Loads the shipped model in 4 bits, teaches it to answer questions with LoRA, and measures that.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart-out"), metavar="DIR", help="where the adapter and loss.png go"
    )
    parser.add_argument("--seed", type=int, default=3407, help="of the adapter's first weights and the order of rows")


def run(options: argparse.Namespace) -> int:
    """Runs the command.

    Args:
        options: What was written.

    Returns:
        The exit status.
    """
    from rustune.quickstart.run import run as quickstart

    return 0 if quickstart(options.out, seed=options.seed).passed else 1
