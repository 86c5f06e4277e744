"""Settings of a whole run in one file: JSON, TOML or YAML, with what the command line adds to it."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from rustune._native import ConfigError
from rustune.config import _ALIASES, SFTConfig, unknown_argument

# Where the data come from; the other sections are the arguments of functions that have their own names for them.
_DATA: Final = (
    "train",
    "eval",
    "text_field",
    "chat_template",
    "system_message",
    "responses_only",
    "instruction_part",
    "response_part",
)
# YAML 1.2's numbers and truth values. PyYAML keeps to 1.1, where 2e-4 is a text, and `no` is False.
_FLOAT: Final = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf)$|^\.(nan|NaN)$")
_BOOL: Final = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")


def sections() -> dict[str, tuple[str, ...]]:
    """Lists what may be written.

    Returns:
        Section to the names it may hold: `model` those of `from_pretrained`, `lora` those of `get_peft_model`, `data`,
        and `training` the fields of `SFTConfig`.
    """
    from rustune import FastLanguageModel

    def arguments(function: Any) -> tuple[str, ...]:
        plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return tuple(name for name, made in inspect.signature(function).parameters.items() if made.kind in plain)

    return {
        "model": tuple(arguments(FastLanguageModel.from_pretrained)),
        "lora": arguments(FastLanguageModel.get_peft_model)[1:],
        "data": _DATA,
        "training": tuple([entry.name for entry in fields(SFTConfig)] + list(_ALIASES)),
    }


def read(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Reads a file of settings.

    Args:
        path: A .json, .toml, .yaml or .yml file.

    Returns:
        Section to name to value. `model: NAME` is short for `model: {model_name: NAME}`.

    Raises:
        ConfigError: If it cannot be parsed, a package is missing, or a name is unknown.
        FileNotFoundError: If it is not there.
    """
    file = Path(path)
    text = file.read_text(encoding="utf-8")
    kind = file.suffix.lower()
    try:
        if kind == ".json":
            written = json.loads(text)
        elif kind == ".toml":
            written = _toml(text, file)
        elif kind in (".yaml", ".yml"):
            written = _yaml(text, file)
        else:
            raise ConfigError(f"{file}: expected a .yaml, .toml or .json file")
    except ConfigError:
        raise
    except Exception as error:  # each parser has its own; what they say tells line and column
        raise ConfigError(f"{file}: cannot be parsed: {' '.join(str(error).split())}") from None
    return checked({} if written is None else written, str(file))


def checked(written: Any, where: str) -> dict[str, dict[str, Any]]:
    """Checks sections and names.

    Args:
        written: What was parsed.
        where: What errors name.

    Returns:
        The sections.

    Raises:
        ConfigError: If a section or a name is unknown, with the nearest known one.
    """
    known = sections()
    if not isinstance(written, Mapping):
        raise ConfigError(f"{where}: expected the sections {', '.join(known)}, got {type(written).__name__}")
    made: dict[str, dict[str, Any]] = {}
    for section, names in written.items():
        if section not in known:
            home = next((name for name, inside in known.items() if section in inside), None)
            if home is not None:
                raise ConfigError(f"{where}: {section}: belongs into the section {home}")
            raise unknown_argument(where, str(section), known)
        if section == "model" and isinstance(names, str):
            names = {"model_name": names}
        if names is None:
            names = {}
        if not isinstance(names, Mapping):
            raise ConfigError(f"{where}: {section}: expected names and values, got {type(names).__name__}")
        for name in names:
            if name not in known[section]:
                raise unknown_argument(f"{where}: {section}", str(name), known[section])
        made[section] = dict(names)
    return made


def value(text: str) -> Any:
    """Understands a value as it is written on a command line.

    Args:
        text: `2e-4`, `true`, `[1, 2]`, `null`, or any other text.

    Returns:
        A number, truth value, list, mapping, None or the text.

    Example:
        >>> value("2e-4"), value("True"), value("cosine")
        (0.0002, True, 'cosine')
    """
    plain = {"True": True, "False": False, "None": None, "": ""}
    if text in plain:
        return plain[text]
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return float(text) if _FLOAT.match(text) else text
    except ValueError:
        return text


def _toml(text: str, file: Path) -> Any:
    try:
        tomllib = importlib.import_module("tomllib")
    except ImportError:
        raise ConfigError(f"{file}: TOML needs Python 3.11 or newer; write it as JSON or YAML") from None
    return tomllib.loads(text)


def _yaml(text: str, file: Path) -> Any:
    try:
        import yaml
    except ImportError:
        raise ConfigError(
            f"{file}: YAML needs the package PyYAML, which is not installed; pip install PyYAML (or rustune[cli]),"
            " or write it as JSON or TOML"
        ) from None

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        """Safe, and with YAML 1.2's numbers and truth values."""

    Loader.yaml_implicit_resolvers = {
        sign: [(tag, form) for tag, form in forms if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")]
        for sign, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
    # After the whole numbers, which also fit this form.
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    return yaml.load(text, Loader=Loader)
