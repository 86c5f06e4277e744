"""`rustune migrate`: rewrites a notebook's install cell and imports, and says what it could not do."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Describes the command.

    Args:
        commands: The parser's subcommands.
    """
    parser = commands.add_parser(
        "migrate",
        help="make an Unsloth notebook run on rustune",
        description="Replaces the install cell and the imports of a notebook written for Unsloth, and lists what needs "
        "a look. The notebook itself is left alone unless --in-place is given.",
    )
    parser.add_argument("notebook", type=Path, help="an .ipynb file")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--out", "-o", type=Path, metavar="FILE", help="where to (NAME.rustune.ipynb)")
    group.add_argument("--in-place", action="store_true", help="overwrite the notebook")
    parser.add_argument("--force", action="store_true", help="overwrite FILE if it is there")
    parser.add_argument(
        "--drop-in", action="store_true", help="leave the imports as they are and put `import rustune.drop_in` above"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command.

    Args:
        options: What was written.

    Returns:
        The exit status.
    """
    from rustune import ConfigError, migrate

    source: Path = options.notebook
    try:
        notebook = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{source}: not a notebook: {error}") from None
    report = migrate.rewrite(notebook, drop_in=options.drop_in, where=str(source))
    target = source if options.in_place else options.out or source.with_name(f"{source.stem}.rustune.ipynb")
    if target.exists() and not (options.in_place or options.force):
        raise ConfigError(f"{target}: is there already; --force overwrites it")
    target.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for title, lines in (("done:", report.done), ("to look at:", report.left)):
        if lines:
            print(title)
        for cell, said in lines:
            print(f"  {f'cell {cell}' if cell else 'notebook'}: {said}")
    print(f"{target}: {len(report.done)} changes, {len(report.left)} to look at")
    return 0
