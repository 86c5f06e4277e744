"""Loading models and adding adapters."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from rustune import _native, checks, hub
from rustune._native import ConfigError
from rustune.config import unknown_argument
from rustune.model import Model as Model
from rustune.model import checkpointing_name as checkpointing_name
from rustune.model import native_tokenizer as native_tokenizer
from rustune.notices import sort_arguments, tell_once
from rustune.tokenizer import Tokenizer

# Arguments of Unsloth's and transformers' loaders that mean nothing here.
_IDLE: Final = (
    "attn_implementation",
    "auto_model",
    "disable_log_stats",
    "fast_inference",
    "float32_mixed_precision",
    "float8_kv_cache",
    "gpu_memory_utilization",
    "low_cpu_mem_usage",
    "max_lora_rank",
    "max_memory",
    "offload_embedding",
    "offload_folder",
    "qat_scheme",
    "return_dict",
    "unsloth_force_compile",
    "unsloth_tiled_mlp",
    "unsloth_vllm_standby",
    "use_cache",
    "use_exact_model_name",
    "use_flash_attention_2",
    "use_safetensors",
)
_LOADING_KINDS: Final = {
    "max_seq_length": checks.WHOLE,
    "load_in_4bit": checks.BOOL,
    "load_in_8bit": checks.BOOL,
    "load_in_16bit": checks.BOOL,
    "resize_model_vocab": checks.WHOLE,
    "full_finetuning": checks.BOOL,
    "token": checks.SWITCH,
    "use_gradient_checkpointing": checks.SWITCH,
    "revision": checks.TEXT,
    "rope_scaling": checks.TABLE,
    "local_files_only": checks.BOOL,
}
_QUANTIZATION_KINDS: Final = {
    "load_in_4bit": checks.BOOL,
    "load_in_8bit": checks.BOOL,
    "bnb_4bit_quant_type": checks.TEXT,
    "bnb_4bit_use_double_quant": checks.BOOL,
    "block_size": checks.POSITIVE,
}
_ADAPTER_KINDS: Final = {
    "target_modules": checks.TEXTS,
    "lora_alpha": checks.NUMBER,
    "lora_dropout": checks.NUMBER,
    "bias": checks.TEXT,
    "layers_to_transform": checks.WHOLES,
    "layers_pattern": checks.TEXTS,
    "finetune_last_n_layers": checks.WHOLE,
    "use_gradient_checkpointing": checks.SWITCH,
    "random_state": checks.WHOLE,
    "max_seq_length": checks.WHOLE,
    "use_rslora": checks.BOOL,
    "use_dora": checks.BOOL,
    "modules_to_save": checks.TEXTS,
    "ensure_weight_tying": checks.BOOL,
    "init_lora_weights": checks.SWITCH,
    "rank_pattern": checks.WHOLE_TABLE,
    "alpha_pattern": checks.NUMBER_TABLE,
}
_TABLES: Final = frozenset({"embed_tokens", "lm_head"})
_MAX_VOCAB: Final = 2**22
_MAX_RANK: Final = 2**16  # beyond every matrix there is; a slip of the keyboard must not eat the memory
_ALL_LINEAR: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
        **others: Any,
    ) -> tuple[Model, Any]:
        """Loads a model and its tokenizer.

        Args:
            model_name: A folder, a hub name, or the folder of an adapter, whose base is then found and loaded.
            max_seq_length: Longest row in training; 2048 if not given.
            dtype: What the operands of matrix products are rounded to: `float32` (not at all), `bfloat16`, `int16`
                (16-bit whole numbers with a float32 scale for each 64 neighbours: closer to float32 than bfloat16), or
                None for what this machine does best, which float16 means too. Sums and all that is trained are float32.
                Unless it is float32, generating may round what enters a quantized layer: see `for_inference`.
            load_in_4bit: Hold the linear layers in 4 bits; True unless 8 or 16 bits or full fine-tuning is asked for.
            load_in_8bit: Hold the linear layers in 8 bits, a scale a row, as LLM.int8() stores them. Products see the
                dequantized weights: inputs are not rounded to 8 bits and no columns are set apart, which is more exact.
            load_in_16bit: Keep the weights as the files have them.
            full_finetuning: Train every weight.
            token: For the hub; better kept in HF_TOKEN.
            device_map: Makes no difference: the model is where the processor is.
            rope_scaling: Scales the positions as transformers does, instead of the scaling in the files:
                `{"rope_type": "linear", "factor": 2.0}`, or llama3 with its numbers; `type` is the older name of
                `rope_type`. An adapter does not remember it: load it with the same again.
            fix_tokenizer: Makes no difference: a pad token is always found.
            trust_remote_code: Makes no difference: no code of a repository is ever run.
            use_gradient_checkpointing: How many layers are computed again in the backward: `unsloth`, as few as the
                memory there is allows; True, every layer; False, none. The results are the same.
            resize_model_vocab: The number of tokens the model is to have, as of `Model.resize_token_embeddings`.
            revision: Branch, tag or commit on the hub.
            random_state: Makes no difference: loading draws no numbers.
            quantization_config: A BitsAndBytesConfig, or a mapping like it.
            local_files_only: Never ask the hub.
            cache_dir: Where downloads are kept, instead of the hub's usual cache.
            **others: What other libraries' loaders take and means nothing here (`fast_inference`, ...), named in one
                warning.

        Returns:
            The model and the tokenizer; None, with a warning, if the folder has no tokenizer files.

        Raises:
            ConfigError: For a setting that cannot be used, or an argument that does not exist.
            ModelError: If the architecture is not there.
            WeightsError: If weights are damaged or missing.
            OSError: If the folder cannot be read, or the hub not be reached.

        Example:
            >>> model, tokenizer = FastLanguageModel.from_pretrained("path/to/llama")  # doctest: +SKIP
        """
        # The values written here by habit: "auto" and the first device are where the model would be anyway.
        idle = {"device_map": device_map, "fix_tokenizer": fix_tokenizer, "random_state": random_state}
        usual = {"device_map": ("sequential", "auto", None), "fix_tokenizer": (True,), "random_state": (random_state,)}
        sort_arguments(
            "from_pretrained",
            {**{name: value for name, value in idle.items() if not checks.is_one_of(value, usual[name])}, **others},
            (*_IDLE, *idle),
            _arguments(FastLanguageModel.from_pretrained),
        )
        checks.check(_LOADING_KINDS, locals())
        if resize_model_vocab is not None and not 1 <= resize_model_vocab <= _MAX_VOCAB:
            raise ConfigError(f"resize_model_vocab = {resize_model_vocab}: expected from 1 to {_MAX_VOCAB}")
        if max_seq_length is not None and (not isinstance(max_seq_length, (int, np.integer)) or max_seq_length < 1):
            raise ConfigError(f"max_seq_length = {max_seq_length!r}: expected at least 1")
        secret = token if isinstance(token, str) else None
        hub.warn_of_literal(token)
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
        if not isinstance(model_name, (str, os.PathLike)) or not checks.is_unicode(os.fspath(model_name)):
            raise ConfigError(f"model_name = {model_name!r}: expected a folder or a hub name")
        name = os.fspath(model_name)

        find = partial(hub.resolve, token=secret, cache_dir=cache_dir, local_files_only=bool(local_files_only))
        folder = find(name, revision=revision)
        adapter_folder = folder if (Path(folder) / "adapter_config.json").is_file() else None
        if adapter_folder is not None:
            name = _base_of(adapter_folder)
            folder = find(name)
        room = None if max_seq_length is None else int(max_seq_length)
        scaling = None if rope_scaling is None else _as_json("rope_scaling", rope_scaling)
        native = _native.Model.load(folder, _dtype_name(dtype), checks.as_json(quantization), room, scaling)
        if resize_model_vocab is not None:
            native.resize_vocab(int(resize_model_vocab))
        adapter, n_tokens = None, native.vocab_size
        if adapter_folder is not None:
            adapter = json.loads(native.load_adapter(adapter_folder))
            adapter["base_model_name_or_path"] = os.path.abspath(name) if os.path.isdir(name) else name
        tokenizer = Tokenizer.from_folder(adapter_folder or folder)
        if tokenizer is None and adapter_folder is not None:
            tokenizer = Tokenizer.from_folder(folder)
            if native.vocab_size > n_tokens:
                warnings.warn(
                    f"{adapter_folder}: the adapter knows {native.vocab_size} tokens, its base {n_tokens}, and there "
                    "is no tokenizer beside it; call tokenizer.save_pretrained for that folder",
                    stacklevel=2,
                )
        length = 2048 if max_seq_length is None else int(max_seq_length)
        if tokenizer is None:
            warnings.warn(f"{folder}: has no tokenizer files; only rows of token ids can be used", stacklevel=2)
        elif max_seq_length is not None:
            tokenizer.model_max_length = length
        if rope_scaling is None and native.max_position_embeddings > native.original_positions:
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
        ensure_weight_tying: bool = False,
        init_lora_weights: bool | str = True,
        loftq_config: Any = None,
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
            target_modules: Names of linear layers, or `all-linear`; all seven kinds if not given. `embed_tokens` and
                `lm_head` among them are trained whole, as in `modules_to_save`.
            lora_alpha: The adapter is scaled by `lora_alpha / r`.
            lora_dropout: Share of inputs set to zero in training.
            bias: `none`.
            layers_to_transform: A layer's number, or several; all if not given.
            layers_pattern: `layers`, which is what the list of layers is called.
            finetune_last_n_layers: Instead of `layers_to_transform`.
            use_gradient_checkpointing: `unsloth`, True or False, as in `from_pretrained`; None leaves it as loaded.
            random_state: Seed of the adapter's first weights.
            max_seq_length: Longest row in training; None leaves it as loaded.
            use_rslora: Scale by `lora_alpha / sqrt(r)`.
            use_dora: Train the lengths of the adapted matrices' rows as well (DoRA); with dropout each product is
                computed twice.
            modules_to_save: Modules that are trained whole, in float32, and saved with the adapter: `embed_tokens`,
                `lm_head`, and the norms `input_layernorm`, `post_attention_layernorm`, `norm` (all of them).
            ensure_weight_tying: Where the head is the embedding table, keep it so when either is trained; otherwise
                they become two.
            init_lora_weights: True or `gaussian`; `pissa` begins with the leading singular vectors of each matrix and
                leaves the rest to the frozen part (`pissa_niter_N`: N rounds of looking for them); `loftq` begins with
                those of what 4 bits lost. These read the model's files again, and take seconds to minutes.
            loftq_config: `loftq_bits` 4 and `loftq_iter` 1, as a dict or a LoftQConfig.
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
            raise unknown_argument("get_peft_model", name, _arguments(FastLanguageModel.get_peft_model))
        if not isinstance(model, Model):
            raise ConfigError(f"model = {type(model).__name__}: expected what from_pretrained returns")
        if not checks.WHOLE.fits(r) or not 1 <= r <= _MAX_RANK:
            raise ConfigError(f"r = {r!r}: expected a whole number from 1 to {_MAX_RANK}")
        checks.check(_ADAPTER_KINDS, locals(), required=("lora_alpha", "lora_dropout"))
        if layers_pattern not in (None, "layers", ["layers"]):
            raise ConfigError(f"layers_pattern = {layers_pattern}: expected None or layers, the only list of layers")
        loftq = _loftq(loftq_config, init_lora_weights)
        if use_gradient_checkpointing is not None:
            model.checkpointing = checkpointing_name(use_gradient_checkpointing)
        if max_seq_length is not None:
            if max_seq_length < 1:
                raise ConfigError(f"max_seq_length = {max_seq_length}: expected at least 1")
            model.max_seq_length = int(max_seq_length)
        if model.native.is_fully_trained:
            warnings.warn("get_peft_model: the model was loaded with full_finetuning=True; no adapter", stacklevel=2)
            return model
        targets = target_modules if target_modules in (None, "all-linear") else checks.listed(target_modules)
        layers = None if layers_to_transform is None else checks.listed(layers_to_transform)
        saved = [] if modules_to_save is None else checks.listed(modules_to_save)
        if model.has_new_tokens and not {*saved, *_list_of(targets)} >= _TABLES:
            tell_once("get_peft_model: embed_tokens and lm_head are trained too, since tokens were added")
            saved = [*saved, *sorted(_TABLES)]
        written = {
            "r": int(r),
            "lora_alpha": float(lora_alpha),
            "lora_dropout": float(lora_dropout),
            "target_modules": targets,
            "bias": bias,
            "use_rslora": use_rslora,
            "use_dora": use_dora,
            "layers_to_transform": None if layers is None else [int(layer) for layer in layers],
            "finetune_last_n_layers": finetune_last_n_layers,
            "modules_to_save": saved,
            "ensure_weight_tying": ensure_weight_tying,
            "init_lora_weights": init_lora_weights,
            "loftq_config": loftq,
            "rank_pattern": dict(rank_pattern or {}),
            "alpha_pattern": dict(alpha_pattern or {}),
            "random_state": None if random_state is None else int(random_state) % 2**64,
        }
        if model.native.has_adapter:
            _same_adapter(model.adapter or {}, written)
            return model
        tied = model.native.is_tied
        model.adapter = json.loads(model.native.add_adapter(checks.as_json(written)))
        _tell_of_whole_modules(model, targets, tied=tied)
        model._count()
        return model

    @staticmethod
    def for_inference(model: Model, *, lm_head_bits: int | None = None, activation_bits: int | None = None) -> Model:
        """Makes a model ready for generating.

        Args:
            model: The model.
            lm_head_bits: 8 generates with the LM head in 8 bits; None with the head as it is.
            activation_bits: What generation may round the inputs of layers to: 8, 16, or 32 for nothing; None is 16,
                and 32 for a model loaded with `dtype="float32"`. See `Model.for_inference`.

        Returns:
            The same model.

        Raises:
            ConfigError: For other bits; if the head is trained or its rows are no multiple of 64; if no layer could
                take its input in 8 bits.
        """
        return model.for_inference(lm_head_bits=lm_head_bits, activation_bits=activation_bits)

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


def _quantization(written: dict[str, Any], config: Any, dtype: Any) -> tuple[dict[str, Any], Any]:
    """The engine's options and the dtype, from the arguments and a BitsAndBytesConfig, which wins."""
    if config is not None:
        to_dict = getattr(config, "to_dict", None)
        given = config if isinstance(config, Mapping) else to_dict() if to_dict else getattr(config, "__dict__", None)
        if not isinstance(given, Mapping):
            raise ConfigError(f"quantization_config = {config!r}: expected a BitsAndBytesConfig or a dict")
        checks.check(_QUANTIZATION_KINDS, given)
        names = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "block_size")
        written = written | {name: given[name] for name in names if given.get(name) is not None}
        compute = given.get("bnb_4bit_compute_dtype")
        # Their default, float32, stands there whether or not it was written; only another choice is a wish.
        dtype = compute if dtype is None and str(compute).removeprefix("torch.") == "bfloat16" else dtype
    return {name: value for name, value in written.items() if value is not None}, dtype


