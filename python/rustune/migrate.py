"""Rewrites notebooks written for Unsloth: the install cell, the imports, and a list of what needs a look."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from rustune._native import ConfigError

# Packages rustune stands in for; an installation of them is not needed.
_REPLACED: Final = frozenset(
    """
    unsloth unsloth_zoo xformers trl peft accelerate bitsandbytes triton cut_cross_entropy torch torchvision torchaudio
    torchao transformers flash_attn vllm hf_transfer sentencepiece protobuf huggingface_hub packaging ninja einops timm
    tyro shtab no_implicit_optional typeguard
    """.split()
)
_INSTALL: Final = re.compile(r"^\s*[!%]\s*(?:(?:uv|python3?\s+-m)\s+)?pip3?\s+(install|uninstall)\b(.*)$")
# What stands in install cells around the pip lines: picking a version of torch, telling Colab from elsewhere.
_GLUE: Final = re.compile(
    r"^\s*(#.*|%%capture.*|import (os|re|torch|sys|subprocess|importlib)(\s*[,;].*)?|from torch import.*"
    r"|if .*:.*|elif .*:.*|else:.*|try:.*|except.*:.*|pass|v = .*|xformers = .*|major_version.*|get_(numpy|vllm).*"
    r"|_?(numpy|pil|vllm|triton|is_t4|np|torch)\w* *(, *\w+)* *= .*|os\.environ.*|!nvidia-smi.*)?$",
    re.IGNORECASE,
)
_MODULES: Final = {
    "unsloth": "rustune",
    "unsloth.chat_templates": "rustune.chat_templates",
    "unsloth.trainer": "rustune",
    "unsloth_zoo.dataset_utils": "rustune.chat_templates",
    "trl": "rustune",
    "transformers": "rustune",
    "peft": "rustune",
}
# What needs a look: a pattern and what to say.
_LOOK: Final = (
    (r"save_pretrained_gguf|push_to_hub_gguf", "GGUF files"),
    (r"merged_16bit|merged_4bit|push_to_hub_merged|merge_and_unload", "merging the adapter into the model"),
    (r"fast_inference\s*=\s*True|\bvllm\b", "fast_inference, vLLM"),
    (r"\b(GRPO|DPO|ORPO|KTO|PPO|Reward)(Trainer|Config)\b", "training by preference or reward"),
    (r"\bFast(Vision|Text|Sentence)\w*Model\b|\bFastVisionModel\b", "models that see, hear or embed"),
    (r"\bvia_torch\b|torch\.compile\(", "torch.compile"),
)


@dataclass
class Report:
    """What was done, and what is left to a human.

    Attributes:
        done: Pairs of a cell's number, from 1, and what was changed.
        left: The same, of what needs a look; cell 0 is the whole notebook.
    """

    done: list[tuple[int, str]] = field(default_factory=list)
    left: list[tuple[int, str]] = field(default_factory=list)


def rewrite(notebook: Any, *, drop_in: bool = False, where: str = "notebook") -> Report:
    """Rewrites a notebook in place.

    Args:
        notebook: Parsed from JSON, format 4.
        drop_in: Whether to leave the imports and put `import rustune.drop_in` above the first of them.
        where: What errors name.

    Returns:
        What was done and what was not.

    Raises:
        ConfigError: If it is no notebook of format 4.
    """
    cells = notebook.get("cells") if isinstance(notebook, Mapping) else None
    if not isinstance(cells, list) or notebook.get("nbformat") != 4:
        raise ConfigError(f"{where}: expected a notebook of format 4")
    report = Report()
    installed = imported = False
    for number, cell in enumerate(cells, start=1):
        if not isinstance(cell, dict) or cell.get("cell_type") != "code":
            continue
        source = cell.get("source", "")
        before = source if isinstance(source, str) else "".join(source)
        after, installs = _installs(before, number, report, first=not installed)
        installed |= installs
        if drop_in:
            if not imported and _imports_ours(after):
                after, imported = _with_drop_in(after), True
                report.done.append((number, "import rustune.drop_in"))
        else:
            after = _imports(after, number, report)
        for pattern, what in _LOOK:
            if re.search(pattern, after):
                report.left.append((number, f"{what}: rustune may not have it yet, and says so when it is called"))
        if after != before:
            cell["source"] = after if isinstance(source, str) else after.splitlines(keepends=True)
            cell["outputs"], cell["execution_count"] = [], None
    metadata = notebook.get("metadata")
    if isinstance(metadata, dict) and metadata.pop("accelerator", None) is not None:
        metadata.get("colab", {}).pop("gpuType", None)
        report.done.append((0, "no GPU is asked for any more"))
    if not installed:
        report.left.append((0, "no install cell was found: pip install rustune before running it"))
    return report


def _installs(source: str, number: int, report: Report, *, first: bool) -> tuple[str, bool]:
    """A cell with its pip lines rewritten, and whether they installed what rustune stands in for."""
    # A line that ends in a backslash goes on in the next.
    lines = re.sub(r"\\\n\s*", " ", source).split("\n")
    found = [_INSTALL.match(line) for line in lines]
    packages = [_packages(match[2]) if match else [] for match in found]
    ours = any(_base(name) in _REPLACED for names in packages for name in names)
    if not ours:
        return source, False
    kept = sorted({n for match, names in zip(found, packages, strict=True) if match and match[1] == "install"
                   for n in names if _base(n) not in _REPLACED and not n.startswith(("{", "$"))})  # fmt: skip
    wanted = (["rustune"] if first else []) + kept
    line = "%pip install -q " + " ".join(f'"{name}"' if re.search(r"[<>=\[ ]", name) else name for name in wanted)
    if all(match or _GLUE.match(text) for text, match in zip(lines, found, strict=True)):
        report.done.append((number, f"install cell: {line if wanted else 'emptied'}"))
        return (line if wanted else "# rustune brings what this cell installed"), True
    made: list[str] = []
    for text, match in zip(lines, found, strict=True):
        if match is None:
            made.append(text)
        elif line is not None and wanted:
            made.append(text[: len(text) - len(text.lstrip())] + line)
            wanted = []
        elif text[:1].isspace():
            made.append(text[: len(text) - len(text.lstrip())] + "pass")
    report.done.append((number, "pip lines: what rustune brings is no longer installed"))
    report.left.append((number, "this cell does more than install; see whether the rest is still wanted"))
    return "\n".join(made), True


def _packages(arguments: str) -> list[str]:
    """The packages of a pip line, without options."""
    words = re.findall(r"\"[^\"]*\"|'[^']*'|\S+", re.split(r"\s(?:&&|;|\|)\s", arguments)[0])
    names: list[str] = []
    skip = False
    for word in (word.strip("\"'") for word in words):
        if skip:
            skip = False
        elif word.startswith("-"):
            skip = word in (
                "-r",
                "-c",
                "-i",
                "--index-url",
                "--extra-index-url",
                "-f",
                "--find-links",
                "--target",
                "-t",
            )
        elif word and not word.startswith("#"):
            names.append(word)
    return names


def _base(package: str) -> str:
    """A requirement's name, also of `unsloth[colab] @ git+https://...`."""
    if "unsloth" in package.lower():
        return "unsloth"
    name = re.split(r"[\[<>=!~@; ]", package.rsplit("/", 1)[-1], maxsplit=1)[0]
    return name.removesuffix(".git").lower().replace("-", "_")


