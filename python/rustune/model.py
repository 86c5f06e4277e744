"""The model object: calling it, generating, counting, saving."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rustune import _native, checks, hub
from rustune._native import ConfigError, DataError
from rustune.batches import Batch, rectangle
from rustune.config import unknown_argument
from rustune.description import Device, ModelConfig, Parameter, weight_shapes
from rustune.generation import GenerationConfig, merge_settings
from rustune.notices import sort_arguments, tell_once
from rustune.stopping import MaxTimeCriteria, Steps, criteria_of
from rustune.tokenizer import TokenArray, Tokenizer, as_tokens

# Arguments of calling a model that change nothing, of saving, and of uploading.
_FORWARD: Final = ("return_dict", "token_type_ids", "use_cache")
_SAVE: Final = (
    "is_main_process",
    "max_shard_size",
    "maximum_memory_usage",
    "path_initial_prefix",
    "safe_serialization",
    "save_embedding_layers",
    "save_function",
    "save_peft_format",
    "selected_adapters",
    "state_dict",
    "temporary_location",
    "variant",
)
_METHODS: Final = ("lora", "merged_16bit", "merged_4bit", "merged_4bit_forced")
_PUSH_IGNORED: Final = ("datasets", "language", "tags", "use_temp_dir")


class ModelOutput:
    """What calling a model gives.

    Attributes:
        loss: Mean of the token losses; None if no labels were given.
    """

    def __init__(self, model: Model, batch: Batch, loss: float | None) -> None:
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
        generation_config: Settings of `generate` that hold where a call names none.
        training: What `for_training` and `for_inference` set; the engine needs neither.
        products: What the operands of matrix products are rounded to: `float32` (not at all), `bfloat16`, or `int16`,
            which is 16-bit whole numbers with a float32 scale for each 64 neighbours.
        dtype: What the model computes in: `bfloat16` where products do, else `float32`.
        vocab_size: Number of token ids.
        has_new_tokens: Whether `add_new_tokens` has added some, so that `get_peft_model` trains their rows.
    """

    is_gradient_checkpointing = True
    active_adapter = "default"

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
        self.generation_config: Any = GenerationConfig()
        self.training = False
        self._lm_head_bits: int | None = None
        # Kept here because the engine answers nothing while it trains, and callbacks ask.
        self.products: str = native.products
        self.dtype: str = "bfloat16" if self.products == "bfloat16" else "float32"
        self.vocab_size: int = native.vocab_size
        # `add_new_tokens` sets it: then get_peft_model trains the embedding table and the head.
        self.has_new_tokens = False
        self._eos = native.eos_token_ids
        self._pad = native.pad_token_id
        self._count()

    def __repr__(self) -> str:
        adapter = f", adapter r={self.adapter.get('r')}" if self.adapter else ""
        return f"Model({self.name_or_path!r}, {self._n_parameters:,} parameters, {self.products}{adapter})"

    def __call__(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **others: Any
    ) -> ModelOutput:
        """Runs the model on a batch.

        Args:
            input_ids: `[batch, seq]`: an array, a tensor, nested lists, or a tokenizer's whole output.
            attention_mask: 0 where a token is padding, on either side; `[batch, seq]`.
            labels: Not shifted, -100 where a token does not count; `[batch, seq]`. Padding never counts.
            **others: `use_cache`, `return_dict` and `token_type_ids`, which change nothing.

        Returns:
            An object with `.loss` and `.logits`.

        Raises:
            ConfigError: For an argument that does not exist.
            DataError: If shapes or ids do not fit.

        Example:
            >>> model([[1, 5, 9]], labels=[[1, 5, 9]]).loss  # doctest: +SKIP
            2.41
        """
        for name in others:
            if name not in _FORWARD:
                raise unknown_argument("model(...)", name, ("input_ids", "attention_mask", "labels", *_FORWARD))
        batch = self._batch(input_ids, attention_mask)
        if labels is None:
            return ModelOutput(self, batch, None)
        targets, _ = rectangle("labels", labels, -100)
        if targets.shape != batch.ids.shape:
            raise DataError(f"labels: expected the shape {batch.ids.shape} of input_ids, got {targets.shape}")
        if np.abs(targets).max() >= 2**31:
            raise DataError(f"labels: holds {targets.flat[np.abs(targets).argmax()]}: expected ids of tokens, or -100")
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
        stopping_criteria: Any = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> TokenArray:
        """Continues prompts.

        Args:
            input_ids: `[batch, seq]`: an array, a tensor, nested lists, or a tokenizer's whole output.
            attention_mask: 0 where a token is padding, on either side. Without it the pad token marks padding.
            inputs: Another name of `input_ids`.
            streamer: Gets the prompt and then each new token by `put(ids)`, and `end()`; for a batch of one.
            generation_config: An object or a mapping with any of the settings below; arguments win over it.
            stopping_criteria: Functions of the ids `[batch, seq]` so far and of None, asked after each step; they say
                whether all rows end there, or which. Those of transformers can be used.
            tokenizer: For `stop_strings`; the one the model was loaded with if not given.
            **kwargs: max_new_tokens, max_length, max_time (in seconds), do_sample, temperature, top_k, top_p, min_p,
                repetition_penalty, no_repeat_ngram_size, bad_words_ids, suppress_tokens, begin_suppress_tokens,
                min_new_tokens, min_length, num_return_sequences, eos_token_id, pad_token_id, stop_strings, seed.

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
        settings = merge_settings((self.generation_config, generation_config), kwargs)
        criteria = criteria_of(stopping_criteria)
        if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
            raise ConfigError(f"streamer = {streamer!r}: expected an object with put and end, such as a TextStreamer")
        if (max_time := settings.pop("max_time", None)) is not None:
            criteria.append(MaxTimeCriteria(max_time))
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        eos = settings.get("eos_token_id")
        settings["eos_token_id"] = self._eos_ids(tokenizer) if eos is None else checks.listed(eos)
        pad = self._pad_id(settings, tokenizer)
        settings["pad_token_id"] = pad
        batch = self._batch(inputs if input_ids is None else input_ids, attention_mask)
        if settings.get("max_new_tokens") is None and (limit := settings.pop("max_length", None)) is not None:
            settings["max_new_tokens"] = limit - batch.ids.shape[1]
            if settings["max_new_tokens"] < 1:
                raise ConfigError(f"max_length = {limit}: the prompt has {batch.ids.shape[1]} tokens already")
        settings.pop("max_length", None)
        stops = settings.get("stop_strings")
        settings["stop_strings"] = None if stops is None else checks.listed(stops)
        if stops and tokenizer is None:
            raise ConfigError("stop_strings: needs the tokenizer; pass tokenizer=")
        n_each = settings.get("num_return_sequences") or 1
        if streamer is not None and len(batch.ids) * n_each > 1:
            raise ConfigError(f"streamer: expected one sequence, got {len(batch.ids) * n_each}")
        watched = streamer is not None or bool(criteria)
        steps = Steps(batch.ids, n_each, pad, None if streamer is None else streamer.put, criteria)
        try:
            if streamer is not None:
                streamer.put(batch.ids)
            made = self.native.generate(
                batch.rows(),
                json.dumps({key: value for key, value in settings.items() if value is not None}),
                native_tokenizer(tokenizer) if stops else None,
                steps if watched else None,
            )
        except BaseException:
            # Whoever reads from the streamer in another thread must not wait for ever.
            if streamer is not None:
                with contextlib.suppress(Exception):
                    streamer.end()
            raise
        if streamer is not None:
            streamer.end()
        prompts = np.repeat(batch.ids, n_each, axis=0)
        new = np.full((len(made), max(map(len, made), default=0)), pad, np.int64)
        for row, ids in enumerate(made):
            new[row, : len(ids)] = ids
        return as_tokens(np.concatenate([prompts, new], axis=1))

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **others: Any
    ) -> None:
        """Writes what was trained: the adapter in PEFT's form, or the whole model after full fine-tuning.

        Args:
            save_directory: A folder; made if it is not there.
            push_to_hub: Whether to upload it too; then `repo_id` (the folder's name if not given), `token`, `private`
                and the like are as of `push_to_hub`.
            **others: `safe_serialization` and the like: the files are always safetensors.

        Raises:
            ConfigError: If nothing was trained, or for an argument that does not exist.
            OSError: If the folder cannot be written, or the hub not be reached.
        """
        folder = os.fspath(save_directory)
        options = {name: others.pop(name) for name in hub.ARGUMENTS if push_to_hub and name in others}
        sort_arguments("save_pretrained", _loud(others), _SAVE, ("save_directory", "push_to_hub", *hub.ARGUMENTS))
        if self.native.has_adapter:
            self.native.save_adapter(folder, self.base_model)
        elif self.native.is_fully_trained:
            self.native.save_full(folder)
        else:
            raise ConfigError("save_pretrained: nothing to save: the model has no adapter; call get_peft_model first")
        if push_to_hub:
            self.push_to_hub(options.pop("repo_id", None) or os.path.basename(os.path.abspath(folder)), **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        commit_description: str = "",
        revision: str | None = None,
        create_pr: bool = False,
        **others: Any,
    ) -> str:
        """Uploads what `save_pretrained` writes.

        Args:
            repo_id: `owner/name`, or a name alone for the token's owner; made if it is not there.
            token: Better kept in HF_TOKEN, which is used if this is not given.
            private: Whether a new repository is private; None leaves it to the hub.
            commit_message: The commit's title.
            commit_description: What else the commit says.
            revision: The branch; `main` if not given.
            create_pr: Whether to open a pull request instead of writing to the branch.
            **others: `safe_serialization` and the like.

        Returns:
            The address of the commit.

        Raises:
            ConfigError: If nothing was trained, or for an argument that does not exist.
            HubError: If the hub refuses, with what to do about it.
        """
        sort_arguments("push_to_hub", _loud(others), (*_SAVE, *_PUSH_IGNORED), hub.ARGUMENTS)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.upload_folder(
                folder,
                repo_id,
                token=token,
                private=private,
                commit_message=commit_message or "Upload a model trained with rustune",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    def save_pretrained_merged(
        self,
        save_directory: str | os.PathLike[str],
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        **others: Any,
    ) -> None:
        """Writes the adapter and the tokenizer (`save_method="lora"`); merged weights come later.

        Args:
            save_directory: A folder.
            tokenizer: Written beside it.
            save_method: `lora`.
            **others: As of `save_pretrained`.

        Raises:
            ConfigError: For every other method.
        """
        _only_lora("save_pretrained_merged", save_method)
        self.save_pretrained(save_directory, **others)
        if tokenizer is not None:
            tokenizer.save_pretrained(os.fspath(save_directory))

    def push_to_hub_merged(
        self, repo_id: str, tokenizer: Any = None, save_method: str = "merged_16bit", **others: Any
    ) -> str:
        """Uploads the adapter and the tokenizer (`save_method="lora"`); merged weights come later.

        Args:
            repo_id: As of `push_to_hub`.
            tokenizer: Uploaded with it.
            save_method: `lora`.
            **others: As of `push_to_hub`.

        Returns:
            The address of the last commit.

        Raises:
            ConfigError: For every other method.
        """
        _only_lora("push_to_hub_merged", save_method)
        address = self.push_to_hub(repo_id, **others)
        if tokenizer is None:
            return address
        made: str = tokenizer.push_to_hub(repo_id, **{name: others[name] for name in hub.ARGUMENTS if name in others})
        return made

    def save_pretrained_gguf(self, *_: Any, **__: Any) -> None:
        """Says that GGUF files come later.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("save_pretrained_gguf: GGUF files come in a later version; save_pretrained keeps the adapter")

    def push_to_hub_gguf(self, *_: Any, **__: Any) -> None:
        """Says that GGUF files come later.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("push_to_hub_gguf: GGUF files come in a later version; push_to_hub uploads the adapter")

    def merge_and_unload(self, *_: Any, **__: Any) -> None:
        """Says that merging comes later.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("merge_and_unload: merging comes in a later version; the adapter works without it")

    def load_adapter(self, folder: str | os.PathLike[str], adapter_name: str = "default", **options: Any) -> None:
        """Puts a saved adapter on a model that has none.

        Args:
            folder: Its folder or hub name.
            adapter_name: Makes no difference: there is one.
            **options: token, revision, cache_dir and local_files_only.

        Raises:
            AdapterError: If the folder holds no adapter for this model.
            ConfigError: If the model has an adapter already, or for an argument that does not exist.
        """
        known = ("token", "revision", "cache_dir", "local_files_only")
        others = {name: value for name, value in options.items() if name not in known}
        sort_arguments("load_adapter", others, ("autocast_adapter_dtype", "device_map", "torch_dtype"), known)
        if self.adapter is not None:
            raise ConfigError(f"load_adapter: the model has an adapter with r = {self.adapter.get('r')} already")
        base = self.base_model
        where = hub.resolve(os.fspath(folder), **{name: options[name] for name in known if name in options})
        self.adapter = json.loads(self.native.load_adapter(where))
        self.adapter["base_model_name_or_path"] = base
        self._take_vocabulary()

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

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Lists every weight with its size, for counting; the values stay in the engine.

        Yields:
            A name as in the checkpoint (of the adapter: as in its file) and the weight's description.
        """
        trained = {name: tuple(shape) for name, shape in self.native.parameter_shapes}
        for name, shape in weight_shapes(self.config):
            yield name, Parameter(name, shape, trained.pop(name, None) is not None)
        for name, shape in trained.items():
            yield name, Parameter(name, shape, True)

    def parameters(self) -> Iterator[Parameter]:
        """Lists every weight's description; see `named_parameters`."""
        return (parameter for _, parameter in self.named_parameters())

    @property
    def peft_config(self) -> dict[str, dict[str, Any]]:
        """The adapter's settings under its name; empty without one."""
        return {} if self.adapter is None else {self.active_adapter: dict(self.adapter)}

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

    def for_inference(self, *, lm_head_bits: int | None = None, activation_bits: int | None = None) -> Model:
        """Makes ready for generating; nothing needs doing, but 8 bits may be allowed where they are faster.

        Args:
            lm_head_bits: 8 generates with a copy of the LM head in 8 bits, 64 weights to a scale: half the bytes of a
                bfloat16 head, which is half of what a token of a small model reads. None takes the head as it is.
                Losses, logits and training never use the copy.
            activation_bits: What generation may round the inputs of layers to, 64 neighbours to a scale. 16 rounds
                where few tokens meet a layer or head in 4 or 8 bits and the CPU is faster at it: a product is off by
                3e-5 of its size, and weights are not rounded to the checkpoint's dtype. 32 rounds nothing. 8 rounds the
                inputs of all layers in 4 or 8 bits and of a head in 8 bits, much as llama.cpp does; a CPU with VNNI
                then reads a prompt more than twice as fast. None is 16, but 32 for a model loaded with
                `dtype="float32"`. `docs/performance.md` has the effect on the loss. Losses, logits and training never
                round.

        Returns:
            The model.

        Raises:
            ConfigError: For other bits; if the head is trained or its rows are no multiple of 64; if no layer could
                take its input in 8 bits.
        """
        self._set_lm_head_bits(lm_head_bits)
        self._set_activation_bits(activation_bits)
        return self.train(False)

    def _set_lm_head_bits(self, bits: int | None) -> None:
        if bits is not None and (isinstance(bits, bool) or bits != 8):
            raise ConfigError(f"lm_head_bits = {bits!r}: expected 8 or None")
        if bits != self._lm_head_bits:
            self.native.set_lm_head_bits(bits)
            self._lm_head_bits = bits

    def _set_activation_bits(self, bits: int | None) -> None:
        if bits is not None and (isinstance(bits, bool) or bits not in (8, 16, 32)):
            raise ConfigError(f"activation_bits = {bits!r}: expected 8, 16, 32 or None")
        self.native.set_activation_bits(bits)

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
        self._set_activation_bits(None)
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

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """Recomputes layers in the backward, which takes less memory.

        Args:
            gradient_checkpointing_kwargs: Makes no difference.
        """
        self.checkpointing = "true"

    def gradient_checkpointing_disable(self) -> None:
        """Keeps all activations for the backward, which takes more memory."""
        self.checkpointing = "false"

    def enable_input_require_grads(self) -> None:
        """Does nothing: gradients reach every adapter as it is."""

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Parameter:
        """Gives the embedding table and the head as many rows as there are tokens.

        New rows are the mean of the old ones; transformers draws them around it, with a billionth of the rows'
        covariance. Train them: `modules_to_save=["embed_tokens", "lm_head"]` of `get_peft_model`.

        Args:
            new_num_tokens: The number of tokens, usually `len(tokenizer)`; fewer than there are cuts rows off, None
                leaves the number.
            pad_to_multiple_of: Raises the number to a multiple of this.
            mean_resizing: True. With False transformers draws new rows around zero; here they are the mean all the
                same, and a warning says so.

        Returns:
            The embedding table's description.

        Raises:
            ConfigError: If a number is below 1.

        Example:
            >>> tokenizer.add_tokens(["<think>", "</think>"])  # doctest: +SKIP
            2
            >>> model.resize_token_embeddings(len(tokenizer)).shape  # doctest: +SKIP
            (128258, 2048)
        """
        numbers = {"new_num_tokens": new_num_tokens, "pad_to_multiple_of": pad_to_multiple_of}
        checks.check({"mean_resizing": checks.BOOL, **dict.fromkeys(numbers, checks.WHOLE)}, locals())
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}: expected at least 1")
        wanted = self.vocab_size if new_num_tokens is None else int(new_num_tokens)
        wanted += -wanted % (pad_to_multiple_of or 1)
        if not mean_resizing and wanted > self.vocab_size:
            tell_once(
                "resize_token_embeddings: mean_resizing=False: new rows are the mean of the old ones all the same"
            )
        self.native.resize_vocab(wanted)
        self._take_vocabulary()
        name, shape = next(iter(weight_shapes(self.config)))
        return Parameter(name, shape, any(trained == name for trained, _ in self.native.parameter_shapes))

    def _take_vocabulary(self) -> None:
        """Reads the vocabulary's size, after it has changed."""
        self.vocab_size = self.native.vocab_size
        self.config.vocab_size = self.vocab_size
        self._count()

    def _count(self) -> None:
        """Counts anew, after an adapter was added."""
        self._n_trainable, self._n_parameters = self.native.n_trainable, self.native.n_parameters
        self._nbytes = self.native.nbytes

    def _batch(self, input_ids: Any, attention_mask: Any) -> Batch:
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return Batch(input_ids, attention_mask, pad, pad in self._eos_ids(self.tokenizer))

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


def _loud(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of saving worth a line: those that ask for something else than what is done."""
    return {name: value for name, value in arguments.items() if name not in _SAVE or value is False}


def _only_lora(what: str, save_method: str) -> None:
    """Refuses merged weights."""
    name = str(save_method).lower().replace(" ", "_")
    if name not in _METHODS:
        raise ConfigError(f"{what}: save_method = {save_method!r}: expected one of {', '.join(_METHODS)}")
    if name != "lora":
        raise ConfigError(f'{what}: save_method = {save_method}: merged weights come in a later version; use "lora"')
