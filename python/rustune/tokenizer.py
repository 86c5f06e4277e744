"""The tokenizer users hold: callable, with chat templates, padding and the names transformers gave these things."""

from __future__ import annotations

import inspect
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from rustune import _native, checks, hub
from rustune._native import ConfigError, DataError, TokenizerError
from rustune.notices import sort_arguments, unknown_argument

IGNORE: Final = -100
"""The label of a token that is not trained."""

_LONGEST: Final = 1 << 24  # no text is longer; a slip of the keyboard must not eat the memory
_TENSORS: Final = ("np", "pt", "numpy", "torch")
_NO_LIMIT: Final = int(1e30)  # how transformers writes "no limit"

_CALL_KINDS: Final = {
    "add_special_tokens": checks.BOOL,
    "padding": checks.SWITCH,
    "truncation": checks.SWITCH,
    "max_length": checks.NATURAL,
    "return_tensors": checks.TEXT,
    "padding_side": checks.TEXT,
    "pad_to_multiple_of": checks.NATURAL,
    "return_attention_mask": checks.BOOL,
    "return_offsets_mapping": checks.BOOL,
    "return_length": checks.BOOL,
}
_CHAT_KINDS: Final = {
    "tools": checks.LIST,
    "documents": checks.LIST,
    "chat_template": checks.TEXT,
    "add_generation_prompt": checks.BOOL,
    "continue_final_message": checks.BOOL,
    "tokenize": checks.BOOL,
    "return_dict": checks.BOOL,
    "return_assistant_tokens_mask": checks.BOOL,
    "tokenizer_kwargs": checks.TABLE,
    "return_tensors": checks.TEXT,
}
# What transformers' loaders of tokenizers take that means nothing here.
HABITS: Final = (
    "use_fast",
    "legacy",
    "use_auth_token",
    "trust_remote_code",
    "add_prefix_space",
    "clean_up_tokenization_spaces",
)
# What transformers' tokenizers take besides.
_ELSEWHERE: Final = (
    "is_split_into_words",
    "return_overflowing_tokens",
    "return_special_tokens_mask",
    "stride",
    "text_pair",
    "text_pair_target",
    "text_target",
)

# rayon's threads do not survive a fork, and `datasets.map(num_proc=2)` forks.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_native.mark_forked_child)


class TokenArray(np.ndarray[Any, np.dtype[np.int64]]):
    """A numpy array of ids that also answers the few questions notebooks ask a tensor.

    Example:
        >>> ids = as_tokens([[1, 2]])
        >>> ids.to("cuda").shape
        (1, 2)
    """

    @property
    def device(self) -> Literal["cpu"]:
        """Where the ids are."""
        return "cpu"

    def to(self, *_: object, **__: object) -> TokenArray:
        """Returns the array itself: there is one device."""
        return self

    def cpu(self) -> TokenArray:
        """Returns the array itself."""
        return self

    def cuda(self, *_: object, **__: object) -> TokenArray:
        """Returns the array itself: there is one device."""
        return self

    def detach(self) -> TokenArray:
        """Returns the array itself: it carries no gradient."""
        return self

    def numpy(self) -> NDArray[np.int64]:
        """Returns the ids as a plain array."""
        return np.asarray(self)

    def unsqueeze(self, axis: int) -> TokenArray:
        """Returns the array with one more axis.

        Args:
            axis: Where the axis of length 1 goes.

        Returns:
            A view.
        """
        return np.expand_dims(self, axis).view(TokenArray)

    def dim(self) -> int:
        """Returns the number of axes."""
        return self.ndim

    def numel(self) -> int:
        """Returns the number of elements."""
        return self.size

    def clone(self) -> TokenArray:
        """Returns a copy."""
        made: TokenArray = self.copy()
        return made

    def long(self) -> TokenArray:
        """Returns the array as int64."""
        return as_tokens(self)


