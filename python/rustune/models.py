"""Loading models, adding adapters, and the model object: calling, generating, saving."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rustune import _native
from rustune._native import ConfigError, DataError
from rustune.config import unknown_argument
from rustune.tokenizer import Tokenizer

_ALL_LINEAR: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Arguments of generate that are passed on.
_GENERATE: Final = (
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "num_return_sequences",
    "eos_token_id",
    "pad_token_id",
    "stop_strings",
    "seed",
)
# Accepted, because they change nothing here; the values of the second are those that change nothing.
_GENERATE_IGNORED: Final = (
    "use_cache",
    "cache_implementation",
    "token_type_ids",
    "position_ids",
    "synced_gpus",
    "length_penalty",
    "early_stopping",
    "bos_token_id",
    "trust_remote_code",
    "remove_invalid_values",
    "renormalize_logits",
    "transformers_version",
    "tokenizer",
    "max_length",
)
_GENERATE_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "typical_p": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "return_dict_in_generate": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "penalty_alpha": (0,),
    "bad_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "logits_processor": (),
    "stopping_criteria": (),
    "prefix_allowed_tokens_fn": (),
    "assistant_model": (),
    "max_time": (),
}


class Device(str):
    """A device's name, with the attributes torch's has."""

    @property
    def type(self) -> str:
        """The kind of device."""
        return str(self)

    @property
    def index(self) -> None:  # type: ignore[override]
        """Which of several; there is one."""
        return


class ModelConfig:
    """`config.json` with its keys as attributes.

    Args:
        values: The parsed file.
        name_or_path: What the model was loaded by.
    """

    def __init__(self, values: dict[str, Any], name_or_path: str) -> None:
        self.__dict__.update({"use_cache": True, **values, "_name_or_path": name_or_path})

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"config.json has no {name}")

    def __setattr__(self, name: str, value: Any) -> None:
        # Notebooks write use_cache and the like; the engine keeps to the file.
        self.__dict__[name] = value

    def __getitem__(self, name: str) -> Any:
        return self.__dict__[name]

    def __contains__(self, name: str) -> bool:
        return name in self.__dict__

    def __repr__(self) -> str:
        return f"ModelConfig {json.dumps(self.to_dict(), indent=2, default=str)}"

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a value.

        Args:
            name: The key.
            default: What to return if the file does not have it.

        Returns:
            The value.
        """
        return self.__dict__.get(name, default)

    def to_dict(self) -> dict[str, Any]:
        """Returns all keys and values."""
        return dict(self.__dict__)


class ModelOutput:
    """What calling a model gives.

    Attributes:
        loss: Mean of the token losses; None if no labels were given.
    """

    def __init__(self, model: Model, batch: _Batch, loss: float | None) -> None:
        self.loss = loss
        self._model = model
        self._batch = batch
        self._logits: NDArray[np.float32] | None = None

    @property
    def logits(self) -> NDArray[np.float32]:
        """Scores `[batch, seq, vocab]`, zero where padded.

        They are computed when first asked for, with the weights of that moment: they are many, and most calls want
        only the loss.
        """
        if self._logits is None:
            n_rows, width = self._batch.mask.shape
            self._logits = np.zeros((n_rows, width, self._model.vocab_size), np.float32)
            for row, scores in enumerate(self._model.native.logits(self._batch.rows())):
                self._logits[row, self._batch.mask[row]] = scores
        return self._logits

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, str):
            return getattr(self, key)
        return list(self)[key]

    def __iter__(self) -> Iterator[Any]:
        if self.loss is not None:
            yield self.loss
        yield self.logits