def _parsed(source: str) -> ast.Module | None:
    """The cell's syntax, with magics in place of which a comment stands; None if it is no Python."""
    if source.lstrip().startswith("%%") and not source.lstrip().startswith(("%%capture", "%%time")):
        return None
    masked = re.sub(r"^(\s*)[%!?].*$", r"\1pass", source, flags=re.MULTILINE)
    try:
        return ast.parse(masked)
    except SyntaxError:
        return None


def _imports_ours(source: str) -> bool:
    tree = _parsed(source)
    return tree is not None and any(
        (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in _ROOTS)
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] in _ROOTS for alias in node.names))
        for node in ast.walk(tree)
    )


_ROOTS: Final = frozenset(name.split(".")[0] for name in _MODULES)


def _with_drop_in(source: str) -> str:
    """The cell with our line on top, below a cell magic and imports from the future."""
    lines = source.split("\n")
    at = next((i for i, line in enumerate(lines) if not re.match(r"\s*(%%|#|from __future__|$)", line)), 0)
    return "\n".join([*lines[:at], "import rustune.drop_in", *lines[at:]])


def _imports(source: str, number: int, report: Report) -> str:
    """The cell with its imports from ours instead of theirs."""
    tree = _parsed(source)
    if tree is None:
        if re.search(r"^\s*(from|import)\s+unsloth", source, re.MULTILINE):
            report.left.append((number, "cannot be read as Python: change its imports by hand"))
        return source
    lines = source.split("\n")
    # From the last to the first, so that what stands before keeps its place.
    place = [(getattr(node, "lineno", 0), getattr(node, "col_offset", 0)) for node in ast.walk(tree)]
    for _, node in sorted(zip(place, ast.walk(tree), strict=True), key=lambda entry: entry[0], reverse=True):
        new: list[str] | None = None
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in _ROOTS:
            new = _from(node, number, report)
        elif isinstance(node, ast.Import):
            new = _import(node, number, report)
        if new is None or not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        before = lines[first].encode()[: node.col_offset].decode()
        after = lines[last].encode()[node.end_col_offset :].decode()
        if before.strip() or after.strip(" \t;"):
            # Other statements stand on the line: one line, so that they keep their place.
            lines[first : last + 1] = [before + "; ".join(new) + after]
        else:
            lines[first : last + 1] = [before + line for line in new]
    made = "\n".join(lines)
    if made != source:
        report.done.append((number, "imports"))
    return made


