"""Datasets brought into the form of conversations: from ShareGPT's spelling, and from tables of plain columns."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, Final, NamedTuple

from rustune import _native, checks
from rustune._native import ConfigError, DataError
from rustune.data import Columns, iter_columns, listed

# {column}, and [[ a part left out where its first column is empty ]].
_COLUMN: Final = re.compile(r"\{([^{}\[\]]+)\}")
_OPTIONAL: Final = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)

_SHAREGPT_KINDS: Final = {
    "aliases_for_system": checks.TEXTS,
    "aliases_for_user": checks.TEXTS,
    "aliases_for_assistant": checks.TEXTS,
    "batch_size": checks.POSITIVE,
    "num_proc": checks.POSITIVE,
}
_TABLE_KINDS: Final = {
    "merged_prompt": checks.TEXT,
    "merged_column_name": checks.TEXT,
    "output_column_name": checks.TEXT,
    "remove_unused_columns": checks.BOOL,
    "conversation_extension": checks.POSITIVE,
    "random_state": checks.WHOLE,
}

_SYSTEM: Final = ("system",)
_USER: Final = ("user", "human", "input")
_ASSISTANT: Final = ("gpt", "assistant", "output")


def standardize_sharegpt(
    dataset: Any,
    tokenizer: Any = None,
    aliases_for_system: Sequence[str] = _SYSTEM,
    aliases_for_user: Sequence[str] = _USER,
    aliases_for_assistant: Sequence[str] = _ASSISTANT,
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> Any:
    """Brings conversations from ShareGPT's form (`from`, `value`, human, gpt) into the one templates take.

    What is in that form already stays, so it may be called twice.

    Args:
        dataset: A `datasets.Dataset`, a list of dicts, or anything else that can be trained on, with a column
            `conversations`, `messages` or `conversation`.
        tokenizer: Makes no difference.
        aliases_for_system: Further names of the role `system`.
        aliases_for_user: Further names of the role `user`.
        aliases_for_assistant: Further names of the role `assistant`.
        batch_size: Rows at a time, where `datasets` does it.
        num_proc: Processes, where `datasets` does it.

    Returns:
        The same kind of dataset for `datasets`; a list of dicts for everything else.

    Raises:
        DataError: If a role is unknown, or there is no such column.

    Example:
        >>> standardize_sharegpt([{"conversations": [{"from": "human", "value": "Hi"}]}])
        [{'conversations': [{'role': 'user', 'content': 'Hi'}]}]
    """
    checks.check(_SHAREGPT_KINDS, locals())
    aliases = {
        str(alias): role
        for role, named in (
            ("system", aliases_for_system),
            ("user", aliases_for_user),
            ("assistant", aliases_for_assistant),
        )
        for alias in checks.listed(named or ())
    }
    return mapped(
        dataset,
        partial(_standardize_batch, aliases),
        check=_conversations,
        batch_size=batch_size,
        num_proc=num_proc,
    )


standardize_data_formats = standardize_sharegpt


def to_sharegpt(
    dataset: Any,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Any:
    """Makes conversations of a table: the columns named in `merged_prompt` become a question, one column the answer.

    Args:
        dataset: A `datasets.Dataset`, a list of dicts, or anything else that can be trained on.
        merged_prompt: The question, with `{column}` where a column's text goes. A part in `[[double brackets]]` is
            left out where its first column is empty. Without one the question is `merged_column_name`.
        merged_column_name: The column of questions, if there is no `merged_prompt`.
        output_column_name: The column of answers.
        remove_unused_columns: Whether to keep `conversations` only.
        conversation_extension: Exchanges of a conversation: each row is followed by so many less one others, drawn
            at random, so that the model sees long conversations too.
        random_state: Seed of that draw.

    Returns:
        Rows with `conversations` in ShareGPT's form: the same kind of dataset for `datasets`, else a list of dicts.

    Raises:
        ConfigError: If the prompt has no column or its brackets do not match, or for a streamed dataset that is to be
            drawn from.
        DataError: If a column is not there.

    Example:
        >>> to_sharegpt([{"q": "2 + 2", "a": 4}], merged_prompt="Sum: {q}", output_column_name="a")
        [{'conversations': [{'from': 'human', 'value': 'Sum: 2 + 2'}, {'from': 'gpt', 'value': '4'}]}]
    """
    checks.check(_TABLE_KINDS, locals(), required=("output_column_name", "conversation_extension"))
    parts = _parse_prompt(merged_prompt or f"{{{merged_column_name}}}")
    wanted = dict.fromkeys([*(name for part in parts for name in part.columns), output_column_name])
    made = mapped(
        dataset,
        partial(_merge_batch, parts, output_column_name),
        check=partial(_have_columns, list(wanted)),
        keep_others=not remove_unused_columns,
    )
    return made if conversation_extension == 1 else _extend(made, conversation_extension, random_state)


class _Part(NamedTuple):
    """A piece of a merged prompt.

    Attributes:
        text: With `{column}` in it.
        columns: Those, in order.
        optional: Whether it is left out where the first column is empty.
    """

    text: str
    columns: tuple[str, ...]
    optional: bool


def mapped(
    dataset: Any,
    function: Callable[[Columns], Columns],
    *,
    check: Callable[[list[str]], Any],
    keep_others: bool = True,
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> Any:
    """Applies a function to a dataset of any kind, batch by batch.

    Args:
        dataset: What `iter_columns` takes.
        function: Columns in, columns out; one that can be pickled.
        check: Looks at the names of the columns first, and raises if something is missing.
        keep_others: Whether columns the function does not give are kept.
        batch_size: Rows at a time.
        num_proc: Processes, where `datasets` does it.

    Returns:
        The same kind of dataset for `datasets`; a list of dicts for everything else.
    """
    if isinstance(dataset, Mapping) and any(hasattr(split, "column_names") for split in dataset.values()):
        options: dict[str, Any] = {"check": check, "keep_others": keep_others, "batch_size": batch_size}
        splits = {name: mapped(split, function, num_proc=num_proc, **options) for name, split in dataset.items()}
        return _splits(dataset, splits)
    if hasattr(dataset, "map") and hasattr(dataset, "column_names"):  # datasets
        names = dataset.column_names
        if names is not None:
            check(list(names))
        settings: dict[str, Any] = {"batched": True, "batch_size": batch_size}
        if not keep_others:
            settings["remove_columns"] = names
        if num_proc is not None and hasattr(dataset, "num_rows"):
            settings["num_proc"] = num_proc
        return dataset.map(function, **settings)
    rows: list[dict[str, Any]] = []
    for columns in iter_columns(dataset, batch_size):
        check(list(columns))
        made = function(columns)
        whole = {**columns, **made} if keep_others else made
        rows.extend(dict(zip(whole, row, strict=True)) for row in zip(*whole.values(), strict=True))
    return rows


def _standardize_batch(aliases: Mapping[str, str], columns: Mapping[str, Any]) -> Columns:
    """The conversations of a batch; a function of the module, so that `datasets` can hash it."""
    name = _conversations(list(columns))
    return {name: [None if talk is None else standard_messages(talk, aliases) for talk in listed(columns[name])]}


def standard_messages(talk: Any, aliases: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Brings one conversation into `role` and `content` form.

    Args:
        talk: A list of messages, or Arrow's form of one, a dict of lists.
        aliases: Names of roles beside the usual ones, with what they mean.

    Returns:
        The messages.

    Raises:
        DataError: If a message has no role, no content or an unknown role.
    """
    aliases = aliases or {}
    turns = []
    # Arrow's columnar form of a list of dicts: a dict of lists.
    if isinstance(talk, Mapping) and talk:
        columns = {name: listed(values) if hasattr(values, "__len__") else [] for name, values in talk.items()}
        if any(isinstance(values, str) for values in talk.values()) or len({len(c) for c in columns.values()}) > 1:
            raise DataError(f"conversation: expected a list of messages, got a dict of {', '.join(map(str, talk))}")
        talk = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for turn in talk if isinstance(talk, Sequence) and not isinstance(talk, str) else []:
        if isinstance(turn, Mapping):
            field = "role" if turn.get("role") is not None else "from"
            role = turn.get(field)
            turn = {**turn, field: aliases.get(role, role)} if isinstance(role, str) else turn
        turns.append(turn)
    return _native.standard_messages(turns or talk)