class _Batch:
    """Token ids with their mask, as given.

    Attributes:
        ids: `[batch, seq]`.
        mask: True where a token is real, `[batch, seq]`.
    """

    def __init__(self, input_ids: Any, attention_mask: Any, pad_token_id: int | None, pad_is_eos: bool) -> None:
        if isinstance(input_ids, Mapping) or (hasattr(input_ids, "input_ids") and not hasattr(input_ids, "shape")):
            attention_mask = _field(input_ids, "attention_mask") if attention_mask is None else attention_mask
            input_ids = _field(input_ids, "input_ids")
        self.ids, present = _rectangle("input_ids", input_ids, pad_token_id or 0)
        if attention_mask is not None:
            mask, _ = _rectangle("attention_mask", attention_mask, 0)
            if mask.shape != self.ids.shape:
                raise DataError(f"attention_mask: expected the shape {self.ids.shape} of input_ids, got {mask.shape}")
            self.mask = (mask != 0) & present
        elif pad_token_id is None or pad_is_eos:
            self.mask = present
        else:
            # A pad token stands for nothing, so a row of several that holds one is a padded row.
            self.mask = present & (self.ids != pad_token_id)
        for row in np.flatnonzero(~self.mask.any(axis=1)):
            raise DataError(f"row {row} of input_ids: has no token that is not padding")

    def rows(self, values: NDArray[np.int64] | None = None) -> list[list[int]]:
        """The real entries of each row."""
        values = self.ids if values is None else values
        return [row[mask].tolist() for row, mask in zip(values, self.mask, strict=True)]


def _field(batch: Any, name: str) -> Any:
    """A field of a tokenizer's output, or None."""
    return batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)


def _array(value: Any) -> Any:
    """A torch tensor as a numpy array, without importing torch; other things as they are."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value


def _rectangle(name: str, value: Any, fill: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Whole numbers `[batch, seq]`, and where they were given: shorter rows are filled on the left."""
    value = _array(value)
    if value is None:
        raise DataError(f"{name}: not given")
    if isinstance(value, (list, tuple)):
        value = [_array(row) for row in value]
        if value and not isinstance(value[0], (int, np.integer)):
            rows = [np.asarray(row) for row in value]
            if any(row.ndim != 1 for row in rows):
                return _rectangle(name, np.asarray(value), fill)
            width = max(len(row) for row in rows)
            ids = np.full((len(rows), width), fill, np.int64)
            present = np.zeros((len(rows), width), np.bool_)
            for at, row in enumerate(rows):
                _whole(name, row)
                ids[at, width - len(row) :] = row
                present[at, width - len(row) :] = True
            return ids, present
    array = np.asarray(value)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.size == 0:
        raise DataError(f"{name}: expected ids of shape [batch, seq], got shape {list(array.shape)}")
    _whole(name, array)
    return array.astype(np.int64), np.ones(array.shape, np.bool_)


def _whole(name: str, array: NDArray[Any]) -> None:
    # A mask made by np.ones is of floats.
    if array.size and array.dtype.kind not in ("iubf" if name == "attention_mask" else "iub"):
        raise DataError(f"{name}: expected whole numbers, got {array.dtype}")


def _dtype_name(dtype: Any) -> str | None:
    """`float32`, `bfloat16` or None, from a name or from torch's or numpy's type."""
    if dtype is None or dtype == "auto":
        return None
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    name = name.removeprefix("torch.")
    if name not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype = {name}: expected None (what this machine does best), float32 or bfloat16")
    return name


def checkpointing_name(asked: bool | str) -> str:
    """Returns the engine's name of `use_gradient_checkpointing`.

    Args:
        asked: `unsloth`, True or False.

    Returns:
        `unsloth`, `true` or `false`.

    Raises:
        ConfigError: If it is something else.
    """
    if asked in (True, False):
        return "true" if asked else "false"
    if asked != "unsloth":
        raise ConfigError(f'use_gradient_checkpointing = {asked!r}: expected "unsloth", True or False')
    return "unsloth"


def native_tokenizer(tokenizer: Any) -> _native.Tokenizer | None:
    """Returns the compiled tokenizer behind a tokenizer object.

    Args:
        tokenizer: Ours, one of transformers, or None.

    Returns:
        The tokenizer the engine can use; None for None.

    Raises:
        ConfigError: If it is something else.
    """
    if tokenizer is None or isinstance(tokenizer, _native.Tokenizer):
        return tokenizer
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.native
    # A processor carries its tokenizer.
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not callable(getattr(tokenizer, "save_pretrained", None)):
        raise ConfigError(f"tokenizer = {type(tokenizer).__name__}: expected a tokenizer of rustune or transformers")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        made = _native.Tokenizer.from_folder(folder)
    if made is None:
        raise ConfigError(f"tokenizer = {type(tokenizer).__name__}: save_pretrained wrote no tokenizer.json")
    return made


