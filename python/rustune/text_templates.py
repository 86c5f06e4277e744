"""Templates written as the text itself, with {INPUT} and {OUTPUT}: made chat templates, and applied to datasets."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from rustune import checks
from rustune._native import ConfigError, DataError
from rustune.data import Columns, listed
from rustune.sharegpt import mapped, standard_messages

_KINDS: Final = {
    "chat_template": checks.TEXT,
    "default_system_message": checks.TEXT,
    "extra_eos_tokens": checks.TEXTS,
}
_INSTRUCTION: Final = "### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}"
DEFAULT_TEMPLATE: Final = (
    "Below are some instructions that describe some tasks. Write responses that appropriately complete each request."
    f"\n\n{_INSTRUCTION}\n\n{_INSTRUCTION}"
)
"""What `apply_chat_template` uses if no template is given: two exchanges in Alpaca's headings."""


def apply_chat_template(
    dataset: Any,
    tokenizer: Any = None,
    chat_template: str = DEFAULT_TEMPLATE,
    default_system_message: str | None = None,
    extra_eos_tokens: Sequence[str] | None = None,
) -> Any:
    """Gives the tokenizer the chat template a text shows, and a dataset of conversations the column `text`.

    The text shows two exchanges, `{INPUT}` where a question goes and `{OUTPUT}` where an answer goes; `{SYSTEM}`, if it
    is there, is where the system message goes. What stands after the last `{OUTPUT}` ends every answer; the
    tokenizer's eos token is put there if no token of the vocabulary does.

    Args:
        dataset: A `datasets.Dataset`, a list of dicts, or anything else that can be trained on, with `conversations`
            or `messages`.
        tokenizer: Ours or one of transformers; its chat template is set.
        chat_template: The text.
        default_system_message: For `{SYSTEM}`, where a conversation has no system message.
        extra_eos_tokens: Further tokens that may end an answer.

    Returns:
        The same kind of dataset for `datasets`, else a list of dicts; with `text`.

    Raises:
        ConfigError: If the text does not show two equal exchanges.
        DataError: If there is no column of conversations.
        TokenizerError: If a conversation has turns the text has no place for.

    Example:
        >>> dataset = apply_chat_template(dataset, tokenizer)  # doctest: +SKIP
    """
    if not callable(getattr(tokenizer, "apply_chat_template", None)):
        raise ConfigError(f"tokenizer = {type(tokenizer).__name__}: expected a tokenizer of rustune or transformers")
    checks.check(_KINDS, locals(), required=("chat_template",))
    source = jinja_of_text(tokenizer, chat_template, default_system_message, checks.listed(extra_eos_tokens or ()))
    tokenizer.chat_template = source
    # Rendered by our own tokenizer where it is ours: then `datasets` hashes its contents, not its address.
    return mapped(dataset, partial(_render_batch, tokenizer), check=_talks)


def jinja_of_text(
    tokenizer: Any, chat_template: str, default_system_message: str | None, extra_eos_tokens: Sequence[str]
) -> str:
    """Turns a text that shows exchanges into a Jinja template with marked answers.

    Args:
        tokenizer: Names the tokens that end a text.
        chat_template: The text.
        default_system_message: For `{SYSTEM}`.
        extra_eos_tokens: Further tokens that may end an answer.

    Returns:
        The template.

    Raises:
        ConfigError: If the text does not show one exchange, or two equal ones.
    """
    if not isinstance(chat_template, str):
        raise ConfigError(f"chat_template = {chat_template!r}: expected a text with {{INPUT}} and {{OUTPUT}}")
    opening, question, answer, end = _exchanges(chat_template)
    if chat_template.count("{SYSTEM}") != opening.count("{SYSTEM}") or opening.count("{SYSTEM}") > 1:
        raise ConfigError("chat_template: {SYSTEM} belongs before the first {INPUT}, once")
    stops = [stop for stop in (tokenizer.eos_token, *extra_eos_tokens) if stop]
    marked = end.strip()
    if not any(stop in end for stop in stops):
        if marked and _is_token(tokenizer, marked):
            stops = [marked]
        elif not stops:
            raise ConfigError("chat_template: the tokenizer has no eos token, so answers would never end; set one")
        else:
            end = stops[0] + end
    # What comes after the token that ends the answer (a line break) is not the model's to say.
    cut = max((end.rfind(stop) + len(stop) for stop in stops if stop in end), default=len(end))
    said, after = end[:cut], end[cut:]
    system, has_place = _system(opening, default_system_message)
    turns = "messages[1:] if messages[0]['role'] == 'system' else messages" if has_place else "messages"
    return (
        f"{system}"
        f"{{%- set turns = {turns} -%}}"
        "{%- for message in turns -%}"
        "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}"
        "{{- raise_exception('this template has place for user, assistant, user, ... only, not for '"
        " + message['role'] + ' there') -}}"
        "{%- endif -%}"
        "{%- if message['role'] == 'user' -%}"
        f"{{{{- ({_quoted(_question_of(opening))} if loop.first else {_quoted(question)}) + message['content']"
        f" + {_quoted(answer)} -}}}}"
        "{%- else -%}"
        "{%- generation -%}"
        f"{{{{- message['content'] + {_quoted(said)} -}}}}"
        "{%- endgeneration -%}"
        f"{{{{- {_quoted(after)} -}}}}"
        "{%- endif -%}"
        "{%- endfor -%}"
    )