def _conversations(columns: list[str]) -> str:
    """The column that holds conversations."""
    for name in ("conversations", "messages", "conversation"):
        if name in columns:
            return name
    raise DataError(f"column 'conversations': not in the dataset, whose columns are {columns}; nor is 'messages'")


def _parse_prompt(prompt: str) -> tuple[_Part, ...]:
    """A merged prompt in pieces."""
    if not isinstance(prompt, str):
        raise ConfigError(f"merged_prompt = {prompt!r}: expected a text with {{column}} in it")
    parts: list[_Part] = []
    end = 0
    for found in _OPTIONAL.finditer(prompt):
        parts.append(_part(prompt[end : found.start()], optional=False))
        inner = _part(found.group(1), optional=True)
        if not inner.columns:
            raise ConfigError(f"merged_prompt: the optional part [[{found.group(1)}]] names no {{column}}")
        parts.append(inner)
        end = found.end()
    parts.append(_part(prompt[end:], optional=False))
    if any("[[" in part.text or "]]" in part.text for part in parts):
        raise ConfigError(f"merged_prompt = {prompt!r}: its [[ and ]] do not match")
    if not any(part.columns for part in parts):
        raise ConfigError(f"merged_prompt = {prompt!r}: names no {{column}}")
    return tuple(part for part in parts if part.text)