def _from(node: ast.ImportFrom, number: int, report: Report) -> list[str] | None:
    """`from theirs import a, b` as lines; what ours lacks stays with theirs."""
    theirs = node.module or ""
    target = _MODULES.get(theirs)
    if any(alias.name == "*" for alias in node.names):
        report.left.append((number, f"from {theirs} import *: write the names it is to import"))
        return None
    names = _names(target) | _names("rustune") if target else frozenset()
    ours = [alias for alias in node.names if target and alias.name in names]
    rest = [alias for alias in node.names if alias not in ours]
    if rest:
        said = ", ".join(alias.name for alias in rest)
        report.left.append((number, f"rustune has no {said}: still imported from {theirs}"))
    if not ours:
        return None
    # What the submodule lacks, the package has.
    by_home: dict[str, list[ast.alias]] = {}
    for alias in ours:
        home = str(target) if alias.name in _names(target) else "rustune"
        by_home.setdefault(home, []).append(alias)
    made = [f"from {home} import {', '.join(map(ast.unparse, aliases))}" for home, aliases in by_home.items()]
    return made + ([f"from {theirs} import {', '.join(map(ast.unparse, rest))}"] if rest else [])


def _import(node: ast.Import, number: int, report: Report) -> list[str] | None:
    """`import unsloth` as a line; imports of the others stay."""
    for alias in node.names:
        if alias.name.split(".")[0] in ("trl", "peft"):
            report.left.append((number, f"import {alias.name}: see whether it is still needed"))
    if not any(alias.name == "unsloth" for alias in node.names):
        return None
    return [
        f"import rustune as {alias.asname or 'unsloth'}" if alias.name == "unsloth" else f"import {ast.unparse(alias)}"
        for alias in node.names
    ]


def _names(module: str | None) -> frozenset[str]:
    """What can be imported from one of our modules."""
    import importlib

    if module is None:
        return frozenset()
    loaded = importlib.import_module(module)
    public = getattr(loaded, "__all__", None) or [name for name in vars(loaded) if not name.startswith("_")]
    # `rustune.chat_templates` imports names of its own needs; only what it defines, or re-exports by name, is meant.
    return frozenset(name for name in public if not hasattr(getattr(loaded, name, None), "__path__"))