def _exchanges(text: str) -> tuple[str, str, str, str]:
    """What stands before the first question, before later ones, between question and answer, and after an answer."""
    inputs, outputs = text.count("{INPUT}"), text.count("{OUTPUT}")
    if inputs != outputs or inputs not in (1, 2):
        raise ConfigError(
            f"chat_template: expected two exchanges, each with {{INPUT}} and {{OUTPUT}}; "
            f"it has {inputs} {{INPUT}} and {outputs} {{OUTPUT}}"
        )
    pieces = []
    rest = text
    for place in ("{INPUT}", "{OUTPUT}") * inputs:
        before, found, rest = rest.partition(place)
        if not found or "{INPUT}" in before or "{OUTPUT}" in before:
            raise ConfigError("chat_template: expected {INPUT} before {OUTPUT} in each exchange")
        pieces.append(before)
    opening, answer, end = pieces[0], pieces[1], rest
    if inputs == 1:
        return opening, _question_of(opening), answer, end
    between = pieces[2]
    if pieces[3] != answer:
        raise ConfigError(
            f"chat_template: its two exchanges differ: {answer!r} stands before the first answer and {pieces[3]!r} "
            "before the second"
        )
    # What ends the last answer ends the first one too.
    question = between[len(end) :] if end and between.startswith(end) else between
    return opening, question, answer, end


def _question_of(opening: str) -> str:
    """What opens the first question: all that stands before it, but for a system message's part."""
    return opening.split("{SYSTEM}", 1)[1] if "{SYSTEM}" in opening else opening


def _system(opening: str, default: str | None) -> tuple[str, bool]:
    """Jinja for what stands before the conversation, and whether a system message has a place there."""
    if "{SYSTEM}" not in opening:
        if default is not None:
            warnings.warn("default_system_message: not used, since chat_template has no {SYSTEM}", stacklevel=4)
        return "", False
    before = opening.split("{SYSTEM}", 1)[0]
    absent = f"{{{{- {_quoted(default or '')} -}}}}"
    if default is None:
        absent = (
            "{{- raise_exception('a conversation has no system message; give default_system_message for {SYSTEM}') -}}"
        )
    return (
        f"{{{{- {_quoted(before)} -}}}}"
        "{%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] -}}"
        f"{{%- else -%}}{absent}{{%- endif -%}}"
    ), True


def _quoted(text: str) -> str:
    """A text as Jinja writes it; braces are kept apart so that it is never read as a tag."""
    return json.dumps(text, ensure_ascii=False).replace("{%", '{" + "%').replace("{{", '{" + "{')


def _is_token(tokenizer: Any, text: str) -> bool:
    found = tokenizer.convert_tokens_to_ids(text)
    return found is not None and found != tokenizer.unk_token_id


def _talks(columns: list[str]) -> str:
    """The column of conversations."""
    for name in ("conversations", "messages"):
        if name in columns:
            return name
    raise DataError(
        f"column 'conversations': not in the dataset, whose columns are {columns}; "
        "to_sharegpt makes it of plain columns"
    )


def _render_batch(tokenizer: Any, columns: Mapping[str, Any]) -> Columns:
    """The texts of a batch of conversations; a function of the module, so that `datasets` can hash it."""
    talks = listed(columns[_talks(list(columns))])
    return {
        "text": [
            None if talk is None else tokenizer.apply_chat_template(standard_messages(talk), tokenize=False)
            for talk in talks
        ]
    }