def as_tokens(values: Any) -> TokenArray:
    """Makes a `TokenArray` of nested lists of numbers.

    Args:
        values: Lists of equal lengths.

    Returns:
        An int64 array.
    """
    return np.asarray(values, dtype=np.int64).view(TokenArray)


class BatchEncoding(dict[str, Any]):
    """What calling a tokenizer gives: a dict whose keys are attributes too.

    Example:
        >>> batch = BatchEncoding(input_ids=[[1, 2]])
        >>> batch.to("cuda").input_ids is batch["input_ids"]
        True
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name}; there are {', '.join(self)}") from None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `input_ids`."""
        return np.shape(self["input_ids"])

    @property
    def data(self) -> dict[str, Any]:
        """The same as a plain dict."""
        return dict(self)

    def to(self, *_: object, **__: object) -> BatchEncoding:
        """Returns the batch itself: there is one device."""
        return self


def _role(role: str) -> Any:
    """A special token as an attribute."""

    def read(self: Tokenizer) -> str | None:
        return self.native.special(role)

    def write(self: Tokenizer, token: object) -> None:
        self.set_special_token(role, token)

    return property(read, write, doc=f"The {role.removesuffix('_token')} token, or None.")


def _role_id(role: str) -> Any:
    """A special token's id as an attribute."""

    def read(self: Tokenizer) -> int | None:
        token = self.native.special(role)
        return None if token is None else self.native.token_to_id(token)

    def write(self: Tokenizer, token_id: int) -> None:
        known = checks.NATURAL.fits(token_id) and token_id < 2**32
        token = self.native.id_to_token(int(token_id)) if known else None
        if token is None:
            raise ConfigError(f"{role}_id = {token_id!r}: expected an id below {len(self)}")
        self.set_special_token(role, token)

    return property(read, write, doc=f"The id of the {role.removesuffix('_token')} token, or None.")


