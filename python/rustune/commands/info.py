"""`rustune info`: what this machine offers and what is installed."""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata
from typing import Any, Final

_PACKAGES: Final = ("numpy", "datasets", "transformers", "peft", "trl", "torch", "matplotlib", "PyYAML", "ipykernel")


def add(commands: Any) -> None:
    """Describes the command.

    Args:
        commands: The parser's subcommands.
    """
    parser = commands.add_parser(
        "info",
        help="print versions, instruction sets, threads and memory",
        description="Says what a bug report should: versions, the kernels in use, threads and memory.",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, amounts of memory in bytes")


def run(options: argparse.Namespace) -> int:
    """Runs the command.

    Args:
        options: What was written.

    Returns:
        The exit status.
    """
    import rustune
    from rustune.banner import gib

    facts = rustune.info()
    versions = {name: version for name in _PACKAGES if (version := _version(name))}
    if options.json:
        system = {"python": platform.python_version(), "system": platform.platform(), "machine": platform.machine()}
        print(json.dumps({**facts, **system, "packages": versions}, indent=2))
        return 0
    others = [isa for isa in facts["available_isas"] if isa != facts["isa"]]
    lines = {
        "version": f"rustune {facts['version']}, Python {platform.python_version()}",
        "system": f"{platform.platform()}, {facts['cpus']} CPUs granted",
        "kernels": f"{facts['isa']}, products in {facts['products']}"
        + (f" (also {', '.join(others)}: RUSTUNE_ISA chooses)" if others else ""),
        "threads": f"{facts['threads']} (RAYON_NUM_THREADS chooses)",
        "memory": f"{gib(facts['available_memory_bytes'])} free of {gib(facts['total_memory_bytes'])}",
        "packages": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    for name, said in lines.items():
        print(f"{name:>9}  {said}")
    return 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