def _as_json(name: str, table: Mapping[str, Any]) -> str:
    """A dict of plain values as the engine takes it."""
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in table.items()}
    try:
        return json.dumps(plain, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} = {dict(table)!r}: expected names and plain values: {error}") from None


def _loftq(config: Any, init: Any) -> dict[str, int] | None:
    """LoftQ's settings, from a mapping or an object like PEFT's LoftQConfig; None where they say nothing."""
    if config is None or (isinstance(config, Mapping) and not config):
        return None
    written = config if isinstance(config, Mapping) else getattr(config, "__dict__", None)
    if written is None:
        raise ConfigError(f"loftq_config = {config!r}: expected a dict or a LoftQConfig")
    for name, value in written.items():
        if name not in ("loftq_bits", "loftq_iter"):
            raise unknown_argument("loftq_config", str(name), ("loftq_bits", "loftq_iter"))
        if not checks.WHOLE.fits(value):
            raise ConfigError(f"loftq_config = {dict(written)}: {name}: expected a whole number")
    if init != "loftq":
        tell_once(f"loftq_config: means nothing without init_lora_weights='loftq' (it is {init!r})")
        return None
    return {str(name): int(value) for name, value in written.items()}


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


def _list_of(targets: Any) -> list[str]:
    """The names in `target_modules`."""
    if targets in (None, "all-linear"):
        return list(_ALL_LINEAR)
    return [targets] if isinstance(targets, str) else list(targets)