def _part(text: str, *, optional: bool) -> _Part:
    return _Part(text, tuple(_COLUMN.findall(text)), optional)


def _have_columns(wanted: Sequence[str], columns: list[str]) -> None:
    """Refuses a dataset without these columns."""
    for name in wanted:
        if name not in columns:
            near = get_close_matches(name, columns, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"column {name!r}: not in the dataset, whose columns are {columns}{hint}")


def _merge_batch(parts: Sequence[_Part], output: str, columns: Mapping[str, Any]) -> Columns:
    """The conversations of a batch of plain columns."""
    names = dict.fromkeys([*(name for part in parts for name in part.columns), output])
    plain = {name: [_text(value) for value in listed(columns[name])] for name in names}
    talks = []
    for i, answer in enumerate(plain[output]):
        question = "".join(
            _COLUMN.sub(lambda found, i=i: plain[found.group(1)][i], part.text)  # type: ignore[misc]
            for part in parts
            if not (part.optional and not plain[part.columns[0]][i].strip())
        )
        talks.append([{"from": "human", "value": question}, {"from": "gpt", "value": answer}])
    return {"conversations": talks}


def _text(value: Any) -> str:
    """A cell as text; what tables use for nothing is empty."""
    return "" if value is None or value != value else str(value)


def _extend(dataset: Any, exchanges: int, seed: int) -> Any:
    """Every conversation followed by others of the dataset, drawn at random."""
    if isinstance(dataset, Mapping):
        return _splits(dataset, {name: _extend(split, exchanges, seed) for name, split in dataset.items()})
    if not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"conversation_extension = {exchanges}: a streamed dataset cannot be drawn from; take rows of it first"
        )
    talks = (
        list(dataset["conversations"]) if hasattr(dataset, "column_names") else [r["conversations"] for r in dataset]
    )
    longer = [list(talk) for talk in talks]
    draw = random.Random(seed)
    for _ in range(exchanges - 1):
        order = list(range(len(talks)))
        draw.shuffle(order)
        for talk, other in zip(longer, order, strict=True):
            talk.extend(talks[other])
    if hasattr(dataset, "column_names"):
        return dataset.map(partial(_replace_batch, longer), with_indices=True, batched=True)
    return [{**row, "conversations": talk} for row, talk in zip(dataset, longer, strict=True)]


def _splits(dataset: Any, splits: dict[Any, Any]) -> Any:
    """A dict of splits of the same kind."""
    return type(dataset)(splits)


def _replace_batch(talks: Sequence[Any], columns: Mapping[str, Any], indices: Sequence[int]) -> Columns:
    return {"conversations": [talks[i] for i in indices]}
