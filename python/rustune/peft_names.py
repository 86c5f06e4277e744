"""PEFT's names for adapters, over `FastLanguageModel`: for notebooks written for plain transformers with PEFT."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from rustune._native import ConfigError
from rustune.auto import AutoModelForCausalLM
from rustune.config import unknown_argument
from rustune.model import Model
from rustune.models import FastLanguageModel
from rustune.notices import sort_arguments


class AutoPeftModelForCausalLM:
    """Loads an adapter with its base by PEFT's name."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Model:
        """Loads the base that an adapter names, and the adapter.

        Args:
            pretrained_model_name_or_path: The folder or hub name of an adapter.
            **options: As of `AutoModelForCausalLM.from_pretrained`; `is_trainable` makes no difference.

        Returns:
            The model with the adapter.

        Raises:
            ConfigError: For a setting that cannot be used, or if there is no adapter.
        """
        options.pop("is_trainable", None)
        model = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, **options)
        if model.adapter is None:
            raise ConfigError(f"{os.fspath(pretrained_model_name_or_path)}: has no adapter_config.json")
        return model


class PeftModel:
    """Puts a saved adapter on a model that is loaded already, by PEFT's name."""

    @staticmethod
    def from_pretrained(
        model: Model, model_id: str | os.PathLike[str], adapter_name: str = "default", **options: Any
    ) -> Model:
        """Puts a saved adapter on a model.

        Args:
            model: The base; it is changed.
            model_id: The folder or hub name of the adapter.
            adapter_name: `default`: there is one.
            **options: token, revision, cache_dir, local_files_only; `is_trainable` makes no difference.

        Returns:
            The same model.

        Raises:
            AdapterError: If the folder holds no adapter for this model.
            ConfigError: If the model has an adapter already, or for an argument that does not exist.
        """
        _expect_model(model)
        if adapter_name != "default":
            raise ConfigError(f"adapter_name = {adapter_name}: expected default: there is one adapter")
        options.pop("is_trainable", None)
        model.load_adapter(model_id, **options)
        return model


class LoraConfig:
    """The settings of an adapter, as PEFT has them and with its defaults: rank 8, alpha 8, q_proj and v_proj.

    Args:
        **settings: Those of `FastLanguageModel.get_peft_model`; task_type and inference_mode make no difference.

    Raises:
        ConfigError: For a name that does not exist.

    Example:
        >>> LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]).r
        16
    """

    r: int
    lora_alpha: float
    target_modules: Any

    def __init__(self, **settings: Any) -> None:
        for name in settings:
            if name not in _LORA_DEFAULTS:
                raise unknown_argument("LoraConfig", name, _LORA_DEFAULTS)
        self.__dict__.update({**_LORA_DEFAULTS, **settings})

    def __repr__(self) -> str:
        return f"LoraConfig({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"

    def to_dict(self) -> dict[str, Any]:
        """Returns all settings."""
        return dict(self.__dict__)


@dataclass
class LoftQConfig:
    """How LoftQ quantizes, as PEFT has it.

    Attributes:
        loftq_bits: 4.
        loftq_iter: 1.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1


_LORA_DEFAULTS: Final[Mapping[str, Any]] = {
    "r": 8,
    "target_modules": None,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "bias": "none",
    "use_rslora": False,
    "modules_to_save": None,
    "ensure_weight_tying": False,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": None,
    "alpha_pattern": None,
    "loftq_config": None,
    "use_dora": False,
    "task_type": None,
    "inference_mode": False,
}


def get_peft_model(model: Model, peft_config: Any, adapter_name: str = "default", **options: Any) -> Model:
    """Adds an adapter to be trained, by PEFT's name.

    Args:
        model: From one of the loaders.
        peft_config: A `LoraConfig`, ours or PEFT's.
        adapter_name: `default`: there is one.
        **options: `autocast_adapter_dtype` and the like, which mean nothing here.

    Returns:
        The same model, now with the adapter.

    Raises:
        ConfigError: For a setting that cannot be used.
    """
    _expect_model(model)
    if adapter_name != "default":
        raise ConfigError(f"adapter_name = {adapter_name}: expected default: there is one adapter")
    idle = ("autocast_adapter_dtype", "low_cpu_mem_usage", "mixed", "revision")
    sort_arguments("get_peft_model", options, idle, ("peft_config", "adapter_name"))
    if not callable(getattr(peft_config, "to_dict", None)):
        raise ConfigError(f"peft_config = {type(peft_config).__name__}: expected a LoraConfig")
    written = peft_config.to_dict()
    kind = written.get("peft_type", "LORA")
    if str(getattr(kind, "value", kind)) != "LORA":
        raise ConfigError(f"peft_config.peft_type = {kind}: expected LORA")
    ours = _LORA_DEFAULTS.keys() - {"inference_mode"}
    given = {name: value for name, value in written.items() if name in ours and value is not None}
    # What PEFT adapts in a Llama if nothing else is said (its table LORA_TARGET_MODULES for model_type llama).
    given.setdefault("target_modules", ["q_proj", "v_proj"])
    # PEFT's sets come in no order, and its empty settings as empty containers.
    if isinstance(given.get("target_modules"), set):
        given["target_modules"] = sorted(given["target_modules"])
    others = {name: value for name, value in written.items() if name not in ours and name not in _PEFT_IDLE and value}
    if others:
        name, value = next(iter(others.items()))
        raise ConfigError(f"peft_config.{name} = {value!r}: not there yet; leave it out")
    return FastLanguageModel.get_peft_model(model, given.pop("r", 8), use_gradient_checkpointing=None, **given)


# Fields of PEFT's LoraConfig that change no number here.
_PEFT_IDLE: Final = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
)


def prepare_model_for_kbit_training(
    model: Model,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Any = None,
) -> Model:
    """Makes a quantized model ready for training; only the recomputation of layers is anything to be set.

    Args:
        model: From one of the loaders.
        use_gradient_checkpointing: Whether layers are recomputed in the backward.
        gradient_checkpointing_kwargs: Makes no difference.

    Returns:
        The same model.
    """
    _expect_model(model)
    return model.for_training(use_gradient_checkpointing)


def _expect_model(model: Any) -> None:
    if not isinstance(model, Model):
        raise ConfigError(f"model = {type(model).__name__}: expected a model loaded by rustune")