def _tell_of_whole_modules(model: Model, targets: Any, *, tied: bool) -> None:
    """Says once what becomes of the embedding table and the head when they are trained."""
    tables = [name for name in _list_of((model.adapter or {})["modules_to_save"]) if name.endswith(tuple(_TABLES))]
    if not tables:
        return
    model._set_lm_head_bits(None)
    moved = [name for name in _list_of(targets) if name.endswith(tuple(_TABLES))]
    if moved:
        tell_once(
            f"get_peft_model: {' and '.join(moved)} in target_modules: trained whole, in float32, as modules_to_save; "
            "no low-rank adapter"
        )
    if tied and not (model.adapter or {})["ensure_weight_tying"]:
        tell_once(
            "get_peft_model: the head of this model is its embedding table; from now on they are two, as in PEFT "
            "(ensure_weight_tying=True keeps them one)"
        )


def _same_adapter(present: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses other settings than those of the adapter that is there."""
    targets = set(_list_of(wanted["target_modules"]))
    tables = {name for name in targets if name.endswith(tuple(_TABLES))}
    wanted = wanted | {
        "target_modules": sorted(targets - tables),
        "modules_to_save": sorted({*wanted["modules_to_save"], *tables}),
    }
    for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora"):
        there: Any = present.get(name)
        if isinstance(there, Sequence) and not isinstance(there, str):
            there = sorted(there)
        if there is not None and there != wanted[name]:
            raise ConfigError(f"{name} = {wanted[name]}: the model has an adapter with {name} = {there} already")


def _dtype_name(dtype: Any) -> str | None:
    """`float32`, `bfloat16`, `int16` or None, from a name or from torch's or numpy's type."""
    if checks.is_one_of(dtype, (None, "auto")):
        return None
    name = str(dtype if isinstance(dtype, str) else getattr(dtype, "__name__", dtype)).removeprefix("torch.")
    if name in ("float16", "half"):
        tell_once("dtype = float16: there is no such arithmetic here; what this machine does best is used instead")
        return None
    if name not in ("float32", "bfloat16", "int16"):
        raise ConfigError(f"dtype = {name}: expected None (what this machine does best), float32, bfloat16 or int16")
    return name


def _arguments(function: Callable[..., Any]) -> list[str]:
    """The names of a function's arguments."""
    return list(inspect.signature(function).parameters)