class Model:
    """A Llama with or without an adapter; made by `FastLanguageModel.from_pretrained`.

    Attributes:
        native: The compiled model.
        tokenizer: The tokenizer it was loaded with, or None.
        name_or_path: What it was loaded by.
        max_seq_length: Longest row in training.
        config: `config.json` with its keys as attributes.
        training: What `for_training` and `for_inference` set; the engine needs neither.
        dtype: The arithmetic of the matrix products, `float32` or `bfloat16`.
        vocab_size: Number of token ids.
    """

    def __init__(
        self,
        native: _native.Model,
        tokenizer: Any = None,
        *,
        name_or_path: str = "",
        max_seq_length: int = 2048,
        checkpointing: str = "unsloth",
        adapter: dict[str, Any] | None = None,
    ) -> None:
        self.native = native
        self.tokenizer = tokenizer
        self.name_or_path = name_or_path
        self.max_seq_length = max_seq_length
        self.checkpointing = checkpointing
        self.adapter = adapter
        self.config = ModelConfig(json.loads(native.config), name_or_path)
        self.training = False
        self._lm_head_bits: int | None = None
        # Kept here because the engine answers nothing while it trains, and callbacks ask.
        self.dtype: str = native.dtype
        self.vocab_size: int = native.vocab_size
        self._eos = native.eos_token_ids
        self._pad = native.pad_token_id
        self._count()

    def __repr__(self) -> str:
        adapter = f", adapter r={self.adapter.get('r')}" if self.adapter else ""
        return f"Model({self.name_or_path!r}, {self._n_parameters:,} parameters, {self.dtype}{adapter})"

    def __call__(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **ignored: Any
    ) -> ModelOutput:
        """Runs the model on a batch.

        Args:
            input_ids: `[batch, seq]`: an array, a tensor, nested lists, or a tokenizer's whole output.
            attention_mask: 0 where a token is padding, on either side; `[batch, seq]`.
            labels: Not shifted, -100 where a token does not count; `[batch, seq]`. Padding never counts.
            **ignored: `use_cache` and the like.

        Returns:
            An object with `.loss` and `.logits`.

        Raises:
            DataError: If shapes or ids do not fit.

        Example:
            >>> model([[1, 5, 9]], labels=[[1, 5, 9]]).loss  # doctest: +SKIP
            2.41
        """
        batch = self._batch(input_ids, attention_mask)
        if labels is None:
            return ModelOutput(self, batch, None)
        targets, _ = _rectangle("labels", labels, -100)
        if targets.shape != batch.ids.shape:
            raise DataError(f"labels: expected the shape {batch.ids.shape} of input_ids, got {targets.shape}")
        kept = batch.rows(targets)
        n_trained = sum(label != -100 for row in kept for label in row[1:])
        if n_trained == 0:
            raise DataError("labels: no token counts: all are -100")
        losses = self.native.token_losses(batch.rows(), kept)
        total = sum(float(row.sum(dtype=np.float64)) for row in losses)
        return ModelOutput(self, batch, np.float64(total / n_trained))

    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        *,
        inputs: Any = None,
        streamer: Any = None,
        generation_config: Any = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> NDArray[np.int64]:
        """Continues prompts.

        Args:
            input_ids: `[batch, seq]`: an array, a tensor, nested lists, or a tokenizer's whole output.
            attention_mask: 0 where a token is padding, on either side. Without it the pad token marks padding.
            inputs: Another name of `input_ids`.
            streamer: Gets the prompt and then each new token by `put(ids)`, and `end()`; for a batch of one.
            generation_config: An object or a mapping with any of the settings below; arguments win over it.
            tokenizer: For `stop_strings`; the one the model was loaded with if not given.
            **kwargs: max_new_tokens, do_sample, temperature, top_k, top_p, min_p, repetition_penalty,
                num_return_sequences, eos_token_id, pad_token_id, stop_strings, seed.

        Returns:
            `[batch * num_return_sequences, seq + new]`: the prompts as they were given, the new tokens, and pad
            tokens after the shorter ones.

        Raises:
            ConfigError: For a setting that is unknown, out of range or not there yet.
            DataError: For a prompt without tokens, or ids outside the vocabulary.

        Example:
            >>> model.generate([[1, 5, 9]], max_new_tokens=2)  # doctest: +SKIP
            array([[ 1,  5,  9, 14,  2]])
        """
        settings = self._settings(generation_config, kwargs)
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        eos = settings.get("eos_token_id")
        settings["eos_token_id"] = self._eos_ids(tokenizer) if eos is None else np.atleast_1d(_array(eos)).tolist()
        pad = self._pad_id(settings, tokenizer)
        settings["pad_token_id"] = pad
        batch = self._batch(inputs if input_ids is None else input_ids, attention_mask)
        if settings.get("max_new_tokens") is None and (limit := settings.pop("max_length", None)) is not None:
            settings["max_new_tokens"] = limit - batch.ids.shape[1]
            if settings["max_new_tokens"] < 1:
                raise ConfigError(f"max_length = {limit}: the prompt has {batch.ids.shape[1]} tokens already")
        settings.pop("max_length", None)
        stops = settings.get("stop_strings")
        settings["stop_strings"] = [stops] if isinstance(stops, str) else stops
        if stops and tokenizer is None:
            raise ConfigError("stop_strings: needs the tokenizer; pass tokenizer=")
        n_each = settings.get("num_return_sequences") or 1
        if streamer is not None and len(batch.ids) * n_each > 1:
            raise ConfigError(f"streamer: expected one sequence, got {len(batch.ids) * n_each}")

        def on_token(_: int, new_ids: list[int]) -> None:
            streamer.put(np.array(new_ids, np.int64))

        if streamer is not None:
            streamer.put(batch.ids)
        made = self.native.generate(
            batch.rows(),
            json.dumps({key: value for key, value in settings.items() if value is not None}),
            native_tokenizer(tokenizer) if stops else None,
            on_token if streamer is not None else None,
        )
        if streamer is not None:
            streamer.end()
        prompts = np.repeat(batch.ids, n_each, axis=0)
        new = np.full((len(made), max(map(len, made), default=0)), pad, np.int64)
        for row, ids in enumerate(made):
            new[row, : len(ids)] = ids
        return np.concatenate([prompts, new], axis=1)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **ignored: Any) -> None:
        """Writes what was trained: the adapter in PEFT's form, or the whole model after full fine-tuning.

        Args:
            save_directory: A folder; made if it is not there.
            **ignored: `safe_serialization` and the like: the files are always safetensors.

        Raises:
            ConfigError: If nothing was trained, or for `push_to_hub`.
            OSError: If the folder cannot be written.
        """
        if ignored.get("push_to_hub"):
            raise ConfigError("push_to_hub = True: not there yet; upload the folder with the hub's own tools")
        folder = os.fspath(save_directory)
        if self.native.has_adapter:
            self.native.save_adapter(folder, self.base_model)
        elif self.native.is_fully_trained:
            self.native.save_full(folder)
        else:
            raise ConfigError("save_pretrained: nothing to save: the model has no adapter; call get_peft_model first")

    def save_pretrained_merged(
        self, save_directory: str | os.PathLike[str], tokenizer: Any = None, save_method: str = "merged_16bit", **_: Any
    ) -> None:
        """Writes the adapter (`save_method="lora"`); merging is not there yet.

        Args:
            save_directory: A folder.
            tokenizer: Written beside it.
            save_method: `lora`.

        Raises:
            ConfigError: For every other method.
        """
        if save_method != "lora":
            raise ConfigError(f'save_method = {save_method}: not there yet; use "lora" or save_pretrained')
        self.save_pretrained(save_directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(os.fspath(save_directory))

    def save_pretrained_gguf(self, *_: Any, **__: Any) -> None:
        """Is not there yet.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("save_pretrained_gguf: not there yet; use save_pretrained")

    def push_to_hub(self, *_: Any, **__: Any) -> None:
        """Is not there yet.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("push_to_hub: not there yet; use save_pretrained and the hub's own tools")

    push_to_hub_merged = push_to_hub
    push_to_hub_gguf = push_to_hub

    def merge_and_unload(self, *_: Any, **__: Any) -> None:
        """Is not there yet.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("merge_and_unload: not there yet; the adapter works without merging")

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters are trained, and their share."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Returns the number of trained and of all parameters."""
        return self._n_trainable, self._n_parameters

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Counts parameters.

        Args:
            only_trainable: Only those that are trained.
            exclude_embeddings: Without the embedding table.

        Returns:
            Their number.
        """
        if only_trainable:
            return self._n_trainable
        embeddings = self.vocab_size * int(self.config.hidden_size) if exclude_embeddings else 0
        return self._n_parameters - embeddings

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Returns the bytes the weights take.

        Args:
            return_buffers: Makes no difference: there are none.

        Returns:
            Bytes.
        """
        return self._nbytes

    @property
    def device(self) -> Device:
        """Where the model is."""
        return Device("cpu")

    @property
    def base_model(self) -> str:
        """What an adapter's config names as its base: a hub name, or a folder's full path."""
        if self.adapter and self.adapter.get("base_model_name_or_path"):
            return str(self.adapter["base_model_name_or_path"])
        return os.path.abspath(self.name_or_path) if os.path.isdir(self.name_or_path) else self.name_or_path

    def for_inference(self, *, lm_head_bits: int | None = None) -> Model:
        """Makes ready for generating; nothing needs doing, but the head may be taken in 8 bits.

        Args:
            lm_head_bits: 8 generates with a copy of the LM head in 8 bits, 64 weights to a scale: half the bytes of a
                bfloat16 head, which is half of what a token of a small model reads. None takes the head as it is.
                Losses, logits and training never use the copy.

        Returns:
            The model.

        Raises:
            ConfigError: For other bits, or if the head is trained or its rows are no multiple of 64.
        """
        self._set_lm_head_bits(lm_head_bits)
        return self.train(False)

    def _set_lm_head_bits(self, bits: int | None) -> None:
        if bits is not None and (isinstance(bits, bool) or bits != 8):
            raise ConfigError(f"lm_head_bits = {bits!r}: expected 8 or None")
        if bits != self._lm_head_bits:
            self.native.set_lm_head_bits(bits)
            self._lm_head_bits = bits

    def for_training(self, use_gradient_checkpointing: bool | str | None = None) -> Model:
        """Makes ready for training.

        Args:
            use_gradient_checkpointing: `unsloth`, True or False, as in `from_pretrained`; None leaves it.

        Returns:
            The model.
        """
        if use_gradient_checkpointing is not None:
            self.checkpointing = checkpointing_name(use_gradient_checkpointing)
        self._set_lm_head_bits(None)
        return self.train()

    def train(self, mode: bool = True) -> Model:
        """Notes the mode; dropout is only ever applied by the trainer.

        Args:
            mode: Whether to train.

        Returns:
            The model.
        """
        self.training = mode
        return self

    def eval(self) -> Model:
        """Notes the mode.

        Returns:
            The model.
        """
        return self.train(False)

    def to(self, *_: Any, **__: Any) -> Model:
        """Stays where it is.

        Returns:
            The model.
        """
        return self

    cuda = cpu = half = float = bfloat16 = to

    def _count(self) -> None:
        """Counts anew, after an adapter was added."""
        self._n_trainable, self._n_parameters = self.native.n_trainable, self.native.n_parameters
        self._nbytes = self.native.nbytes

    def _batch(self, input_ids: Any, attention_mask: Any) -> _Batch:
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return _Batch(input_ids, attention_mask, pad, pad in self._eos_ids(self.tokenizer))

    def _eos_ids(self, tokenizer: Any) -> list[int]:
        """What ends a text: by the model's files and by the tokenizer, whose template may end turns its own way."""
        own = getattr(tokenizer, "eos_token_id", None)
        return sorted({*self._eos, *([] if own is None else [own])})

    def _pad_id(self, settings: dict[str, Any], tokenizer: Any) -> int:
        candidates = (
            settings.get("pad_token_id"),
            getattr(tokenizer, "pad_token_id", None),
            self._pad,
            *settings["eos_token_id"],
        )
        return next((int(pad) for pad in candidates if pad is not None), 0)

    def _settings(self, generation_config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What was asked of `generate`, arguments over the config object; nothing the engine does not know."""
        settings: dict[str, Any] = {}
        known = {*_GENERATE, *_GENERATE_IGNORED, *_GENERATE_NEUTRAL}
        if generation_config is not None:
            to_dict = getattr(generation_config, "to_dict", None)
            written = generation_config if isinstance(generation_config, Mapping) else None
            written = dict(written or (to_dict() if to_dict else vars(generation_config)))
            # 20 is what older transformers put there when nothing was written.
            if written.get("max_length") == 20:
                del written["max_length"]
            settings = {name: value for name, value in written.items() if name in known}
        for name in kwargs:
            if name not in known:
                raise unknown_argument("generate", name, known)
        settings |= kwargs
        for name, neutral in _GENERATE_NEUTRAL.items():
            value = settings.get(name)
            if value is not None and value not in neutral and not (hasattr(value, "__len__") and len(value) == 0):
                raise ConfigError(f"{name} = {value!r}: not there yet; leave it out")
        kept = (*_GENERATE, "max_length")
        return {name: _scalar(settings[name]) for name in kept if settings.get(name) is not None}


def _scalar(value: Any) -> Any:
    """A numpy or torch number as Python's; other things as they are."""
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value


class FastLanguageModel:
    """Loads models and adds adapters; the entry notebooks use."""

    @staticmethod
    def from_pretrained(
        model_name: str | os.PathLike[str],
        max_seq_length: int | None = None,
        *,
        dtype: Any = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | bool | None = None,
        device_map: Any = "sequential",
        rope_scaling: Any = None,
        fix_tokenizer: bool = True,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        resize_model_vocab: int | None = None,
        revision: str | None = None,
        random_state: int = 3407,
        quantization_config: Any = None,
        local_files_only: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        **ignored: Any,
    ) -> tuple[Model, Any]:
        """Loads a model and its tokenizer.

        Args:
            model_name: A folder, a hub name, or the folder of an adapter, whose base is then found and loaded.
            max_seq_length: Longest row in training; 2048 if not given.
            dtype: `float32`, `bfloat16`, or None for what this machine does best.
            load_in_4bit: Hold the linear layers in 4 bits; True unless 16 bits or full fine-tuning is asked for.
            load_in_8bit: Not there yet.
            load_in_16bit: Keep the weights as the files have them.
            full_finetuning: Train every weight.
            token: For the hub; better kept in HF_TOKEN.
            device_map: Makes no difference: the model is where the processor is.
            rope_scaling: Not there yet: that of the files applies.
            fix_tokenizer: Makes no difference: a pad token is always found.
            trust_remote_code: Makes no difference: no code of a repository is ever run.
            use_gradient_checkpointing: How many layers are computed again in the backward: `unsloth`, as few as the
                memory there is allows; True, every layer; False, none. The results are the same.
            resize_model_vocab: Not there yet.
            revision: Branch, tag or commit on the hub.
            random_state: Makes no difference: loading draws no numbers.
            quantization_config: A BitsAndBytesConfig, or a mapping like it.
            local_files_only: Never ask the hub.
            cache_dir: Where downloads are kept, instead of the hub's usual cache.
            **ignored: Named in one warning.

        Returns:
            The model and the tokenizer; None, with a warning, if the folder has no tokenizer files.

        Raises:
            ConfigError: For a setting that cannot be used.
            ModelError: If the architecture is not there.
            WeightsError: If weights are damaged or missing.
            OSError: If the folder cannot be read, or the hub not be reached.

        Example:
            >>> model, tokenizer = FastLanguageModel.from_pretrained("path/to/llama")  # doctest: +SKIP
        """
        if ignored:
            warnings.warn(f"from_pretrained: these arguments are ignored: {', '.join(sorted(ignored))}", stacklevel=2)
        if rope_scaling is not None:
            raise ConfigError(f"rope_scaling = {rope_scaling}: not there yet; that of config.json applies")
        if resize_model_vocab is not None:
            raise ConfigError(f"resize_model_vocab = {resize_model_vocab}: not there yet; leave it None")
        if max_seq_length is not None and (not isinstance(max_seq_length, (int, np.integer)) or max_seq_length < 1):
            raise ConfigError(f"max_seq_length = {max_seq_length!r}: expected at least 1")
        secret = token if isinstance(token, str) else None
        if secret and secret not in (os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")):
            warnings.warn(
                "token: a secret written in a notebook is easily published with it; set HF_TOKEN instead", stacklevel=2
            )
        quantization, dtype = _quantization(
            {
                "load_in_4bit": load_in_4bit,
                "load_in_8bit": load_in_8bit,
                "load_in_16bit": load_in_16bit,
                "full_finetuning": full_finetuning,
            },
            quantization_config,
            dtype,
        )
        name = os.fspath(model_name)

        def resolve(wanted: str, at_revision: str | None) -> str:
            cache = None if cache_dir is None else os.fspath(cache_dir)
            made = _native.resolve_model(wanted, at_revision, secret, cache, local_files_only, _tell_download)
            return os.fspath(made)

        folder = resolve(name, revision)
        adapter_folder = folder if (Path(folder) / "adapter_config.json").is_file() else None
        if adapter_folder is not None:
            name = _base_of(adapter_folder)
            folder = resolve(name, None)
        room = None if max_seq_length is None else int(max_seq_length)
        native = _native.Model.load(folder, _dtype_name(dtype), json.dumps(quantization), room)
        adapter = None
        if adapter_folder is not None:
            adapter = json.loads(native.load_adapter(adapter_folder))
            adapter["base_model_name_or_path"] = os.path.abspath(name) if os.path.isdir(name) else name
        tokenizer = None
        for source in dict.fromkeys([adapter_folder or folder, folder]):
            tokenizer = Tokenizer.from_folder(source) if tokenizer is None else tokenizer
        length = 2048 if max_seq_length is None else int(max_seq_length)
        if tokenizer is None:
            warnings.warn(f"{folder}: has no tokenizer files; only rows of token ids can be used", stacklevel=2)
        elif max_seq_length is not None:
            tokenizer.model_max_length = length
        if native.max_position_embeddings > native.original_positions:
            warnings.warn(
                f"max_seq_length = {length}: the model was made for {native.original_positions} tokens at most; its "
                f"positions are divided by {native.max_position_embeddings / native.original_positions:.4g} (linear "
                "rope scaling), so expect it to need some training",
                stacklevel=2,
            )
        model = Model(
            native,
            tokenizer,
            name_or_path=name,
            max_seq_length=length,
            checkpointing=checkpointing_name(use_gradient_checkpointing),
            adapter=adapter,
        )
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: Model,
        r: int = 16,
        *,
        target_modules: str | Iterable[str] | None = None,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: int | Iterable[int] | None = None,
        layers_pattern: str | None = None,
        finetune_last_n_layers: int | None = None,
        use_gradient_checkpointing: bool | str | None = None,
        random_state: int = 3407,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        modules_to_save: Iterable[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Mapping[str, Any] | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        task_type: Any = None,
        temporary_location: str | None = None,
        **unknown: Any,
    ) -> Model:
        """Adds a LoRA adapter to be trained.

        Args:
            model: From `from_pretrained`.
            r: Rank.
            target_modules: Names of linear layers, or `all-linear`; all seven kinds if not given.
            lora_alpha: The adapter is scaled by `lora_alpha / r`.
            lora_dropout: Share of inputs set to zero in training.
            bias: `none`.
            layers_to_transform: A layer's number, or several; all if not given.
            layers_pattern: Not there yet.
            finetune_last_n_layers: Instead of `layers_to_transform`.
            use_gradient_checkpointing: `unsloth`, True or False, as in `from_pretrained`; None leaves it as loaded.
            random_state: Seed of the adapter's first weights.
            max_seq_length: Longest row in training; None leaves it as loaded.
            use_rslora: Scale by `lora_alpha / sqrt(r)`.
            use_dora: Not there yet.
            modules_to_save: Not there yet.
            init_lora_weights: True or `gaussian`.
            loftq_config: Not there yet.
            rank_pattern: Ranks of layers that differ.
            alpha_pattern: Alphas of layers that differ.
            task_type: Makes no difference.
            temporary_location: Makes no difference.
            **unknown: An error that names the nearest argument.

        Returns:
            The same model, now with the adapter.

        Raises:
            ConfigError: For a setting out of range, an unknown layer, or other settings than an adapter already there.

        Example:
            >>> model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)  # doctest: +SKIP
        """
        for name in unknown:
            raise unknown_argument("get_peft_model", name, FastLanguageModel.get_peft_model.__annotations__)
        if not isinstance(model, Model):
            raise ConfigError(f"model = {type(model).__name__}: expected what from_pretrained returns")
        if isinstance(r, bool) or not isinstance(r, (int, np.integer)) or r < 1:
            raise ConfigError(f"r = {r!r}: expected a whole number, at least 1")
        if layers_pattern is not None:
            raise ConfigError(f"layers_pattern = {layers_pattern}: not there yet; leave it None")
        if loftq_config:
            raise ConfigError(f"loftq_config = {dict(loftq_config)}: not there yet; leave it empty")
        if use_gradient_checkpointing is not None:
            model.checkpointing = checkpointing_name(use_gradient_checkpointing)
        if max_seq_length is not None:
            model.max_seq_length = int(max_seq_length)
        if model.native.is_fully_trained:
            warnings.warn("get_peft_model: the model was loaded with full_finetuning=True; no adapter", stacklevel=2)
            return model
        targets = list(target_modules) if target_modules and not isinstance(target_modules, str) else target_modules
        layers = layers_to_transform
        written = {
            "r": int(r),
            "lora_alpha": float(lora_alpha),
            "lora_dropout": float(lora_dropout),
            "target_modules": targets,
            "bias": bias,
            "use_rslora": use_rslora,
            "use_dora": use_dora,
            "layers_to_transform": list(layers) if isinstance(layers, Iterable) else layers,
            "finetune_last_n_layers": finetune_last_n_layers,
            "modules_to_save": None if modules_to_save is None else list(modules_to_save),
            "init_lora_weights": init_lora_weights,
            "rank_pattern": dict(rank_pattern or {}),
            "alpha_pattern": dict(alpha_pattern or {}),
            "random_state": random_state,
        }
        if model.native.has_adapter:
            _same_adapter(model.adapter or {}, written)
            return model
        model.adapter = json.loads(model.native.add_adapter(json.dumps(written)))
        model._count()
        return model

    @staticmethod
    def for_inference(model: Model, *, lm_head_bits: int | None = None) -> Model:
        """Makes a model ready for generating.

        Args:
            model: The model.
            lm_head_bits: 8 generates with the LM head in 8 bits; None with the head as it is.

        Returns:
            The same model.

        Raises:
            ConfigError: For other bits, or if the head is trained or its rows are no multiple of 64.
        """
        return model.for_inference(lm_head_bits=lm_head_bits)

    @staticmethod
    def for_training(model: Model, use_gradient_checkpointing: bool | str | None = None) -> Model:
        """Makes a model ready for training.

        Args:
            model: The model.
            use_gradient_checkpointing: `unsloth`, True or False, as in `from_pretrained`; None leaves it.

        Returns:
            The same model.
        """
        return model.for_training(use_gradient_checkpointing)


def _tell_download(kind: str, text: str, done: int, total: int | None) -> None:
    """Shows what a download does: a line that moves on a terminal, and warnings everywhere."""
    if kind == "warning":
        warnings.warn(text, stacklevel=2)
    elif sys.stderr.isatty():
        share = f"{done / total:4.0%} of {total / 1e6:,.0f} MB" if total else f"{done / 1e6:,.0f} MB"
        sys.stderr.write(f"\r{text}: {share}" + ("\n" if done == total else ""))
        sys.stderr.flush()


def _quantization(written: dict[str, Any], config: Any, dtype: Any) -> tuple[dict[str, Any], Any]:
    """The engine's options and the dtype, from the arguments and a BitsAndBytesConfig, which wins."""
    if config is not None:
        to_dict = getattr(config, "to_dict", None)
        given = dict(config if isinstance(config, Mapping) else to_dict() if to_dict else vars(config))
        names = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "block_size")
        written = written | {name: given[name] for name in names if given.get(name) is not None}
        compute = given.get("bnb_4bit_compute_dtype")
        # Their default, float32, stands there whether or not it was written; only another choice is a wish.
        dtype = compute if dtype is None and str(compute).removeprefix("torch.") == "bfloat16" else dtype
    return {name: value for name, value in written.items() if value is not None}, dtype


def _base_of(folder: str) -> str:
    """The base model an adapter names: a folder that is there, seen from here or from the adapter, or a hub name."""
    path = Path(folder) / "adapter_config.json"
    try:
        name = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise _native.AdapterError(f"{path}: not JSON: {error}") from None
    if not isinstance(name, str) or not name:
        raise _native.AdapterError(f"{path}: base_model_name_or_path: expected the base model's name or folder")
    for candidate in (Path(name), Path(folder) / name):
        if candidate.is_dir():
            return str(candidate)
    return name


def _same_adapter(present: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses other settings than those of the adapter that is there."""
    targets = wanted["target_modules"]
    if targets in (None, "all-linear"):
        targets = _ALL_LINEAR
    wanted = wanted | {"target_modules": sorted([targets] if isinstance(targets, str) else set(targets))}
    for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"):
        there: Any = present.get(name)
        if name == "target_modules" and isinstance(there, Sequence):
            there = sorted(there)
        if there is not None and there != wanted[name]:
            raise ConfigError(f"{name} = {wanted[name]}: the model has an adapter with {name} = {there} already")