class Tokenizer:
    """A vocabulary with its special tokens and chat templates.

    Args:
        native: The compiled tokenizer.
        name_or_path: What it was loaded by.

    Attributes:
        native: The compiled tokenizer.
        name_or_path: What it was loaded by.

    Example:
        >>> tokenizer = Tokenizer.from_folder("path/to/llama")  # doctest: +SKIP
        >>> tokenizer(["Hi", "Good day"], padding=True, return_tensors="np").shape  # doctest: +SKIP
        (2, 3)
    """

    is_fast = True
    model_input_names = ("input_ids", "attention_mask")
    truncation_side = "right"

    bos_token = _role("bos_token")
    eos_token = _role("eos_token")
    unk_token = _role("unk_token")
    sep_token = _role("sep_token")
    pad_token = _role("pad_token")
    cls_token = _role("cls_token")
    mask_token = _role("mask_token")
    bos_token_id = _role_id("bos_token")
    eos_token_id = _role_id("eos_token")
    unk_token_id = _role_id("unk_token")
    sep_token_id = _role_id("sep_token")
    pad_token_id = _role_id("pad_token")
    cls_token_id = _role_id("cls_token")
    mask_token_id = _role_id("mask_token")

    def __init__(self, native: _native.Tokenizer, name_or_path: str = "") -> None:
        self.native = native
        self.name_or_path = name_or_path

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer | None:
        """Opens the tokenizer in a folder.

        Args:
            folder: Where `tokenizer.json` is.

        Returns:
            The tokenizer; None if the folder has no vocabulary.

        Raises:
            FileNotFoundError: If there is no such folder.
            TokenizerError: If a file makes no sense.
        """
        native = _native.Tokenizer.from_folder(os.fspath(folder))
        return None if native is None else cls(native, os.fspath(folder))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        token: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        **others: Any,
    ) -> Tokenizer:
        """Opens the tokenizer of a folder or a hub repository.

        Args:
            pretrained_model_name_or_path: A folder, or `owner/name`.
            token: For private repositories.
            revision: A branch, tag or commit.
            cache_dir: Where downloads are kept.
            local_files_only: Whether to look at what was downloaded before only.
            **others: What transformers takes and means nothing here, such as `use_fast`.

        Returns:
            The tokenizer.

        Raises:
            ConfigError: For an argument that does not exist.
            TokenizerError: If there is no vocabulary.
            HubError: If the repository cannot be had.
        """
        known = inspect.signature(cls.from_pretrained).parameters
        for other in others:
            if other not in HABITS:
                raise unknown_argument("Tokenizer.from_pretrained", other, (*known, *HABITS))
        name = os.fspath(pretrained_model_name_or_path)
        folder = name
        if not Path(name).is_dir():
            folder = os.fspath(_native.resolve_model(name, revision, token, cache_dir, local_files_only))
        found = cls.from_folder(folder)
        if found is None:
            raise TokenizerError(f"{name}: expected tokenizer.json (or vocab.json and merges.txt)")
        found.name_or_path = name
        return found

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        # The state is one text, the same for equal tokenizers: `datasets` caches by the hash of the pickle.
        return _restore, (self.native.to_state(), self.name_or_path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.content_hash == other.content_hash

    def __hash__(self) -> int:
        return hash(self.content_hash)

    def __len__(self) -> int:
        return len(self.native)

    def __contains__(self, token: str) -> bool:
        return self.native.token_to_id(token) is not None

    def __repr__(self) -> str:
        special = ", ".join(f"{role}={token!r}" for role, token in self.native.special_tokens().items())
        return f"Tokenizer({self.name_or_path!r}, {len(self)} tokens, {special})"

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
        return_token_type_ids: bool | None = None,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        verbose: bool = True,
        **others: Any,
    ) -> BatchEncoding:
        """Turns texts into ids.

        Args:
            text: One text or several.
            add_special_tokens: Whether to add what the vocabulary's post-processor adds, usually a BOS.
            padding: True or "longest" fills rows up to the longest, "max_length" up to `max_length`.
            truncation: Whether to cut rows at `max_length`.
            max_length: The limit in tokens; `model_max_length` if not given.
            return_tensors: "np" or "pt" gives arrays `[batch, seq]`; None gives lists.
            return_attention_mask: Whether to give 1 for text and 0 for padding.
            return_token_type_ids: Ignored: decoder models have none.
            return_offsets_mapping: Whether to give the characters each token stands for.
            return_length: Whether to give the number of tokens of each row.
            padding_side: "left" or "right"; `padding_side` of the tokenizer if not given.
            pad_to_multiple_of: Makes the padded length a multiple of this.
            verbose: Ignored.
            **others: What transformers' tokenizers take besides; an error that names it if it asks for anything.

        Returns:
            `input_ids` and `attention_mask`; a single text with `return_tensors=None` gives flat lists.

        Raises:
            ConfigError: For an argument that cannot be used, or does not exist.
            DataError: If `text` is no text, or rows of different lengths are to become an array.
        """
        checks.check(_CALL_KINDS, locals())
        if others:
            _refuse("tokenizer(...)", others)
        single = isinstance(text, str)
        texts = _texts([text] if isinstance(text, str) else text)
        offsets: list[list[tuple[int, int]]] | None = None
        if return_offsets_mapping:
            pairs = [self.native.encode_with_offsets(one, bool(add_special_tokens)) for one in texts]
            rows, offsets = [ids for ids, _ in pairs], [spans for _, spans in pairs]
        else:
            rows = self.native.encode_batch(texts, bool(add_special_tokens))
        limit = self._limit(truncation, max_length)
        rows = [row[:limit] for row in rows]
        columns: dict[str, list[Any]] = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        if offsets is not None:
            columns["offset_mapping"] = [row[:limit] for row in offsets]
        if return_length:
            columns["length"] = [len(row) for row in rows]
        if not return_attention_mask:
            del columns["attention_mask"]
        self._pad(columns, padding, max_length, padding_side, pad_to_multiple_of)
        return _finish(columns, single=single, return_tensors=return_tensors)

    def encode(
        self, text: str, add_special_tokens: bool = True, *, return_tensors: str | None = None, **options: Any
    ) -> Any:
        """Turns one text into ids.

        Args:
            text: The text.
            add_special_tokens: Whether to add a BOS and the like.
            return_tensors: "np" or "pt" gives an array `[1, seq]`.
            **options: As of calling the tokenizer.

        Returns:
            A list of ids, or an array.
        """
        return self(text, add_special_tokens=add_special_tokens, return_tensors=return_tensors, **options).input_ids

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """Turns one text into tokens as the vocabulary spells them.

        Args:
            text: The text.
            add_special_tokens: Whether to add a BOS and the like.

        Returns:
            The tokens.
        """
        (ids,) = self([text], add_special_tokens=add_special_tokens).input_ids
        return [self.native.id_to_token(i) or "" for i in ids]

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> Any:
        """Turns ids into text.

        Args:
            token_ids: One id, or a list, array or tensor of them; negative ones (masked labels) are left out. Rows of
                ids, as of `batch_decode`, give a list.
            skip_special_tokens: Whether to leave out special tokens.
            clean_up_tokenization_spaces: Ignored: the text is what the tokens spell.

        Returns:
            The text.

        Raises:
            DataError: If these are no ids.
        """
        plain = _plain(token_ids)
        if isinstance(plain, (list, tuple)) and any(isinstance(_plain(row), (list, tuple)) for row in plain):
            return self.batch_decode(plain, skip_special_tokens)
        return self.native.decode(_ids(plain), bool(skip_special_tokens))

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        """Turns rows of ids into texts.

        Args:
            sequences: `[batch, seq]`: lists, an array or a tensor.
            skip_special_tokens: Whether to leave out special tokens.
            clean_up_tokenization_spaces: Ignored.

        Returns:
            A text for each row.
        """
        rows = _plain(sequences)
        if isinstance(rows, (str, bytes)) or not isinstance(rows, Iterable):
            raise DataError(f"decode: expected rows of ids, got {type(sequences).__name__}")
        return [self.native.decode(_ids(row), bool(skip_special_tokens)) for row in rows]

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """Looks tokens up.

        Args:
            tokens: One token or several.

        Returns:
            The id, or a list of ids; the unk token's for a token that is not in the vocabulary (None without one).
        """
        if isinstance(tokens, str):
            found = self.native.token_to_id(tokens) if checks.is_unicode(tokens) else None
            return self.unk_token_id if found is None else found
        if not checks.TEXTS.fits(tokens) and not isinstance(tokens, Iterable):
            raise DataError(f"convert_tokens_to_ids: expected a token or a list of them, got {type(tokens).__name__}")
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Looks ids up.

        Args:
            ids: One id or several.
            skip_special_tokens: Whether to leave out special tokens.

        Returns:
            The token, or a list of tokens, as the vocabulary spells them.
        """
        plain = _plain(ids)
        if isinstance(plain, int):
            (token,) = self.convert_ids_to_tokens([plain])
            return token
        special = set(self.all_special_ids) if skip_special_tokens else set()
        if not checks.WHOLES.fits(plain):
            raise DataError(f"convert_ids_to_tokens: expected an id or a list of them, got {type(ids).__name__}")
        return [self.native.id_to_token(i) if 0 <= i < 2**32 else None for i in plain if i not in special]

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        *,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        **others: Any,
    ) -> BatchEncoding:
        """Fills rows of ids up to one length.

        Args:
            encoded_inputs: A dict of lists of rows, or a list of dicts with a row each; `labels` are filled with -100.
            padding: As of calling the tokenizer.
            max_length: As of calling the tokenizer.
            padding_side: As of calling the tokenizer.
            pad_to_multiple_of: As of calling the tokenizer.
            return_tensors: As of calling the tokenizer.
            **others: `verbose` and `return_attention_mask`, which make no difference.

        Returns:
            The filled rows.

        Raises:
            ConfigError: For an argument that cannot be used, or does not exist.
            DataError: If there are no rows of ids, or they cannot be one array.
        """
        checks.check(_CALL_KINDS, locals())
        for name in others:
            if name not in ("verbose", "return_attention_mask"):
                raise unknown_argument("tokenizer.pad", name, inspect.signature(Tokenizer.pad).parameters)
        _check_rows(encoded_inputs)
        if isinstance(encoded_inputs, Mapping):
            columns = {name: [list(_plain(row)) for row in rows] for name, rows in encoded_inputs.items()}
        else:
            names = list(encoded_inputs[0]) if encoded_inputs else []
            columns = {name: [_plain(row[name]) for row in encoded_inputs] for name in names}
        columns.setdefault("attention_mask", [[1] * len(row) for row in columns.get("input_ids", [])])
        self._pad(columns, padding, max_length, padding_side, pad_to_multiple_of)
        return _finish(columns, single=False, return_tensors=return_tensors)

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **template_variables: Any,
    ) -> Any:
        """Renders a conversation as the model's chat template has it.

        Args:
            conversation: Messages with `role` and `content`, or a list of such conversations.
            tools: JSON schemas of functions the model may call.
            documents: For templates that cite.
            chat_template: A template, or the name of one of the tokenizer's, instead of its default.
            add_generation_prompt: Whether to end with what opens an answer.
            continue_final_message: Whether to leave the last message open.
            tokenize: Whether to give ids; False gives the text.
            padding: As of calling the tokenizer.
            truncation: As of calling the tokenizer.
            max_length: As of calling the tokenizer.
            return_tensors: "np" or "pt" gives arrays `[batch, seq]`.
            return_dict: Whether to give a dict with `attention_mask` too.
            return_assistant_tokens_mask: Whether to give `assistant_masks`: 1 where the template marks an answer with
                `{% generation %}`.
            tokenizer_kwargs: More arguments for calling the tokenizer.
            **template_variables: For the template; `date_string` keeps one that prints the date the same every day.

        Returns:
            Text, ids, an array or a dict, for one conversation or for each.

        Raises:
            TokenizerError: If there is no template, or it refuses the conversation.
            ConfigError: If options contradict each other.
        """
        checks.check(_CHAT_KINDS, locals())
        if continue_final_message and add_generation_prompt:
            raise ConfigError("continue_final_message = True: not together with add_generation_prompt")
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ConfigError("return_assistant_tokens_mask = True: needs tokenize=True and return_dict=True")
        single = _is_conversation(conversation)
        variables = {**template_variables, **({} if documents is None else {"documents": list(documents)})}
        texts, marks = [], []
        for talk in [conversation] if single else conversation:
            messages = _messages(talk.messages if hasattr(talk, "messages") else talk)
            text, answers = self.native.render(
                messages,
                tools=None if tools is None else list(tools),
                add_generation_prompt=bool(add_generation_prompt),
                variables=variables,
                template=chat_template,
            )
            texts.append(_left_open(text, messages[-1]) if continue_final_message else text)
            marks.append(answers)
        if not tokenize:
            return texts[0] if single else texts
        batch = self(
            texts[0] if single else texts,
            add_special_tokens=False,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=None,
            return_offsets_mapping=return_assistant_tokens_mask,
            **(tokenizer_kwargs or {}),
        )
        if return_assistant_tokens_mask:
            if not any(marks):
                warnings.warn("the chat template has no {% generation %} block: no token is an answer", stacklevel=2)
            spans = batch.pop("offset_mapping")
            rows = [_inside(row, answers) for row, answers in zip([spans] if single else spans, marks, strict=True)]
            batch["assistant_masks"] = rows[0] if single else rows
        if return_tensors is not None:
            columns = {name: [rows] if single else rows for name, rows in batch.items()}
            batch = _finish(columns, single=single, return_tensors=return_tensors)
        return batch if return_dict else batch.input_ids

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **others: Any
    ) -> tuple[str, ...]:
        """Writes the tokenizer's files; transformers and tokenizers read them too.

        Args:
            save_directory: The folder; made if need be.
            push_to_hub: Whether to upload them too; then `repo_id` (the folder's name if not given), `token`,
                `private` and the like are as of `push_to_hub`.
            **others: What transformers takes and means nothing here.

        Returns:
            The files.

        Raises:
            ConfigError: For an argument that does not exist.
            OSError: If a file cannot be written, or the hub not be reached.
        """
        options = {name: others.pop(name) for name in hub.ARGUMENTS if push_to_hub and name in others}
        idle = ("filename_prefix", "is_main_process", "legacy_format", "safe_serialization", "save_jinja_files")
        sort_arguments("tokenizer.save_pretrained", others, idle, ("save_directory", "push_to_hub", *hub.ARGUMENTS))
        folder = Path(save_directory)
        self.native.save(os.fspath(folder))
        if push_to_hub:
            self.push_to_hub(options.pop("repo_id", None) or folder.resolve().name, **options)
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
        return tuple(str(folder / name) for name in names if (folder / name).is_file())

    def push_to_hub(self, repo_id: str, *, commit_message: str | None = None, **options: Any) -> str:
        """Uploads what `save_pretrained` writes.

        Args:
            repo_id: `owner/name`, or a name alone for the token's owner; made if it is not there.
            commit_message: The commit's title.
            **options: token, private, commit_description, revision and create_pr, as of `Model.push_to_hub`.

        Returns:
            The address of the commit.

        Raises:
            ConfigError: If there is no token.
            HubError: If the hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.upload_folder(folder, repo_id, commit_message=commit_message or "Upload a tokenizer", **options)

    @property
    def content_hash(self) -> str:
        """SHA-256 of everything that changes what the tokenizer does; the same on every machine."""
        return self.native.content_hash()

    @property
    def eos_token_ids(self) -> list[int]:
        """All ids after which a text is over, the eos token's first."""
        return list(self.native.eos_ids)

    @property
    def chat_template(self) -> str | None:
        """The chat template used when none is named."""
        return self.native.chat_template

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        checks.check({"chat_template": checks.TEXT}, {"chat_template": template})
        self.native.chat_template = template

    @property
    def padding_side(self) -> str:
        """Where padding goes: "left" or "right"."""
        return self.native.padding_side

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        checks.check({"padding_side": checks.TEXT}, {"padding_side": side}, required=("padding_side",))
        self.native.padding_side = side

    @property
    def model_max_length(self) -> int:
        """The longest text in tokens; a huge number if there is no limit."""
        limit = self.native.model_max_length
        return _NO_LIMIT if limit is None else limit

    @model_max_length.setter
    def model_max_length(self, limit: int | None) -> None:
        huge = isinstance(limit, (int, float)) and limit >= 10**9
        kinds = {"model_max_length": checks.POSITIVE}
        checks.check(kinds, {"model_max_length": None if huge else limit})
        self.native.model_max_length = None if limit is None or huge else int(limit)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return len(self.native)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Every role with its token."""
        return dict(self.native.special_tokens())

    @property
    def additional_special_tokens(self) -> list[str]:
        """Special tokens without a role."""
        return list(self.native.additional_special_tokens())

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of all special tokens: what `skip_special_tokens` leaves out."""
        return list(self.native.all_special_ids())

    @property
    def all_special_tokens(self) -> list[str]:
        """All special tokens."""
        return [self.native.id_to_token(i) or "" for i in self.all_special_ids]

    def get_vocab(self) -> dict[str, int]:
        """Returns every token and its id."""
        return dict(self.native.vocab())

    def set_special_token(self, role: str, token: object) -> int:
        """Gives a token a role.

        Args:
            role: `pad_token` and the like.
            token: The token, as text or as an object with `content`.

        Returns:
            How many tokens were added to the vocabulary.

        Raises:
            ConfigError: If the role is unknown.
        """
        text = str(getattr(token, "content", token))
        checks.check({role: checks.TEXT}, {role: text})
        if not text:
            raise ConfigError(f"{role} = {text!r}: expected a text that is not empty")
        if role == "pad_token" and text == self.eos_token:
            # Notebooks do this by habit; a model trained so may never learn to stop.
            warnings.warn(f"pad_token stays {self.pad_token!r}: it must not be the eos token {text!r}", stacklevel=3)
            return 0
        return self.native.set_special(role, text)

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_additional_special_tokens: bool = True
    ) -> int:
        """Gives tokens roles, adding those the vocabulary lacks.

        Args:
            special_tokens_dict: Role to token; `additional_special_tokens` to a list of tokens.
            replace_additional_special_tokens: Makes no difference: a special token stays one.

        Returns:
            How many tokens were added to the vocabulary.

        Raises:
            ConfigError: If a role is unknown.
        """
        added = 0
        checks.check({"special_tokens_dict": checks.TABLE}, locals(), required=("special_tokens_dict",))
        for role, token in special_tokens_dict.items():
            if role in ("additional_special_tokens", "extra_special_tokens"):
                added += self.add_tokens(token, special_tokens=True)
            else:
                added += self.set_special_token(role, token)
        return added

    def add_tokens(self, new_tokens: str | Sequence[Any], special_tokens: bool = False) -> int:
        """Adds tokens to the vocabulary.

        Args:
            new_tokens: One token or several.
            special_tokens: Whether they are special.

        Returns:
            How many were new.
        """
        texts = [str(getattr(token, "content", token)) for token in checks.listed(new_tokens)]
        checks.check({"new_tokens": checks.TEXTS}, {"new_tokens": texts})
        return self.native.add_special_tokens(texts) if special_tokens else self.native.add_tokens(texts)

    def _limit(self, truncation: bool | str | None, max_length: int | None) -> int | None:
        """Where rows are cut; None is nowhere."""
        if truncation in (None, False, "do_not_truncate"):
            return None
        return self.model_max_length if max_length is None else max_length

    def _pad(
        self,
        columns: dict[str, list[Any]],
        padding: bool | str,
        max_length: int | None,
        padding_side: str | None,
        multiple: int | None,
    ) -> None:
        """Fills all columns up to one length, in place."""
        if padding in (False, None, "do_not_pad") or not columns.get("input_ids"):
            return
        if padding not in (True, "longest", "max_length"):
            raise ConfigError(f'padding = {padding!r}: expected True, False, "longest" or "max_length"')
        side = self.padding_side if padding_side is None else padding_side
        if side not in ("left", "right"):
            raise ConfigError(f'padding_side = {side!r}: expected "left" or "right"')
        width = max(len(row) for row in columns["input_ids"])
        if padding == "max_length":
            width = max(width, self.model_max_length if max_length is None else max_length)
            if width >= 10**9:
                raise ConfigError('padding = "max_length": give max_length, since the model names no limit')
        if multiple:
            width += -width % multiple
        if width > _LONGEST:
            culprit = "pad_to_multiple_of" if multiple else "max_length"
            raise ConfigError(f"{culprit} = {multiple or max_length}: rows of {width} tokens would fill the memory")
        fill = {"input_ids": self.pad_token_id or 0, "labels": IGNORE, "offset_mapping": (0, 0)}
        for name, rows in columns.items():
            if name == "length":
                continue
            for i, row in enumerate(rows):
                gap = [fill.get(name, 0)] * (width - len(row))
                rows[i] = gap + list(row) if side == "left" else list(row) + gap


