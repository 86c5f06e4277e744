"""Chat templates by name; the functions that prepare conversations stand here too, where notebooks look for them."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Any, Final, NamedTuple

from rustune import checks
from rustune._native import ConfigError
from rustune.sharegpt import standardize_data_formats as standardize_data_formats
from rustune.sharegpt import standardize_sharegpt as standardize_sharegpt
from rustune.sharegpt import to_sharegpt as to_sharegpt
from rustune.text_templates import apply_chat_template as apply_chat_template
from rustune.trainer import train_on_responses_only as train_on_responses_only


class ChatTemplate(NamedTuple):
    """A template and how its turns end.

    Attributes:
        source: The Jinja text.
        eos_token: What ends a turn; None is the tokenizer's own eos token.
    """

    source: str
    eos_token: str | None


# Name to file and to what ends a turn there; several models share a format.
_NAMES: Final[dict[str, tuple[str, str | None]]] = {
    "chatml": ("chatml", "<|im_end|>"),
    "qwen-2.5": ("qwen-2.5", "<|im_end|>"),
    "qwen-3": ("qwen-3", "<|im_end|>"),
    "phi-4": ("phi-4", "<|im_end|>"),
    "llama-3": ("llama-3", "<|eot_id|>"),
    "llama-3.1": ("llama-3.1", "<|eot_id|>"),
    "llama-3.2": ("llama-3.1", "<|eot_id|>"),
    "llama-3.3": ("llama-3.1", "<|eot_id|>"),
    "llama": ("llama", None),
    "mistral": ("mistral", None),
    "zephyr": ("zephyr", None),
    "vicuna": ("vicuna", None),
    "alpaca": ("alpaca", None),
    "unsloth": ("unsloth", None),
    "phi-3": ("phi-3", "<|end|>"),
    "phi-3.5": ("phi-3", "<|end|>"),
    "gemma": ("gemma", "<end_of_turn>"),
    "gemma-2": ("gemma", "<end_of_turn>"),
    "gemma-3": ("gemma", "<end_of_turn>"),
}
# Spellings without dashes, as older notebooks have them: llama3, llama-31, qwen25, gemma2, phi3.
_SPELLINGS: Final[dict[str, str]] = {re.sub(r"[-._]", "", name): name for name in _NAMES}

# What looks like one token in a template: <|im_start|>, <start_of_turn>, [INST].
_TOKENS: Final = re.compile(r"<\|[a-z_]+\|>|<[a-z]+_of_[a-z]+>")


@cache
def _read(file: str) -> str:
    """A template that comes with the package."""
    return (resources.files("rustune") / "templates" / f"{file}.jinja").read_text(encoding="utf-8").rstrip("\n")


class _Templates(Mapping[str, ChatTemplate]):
    """Every known template; a file is read when its template is first asked for."""

    def __getitem__(self, name: str) -> ChatTemplate:
        file, eos_token = _NAMES[_SPELLINGS.get(re.sub(r"[-._]", "", name.lower()), name)]
        return ChatTemplate(_read(file), eos_token)

    def __iter__(self) -> Iterator[str]:
        return iter(_NAMES)

    def __len__(self) -> int:
        return len(_NAMES)


CHAT_TEMPLATES: Final[Mapping[str, ChatTemplate]] = _Templates()
"""Name to template; `print(list(CHAT_TEMPLATES))` lists them."""


def get_chat_template(
    tokenizer: Any,
    chat_template: str | Sequence[Any] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Any:
    """Gives a tokenizer a chat template, and the eos token that goes with it.

    Where what ends a turn is no token of the vocabulary, the template ends turns with the tokenizer's own eos token
    instead (`map_eos_token`). Other words of a template that the vocabulary lacks are encoded as ordinary text, with a
    warning: tokens the model has never seen cannot be added without training them.

    Args:
        tokenizer: Ours or one of transformers; it is changed.
        chat_template: A name of `CHAT_TEMPLATES`, or a pair of a Jinja text and what ends a turn there (None, or True
            for the tokenizer's own eos token).
        mapping: For conversations in another form, `{"role": "from", "content": "value", "user": "human",
            "assistant": "gpt"}`.
        map_eos_token: Whether the tokenizer's eos token is to end turns.
        system_message: What conversations without a system message begin with.

    Returns:
        The tokenizer.

    Raises:
        ConfigError: If there is no template of this name, or an argument makes no sense.
        TokenizerError: If the template is not valid Jinja.

    Example:
        >>> tokenizer = get_chat_template(tokenizer, "llama-3.1")  # doctest: +SKIP
    """
    if not hasattr(tokenizer, "convert_tokens_to_ids"):
        raise ConfigError(f"tokenizer = {type(tokenizer).__name__}: expected a tokenizer of rustune or transformers")
    checks.check({"system_message": checks.TEXT, "map_eos_token": checks.BOOL}, locals())
    if mapping is not None and not (
        isinstance(mapping, Mapping)
        and all(isinstance(word, str) and checks.is_unicode(word) for pair in mapping.items() for word in pair)
    ):
        raise ConfigError(f"mapping = {mapping!r}: expected texts by texts, as {{'role': 'from', 'content': 'value'}}")
    template = _find(chat_template)
    source = template.source
    if template.eos_token is not None and map_eos_token:
        known = _vocabulary_has(tokenizer, template.eos_token)
        if known:
            tokenizer.eos_token = template.eos_token
        elif tokenizer.eos_token is not None and template.eos_token in source:
            warnings.warn(
                f"{template.eos_token} is no token of this vocabulary: turns end with {tokenizer.eos_token} instead",
                stacklevel=2,
            )
            source = source.replace(template.eos_token, tokenizer.eos_token)
    foreign = sorted({token for token in _TOKENS.findall(source) if not _vocabulary_has(tokenizer, token)})
    if foreign:
        warnings.warn(
            f"no tokens of this vocabulary, so encoded as ordinary text: {', '.join(foreign)}; "
            "alpaca, vicuna and unsloth need no tokens of their own",
            stacklevel=2,
        )
    if "bos_token" in source and tokenizer.bos_token is None:
        source = "{%- set bos_token = '' -%}\n" + source
    if system_message is not None:
        system = json.dumps(system_message, ensure_ascii=False)
        source = (
            "{%- if messages[0]['role'] != 'system' -%}"
            f"{{%- set messages = [{{'role': 'system', 'content': {system}}}] + messages -%}}"
            "{%- endif -%}\n"
        ) + source
    if mapping:
        source = _from_other_form(mapping) + source
    tokenizer.chat_template = source
    return tokenizer


def _find(chat_template: str | Sequence[Any]) -> ChatTemplate:
    """The template meant by a name or a pair."""
    if isinstance(chat_template, str):
        try:
            return CHAT_TEMPLATES[chat_template]
        except KeyError:
            near = get_close_matches(chat_template, list(CHAT_TEMPLATES), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"chat_template = {chat_template!r}: expected one of {', '.join(CHAT_TEMPLATES)}, "
                f"or a pair (template, eos token){hint}"
            ) from None
    pair = isinstance(chat_template, Sequence) and len(chat_template) == 2
    source = chat_template[0] if pair else None
    if not isinstance(source, str):
        raise ConfigError(f"chat_template = {chat_template!r}: expected a name or a pair (template, eos token)")
    eos_token = chat_template[1]
    return ChatTemplate(source, eos_token if isinstance(eos_token, str) and eos_token != "eos_token" else None)


def _vocabulary_has(tokenizer: Any, token: str) -> bool:
    """Whether a text is one token, for our tokenizers and those of transformers."""
    found = tokenizer.convert_tokens_to_ids(token)
    return found is not None and (found != tokenizer.unk_token_id or token == tokenizer.unk_token)


def _from_other_form(mapping: Mapping[str, str]) -> str:
    """Jinja that brings messages of another form into `role` and `content`; messages in that form already stay."""
    role, content = mapping.get("role", "role"), mapping.get("content", "content")
    roles = {theirs: ours for ours, theirs in mapping.items() if ours not in ("role", "content")}
    table = json.dumps(roles, ensure_ascii=False)
    return (
        "{%- set form = namespace(messages=[]) -%}"
        "{%- for m in messages -%}"
        f"{{%- set role = m[{role!r}] if m[{role!r}] is defined else m['role'] -%}}"
        f"{{%- set content = m[{content!r}] if m[{content!r}] is defined else m['content'] -%}}"
        f"{{%- set form.messages = form.messages + [{{'role': {table}.get(role, role), 'content': content}}] -%}}"
        "{%- endfor -%}"
        "{%- set messages = form.messages -%}\n"
    )
