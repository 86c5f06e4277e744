"""Fine-tunes Llama-family models in 4 bits on a plain CPU, with the interface notebooks know.

Example:
    >>> from rustune import FastLanguageModel, SFTConfig, SFTTrainer
"""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any

from rustune import _native
from rustune import verbosity as logging
from rustune._native import (
    AdapterError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    HubError,
    ModelError,
    RustuneError,
    ShapeError,
    TokenizerError,
    WeightsError,
    __version__,
    num_threads,
    set_num_threads,
)
from rustune.auto import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, set_seed
from rustune.callbacks import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from rustune.chat_templates import CHAT_TEMPLATES, get_chat_template, standardize_data_formats, standardize_sharegpt
from rustune.collators import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq
from rustune.config import SFTConfig, TrainingArguments
from rustune.generation import GenerationConfig
from rustune.marking import preview
from rustune.model import Model
from rustune.models import FastLanguageModel
from rustune.peft_names import (
    AutoPeftModelForCausalLM,
    LoftQConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from rustune.pipelines import pipeline
from rustune.preference import DPOConfig, DPOTrainer, ORPOConfig, ORPOTrainer
from rustune.search import BestRun
from rustune.sharegpt import to_sharegpt
from rustune.stopping import StoppingCriteria, StoppingCriteriaList
from rustune.streamers import TextIteratorStreamer, TextStreamer
from rustune.text_templates import apply_chat_template
from rustune.tokenizer import Tokenizer
from rustune.trainer import SFTTrainer, TrainOutput, train_on_responses_only
from rustune.unsloth_names import UnslothTrainer, UnslothTrainingArguments, add_new_tokens, unsloth_train

if TYPE_CHECKING:
    from rustune import nf4

FastModel = FastLanguageModel

__all__ = [
    "CHAT_TEMPLATES",
    "AdapterError",
    "AutoModelForCausalLM",
    "AutoPeftModelForCausalLM",
    "AutoTokenizer",
    "BestRun",
    "BitsAndBytesConfig",
    "CheckpointError",
    "ConfigError",
    "DPOConfig",
    "DPOTrainer",
    "DataCollatorForLanguageModeling",
    "DataCollatorForSeq2Seq",
    "DataError",
    "DivergedError",
    "EarlyStoppingCallback",
    "FastLanguageModel",
    "FastModel",
    "GenerationConfig",
    "HubError",
    "LoftQConfig",
    "LoraConfig",
    "Model",
    "ModelError",
    "ORPOConfig",
    "ORPOTrainer",
    "PeftModel",
    "RustuneError",
    "SFTConfig",
    "SFTTrainer",
    "ShapeError",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "TextIteratorStreamer",
    "TextStreamer",
    "Tokenizer",
    "TokenizerError",
    "TrainOutput",
    "Trainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingArguments",
    "UnslothTrainer",
    "UnslothTrainingArguments",
    "WeightsError",
    "__version__",
    "add_new_tokens",
    "apply_chat_template",
    "get_chat_template",
    "get_peft_model",
    "info",
    "is_bf16_supported",
    "is_bfloat16_supported",
    "logging",
    "nf4",
    "num_threads",
    "pipeline",
    "prepare_model_for_kbit_training",
    "preview",
    "set_num_threads",
    "set_seed",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
    "unsloth_train",
]


def info() -> dict[str, Any]:
    """Says what this machine offers.

    Returns:
        Version, instruction sets (the active one first named), threads, and memory in bytes.

    Raises:
        ConfigError: If RUSTUNE_ISA names an instruction set that is not there.

    Example:
        >>> info()["threads"] >= 1
        True
    """
    facts: dict[str, Any] = json.loads(_native.info())
    return facts


def is_bfloat16_supported(including_emulation: bool = False) -> bool:
    """Tells whether bfloat16 is what this machine does best.

    Args:
        including_emulation: Whether slow bfloat16 counts too; it works everywhere.

    Returns:
        Whether `dtype=None` means bfloat16 here.
    """
    return including_emulation or bool(info()["prefers_bfloat16"])


is_bf16_supported = is_bfloat16_supported


def __getattr__(name: str) -> Any:
    # `rustune.nf4` without its own import statement; what is not used is not loaded.
    if name == "nf4":
        return importlib.import_module("rustune.nf4")
    raise AttributeError(f"module 'rustune' has no attribute {name!r}")
