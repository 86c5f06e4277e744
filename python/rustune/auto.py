"""The names of transformers and PEFT for loading, adapting and running a model, over what is here.

They serve notebooks written for plain transformers with PEFT; `FastLanguageModel` does the work.
"""

from __future__ import annotations

import os
import random
import sys
from typing import Any, Final

import numpy as np

from rustune.config import TrainingArguments, unknown_argument
from rustune.model import Model
from rustune.models import FastLanguageModel
from rustune.notices import sort_arguments
from rustune.tokenizer import HABITS, Tokenizer
from rustune.trainer import SFTTrainer

_SPECIAL: Final = ("bos_token", "eos_token", "pad_token", "unk_token")


class AutoTokenizer:
    """Opens tokenizers by transformers' name."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Tokenizer:
        """Opens the tokenizer of a folder or a hub repository.

        Args:
            pretrained_model_name_or_path: A folder, or `owner/name`.
            **options: token, revision, cache_dir, local_files_only; padding_side, model_max_length, and special tokens
                such as `pad_token`, which are set on the tokenizer.

        Returns:
            The tokenizer.

        Raises:
            ConfigError: For an argument that does not exist.
            TokenizerError: If there is no vocabulary.
            HubError: If the repository cannot be had.
        """
        load = ("token", "revision", "cache_dir", "local_files_only")
        place = ("padding_side", "model_max_length", "chat_template", *_SPECIAL)
        others = {name: value for name, value in options.items() if name not in (*load, *place)}
        for name in others:
            if name not in HABITS:
                raise unknown_argument("AutoTokenizer.from_pretrained", name, (*load, *place, *HABITS))
        tokenizer = Tokenizer.from_pretrained(
            pretrained_model_name_or_path, **{name: options[name] for name in load if name in options}
        )
        for name in place:
            if options.get(name) is not None:
                setattr(tokenizer, name, options[name])
        return tokenizer


class AutoModelForCausalLM:
    """Loads models by transformers' name."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        quantization_config: Any = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        dtype: Any = None,
        torch_dtype: Any = None,
        **options: Any,
    ) -> Model:
        """Loads a model as its files have it, or in 4 or 8 bits if a `BitsAndBytesConfig` asks for them.

        Args:
            pretrained_model_name_or_path: A folder, a hub name, or the folder of an adapter.
            quantization_config: A `BitsAndBytesConfig`, ours or transformers'.
            load_in_4bit: Hold the linear layers in 4 bits.
            load_in_8bit: Hold them in 8 bits.
            dtype: As of `FastLanguageModel.from_pretrained`.
            torch_dtype: The older name of `dtype`.
            **options: As of `FastLanguageModel.from_pretrained`.

        Returns:
            The model; the tokenizer it was found with is its `tokenizer`.

        Raises:
            ConfigError: For a setting that cannot be used, or an argument that does not exist.
            ModelError: If the architecture is not there.
        """
        quantized = load_in_4bit or load_in_8bit or quantization_config is not None
        model, _ = FastLanguageModel.from_pretrained(
            pretrained_model_name_or_path,
            dtype=torch_dtype if dtype is None else dtype,
            load_in_4bit=load_in_4bit if quantization_config is None else None,
            load_in_8bit=load_in_8bit,
            load_in_16bit=not quantized,
            quantization_config=quantization_config,
            **options,
        )
        return model


class BitsAndBytesConfig:
    """How weights are quantized on load, by transformers' name.

    Args:
        load_in_4bit: Hold the linear layers in 4 bits.
        load_in_8bit: Hold them in 8 bits, as of `FastLanguageModel.from_pretrained`.
        bnb_4bit_quant_type: `nf4`, the default here; `fp4` is not there.
        bnb_4bit_use_double_quant: Whether the scales are quantized too.
        bnb_4bit_compute_dtype: As `dtype` of the loaders.
        **others: `llm_int8_...` and `bnb_4bit_quant_storage`, which mean nothing here: no columns are set apart as
            outliers, and the head is never quantized.

    Raises:
        ConfigError: For an argument that does not exist.
    """

    def __init__(
        self,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        *,
        bnb_4bit_quant_type: str = "nf4",
        bnb_4bit_use_double_quant: bool = False,
        bnb_4bit_compute_dtype: Any = None,
        **others: Any,
    ) -> None:
        known = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
        sort_arguments("BitsAndBytesConfig", others, _INT8, (*known, "bnb_4bit_compute_dtype"))
        self.load_in_8bit = load_in_8bit
        self.load_in_4bit = load_in_4bit
        self.bnb_4bit_quant_type = bnb_4bit_quant_type
        self.bnb_4bit_use_double_quant = bnb_4bit_use_double_quant
        self.bnb_4bit_compute_dtype = bnb_4bit_compute_dtype

    def to_dict(self) -> dict[str, Any]:
        """Returns all settings."""
        return dict(self.__dict__)


_INT8: Final = (
    "bnb_4bit_quant_storage",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "llm_int8_skip_modules",
    "llm_int8_threshold",
)


class Trainer(SFTTrainer):
    """`SFTTrainer` by transformers' name: for rows of token ids, with `TrainingArguments`' defaults.

    Args:
        model: From one of the loaders, with an adapter.
        args: `TrainingArguments`; its defaults if not given.
        data_collator: As of `SFTTrainer`.
        **arguments: As of `SFTTrainer`.
    """

    def __init__(
        self, model: Model | None = None, args: Any = None, data_collator: Any = None, **arguments: Any
    ) -> None:
        super().__init__(model, TrainingArguments() if args is None else args, data_collator=data_collator, **arguments)


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seeds Python's and numpy's generators, and torch's where it is in use; a run takes its seed from its settings.

    Args:
        seed: Any whole number.
        deterministic: Makes no difference: runs are.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if "torch.random" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