def _restore(state: str, name_or_path: str) -> Tokenizer:
    """The tokenizer of a pickle."""
    return Tokenizer(_native.Tokenizer.from_state(state), name_or_path)


def _plain(values: Any) -> Any:
    """Arrays and tensors as lists, numbers of numpy as numbers."""
    return values.tolist() if hasattr(values, "tolist") else values


def _ids(values: Any) -> list[int]:
    """Ids as a flat list, without negative ones."""
    plain = _plain(values)
    if isinstance(plain, int):
        plain = [plain]
    try:
        flat = [int(_plain(value)) for value in plain]
    except (TypeError, ValueError):
        raise DataError(f"decode: expected ids or rows of ids, got {type(values).__name__}") from None
    return [value for value in flat if 0 <= value < 2**32]


def _texts(values: Any) -> list[str]:
    """Several texts, checked."""
    if values is None or isinstance(values, (bytes, Mapping)):
        raise DataError(f"tokenizer: expected a text or a list of texts, got {type(values).__name__}")
    plain = _plain(values)
    if not isinstance(plain, Iterable):
        raise DataError(f"tokenizer: expected a text or a list of texts, got {type(values).__name__}")
    texts = list(plain)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"tokenizer: expected texts, but item {i} is {type(text).__name__}")
        if not checks.is_unicode(text):
            raise DataError(f"tokenizer: item {i} holds half of a surrogate pair, which stands for no character")
    return texts


def _refuse(owner: str, others: Mapping[str, Any]) -> None:
    """Refuses what only transformers' tokenizers do, and what does not exist."""
    for name, value in others.items():
        if name not in _ELSEWHERE:
            known = inspect.signature(Tokenizer.__call__).parameters
            raise unknown_argument(owner, name, (*known, *_ELSEWHERE))
        if value not in (None, False, 0):
            raise ConfigError(f"{name} = {value!r}: not there yet; leave it out")


def _is_conversation(value: Any) -> bool:
    """Whether this is one conversation rather than a list of them."""
    if hasattr(value, "messages"):
        return True
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise DataError(f"conversation: expected a list of messages, got {type(value).__name__}")
    listed = list(value)
    return not listed or isinstance(listed[0], Mapping)


def _messages(talk: Any) -> list[dict[str, Any]]:
    """The messages of one conversation, each a dict of its own."""
    if isinstance(talk, (str, Mapping)) or not isinstance(talk, Iterable):
        raise DataError(f"conversation: expected a list of messages, got {type(talk).__name__}")
    messages = list(talk)
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(
                f"conversation, message {i}: expected a dict with role and content, got {type(message).__name__}"
            )
    return [dict(message) for message in messages]


def _check_rows(encoded: Any) -> None:
    """Refuses what `pad` cannot fill up."""

    def are_rows(values: Any) -> bool:
        return isinstance(_plain(values), (list, tuple)) and all(isinstance(_plain(v), (list, tuple)) for v in values)

    if isinstance(encoded, Mapping):
        fits = all(map(are_rows, encoded.values()))
    else:
        fits = isinstance(encoded, (list, tuple)) and all(
            isinstance(row, Mapping) and are_rows(list(row.values())) for row in encoded
        )
    if not fits:
        raise DataError("tokenizer.pad: expected a dict of lists of rows, or a list of dicts with a row in each column")


def _left_open(text: str, last: Mapping[str, Any]) -> str:
    """The rendered text up to the end of the last message's content."""
    content = str(last.get("content") or "").strip()
    at = text.rfind(content)
    if not content or at < 0:
        raise TokenizerError("continue_final_message: the last message's content is not in the rendered text")
    return text[: at + len(content)]


def _inside(spans: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]) -> list[int]:
    """1 for each token that touches an answer."""
    return [int(any(start < to and end > begin for begin, to in answers) and start < end) for start, end in spans]


def _finish(columns: dict[str, list[Any]], *, single: bool, return_tensors: str | None) -> BatchEncoding:
    """Rows as lists, or as arrays."""
    if return_tensors is None:
        return BatchEncoding({name: rows[0] if single else rows for name, rows in columns.items()})
    if return_tensors not in _TENSORS:
        raise ConfigError(f'return_tensors = {return_tensors!r}: expected "np", "pt" or None')
    lengths = {len(row) for row in columns["input_ids"]}
    if len(lengths) > 1:
        raise DataError(f"rows of {min(lengths)} to {max(lengths)} tokens cannot be one array: use padding=True")
    return BatchEncoding({name: as_tokens(rows) for name, rows in columns.items()})
