"""Which names each module answers, and where they live here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rustune import verbosity

Names = Mapping[str, str]
"""Name to `module:attribute`, or to `module:` for a module itself; nothing is imported before it is asked for."""

_CHAT: Final[Names] = {
    "CHAT_TEMPLATES": "rustune.chat_templates:CHAT_TEMPLATES",
    "apply_chat_template": "rustune:apply_chat_template",
    "get_chat_template": "rustune.chat_templates:get_chat_template",
    "standardize_data_formats": "rustune.chat_templates:standardize_data_formats",
    "standardize_sharegpt": "rustune.chat_templates:standardize_sharegpt",
    "to_sharegpt": "rustune:to_sharegpt",
    "train_on_responses_only": "rustune.trainer:train_on_responses_only",
}
_UNSLOTH_TRAINER: Final[Names] = {
    "UnslothTrainer": "rustune.unsloth_names:UnslothTrainer",
    "UnslothTrainingArguments": "rustune.unsloth_names:UnslothTrainingArguments",
    "unsloth_train": "rustune.unsloth_names:unsloth_train",
}
_TRL: Final[Names] = {
    "DPOConfig": "rustune.preference:DPOConfig",
    "DPOTrainer": "rustune.preference:DPOTrainer",
    "ORPOConfig": "rustune.preference:ORPOConfig",
    "ORPOTrainer": "rustune.preference:ORPOTrainer",
    "SFTConfig": "rustune.config:SFTConfig",
    "SFTTrainer": "rustune.trainer:SFTTrainer",
}

ALWAYS: Final[Mapping[str, Names]] = {
    "unsloth": {
        "FastLanguageModel": "rustune.models:FastLanguageModel",
        "FastModel": "rustune.models:FastLanguageModel",
        "__version__": "rustune._native:__version__",
        "add_new_tokens": "rustune.unsloth_names:add_new_tokens",
        "is_bf16_supported": "rustune:is_bfloat16_supported",
        "is_bfloat16_supported": "rustune:is_bfloat16_supported",
        **_CHAT,
        **_UNSLOTH_TRAINER,
    },
    "unsloth.chat_templates": _CHAT,
    "unsloth.trainer": _UNSLOTH_TRAINER,
    "trl": {"__version__": "rustune._native:__version__", **_TRL},
    "trl.trainer": _TRL,
}
"""Modules that are ours whatever is installed."""

PROXIED: Final[Mapping[str, Names]] = {
    "transformers": {
        "AutoModelForCausalLM": "rustune.auto:AutoModelForCausalLM",
        "AutoTokenizer": "rustune.auto:AutoTokenizer",
        "BitsAndBytesConfig": "rustune.auto:BitsAndBytesConfig",
        "DataCollatorForLanguageModeling": "rustune.collators:DataCollatorForLanguageModeling",
        "DataCollatorForSeq2Seq": "rustune.collators:DataCollatorForSeq2Seq",
        "EarlyStoppingCallback": "rustune.callbacks:EarlyStoppingCallback",
        "GenerationConfig": "rustune.generation:GenerationConfig",
        "TextIteratorStreamer": "rustune.streamers:TextIteratorStreamer",
        "TextStreamer": "rustune.streamers:TextStreamer",
        "Trainer": "rustune.auto:Trainer",
        "TrainerCallback": "rustune.callbacks:TrainerCallback",
        "TrainingArguments": "rustune.config:TrainingArguments",
        "pipeline": "rustune.pipelines:pipeline",
        "set_seed": "rustune.auto:set_seed",
    },
    "peft": {
        "AutoPeftModelForCausalLM": "rustune.peft_names:AutoPeftModelForCausalLM",
        "LoftQConfig": "rustune.peft_names:LoftQConfig",
        "LoraConfig": "rustune.peft_names:LoraConfig",
        "PeftModel": "rustune.peft_names:PeftModel",
        "get_peft_model": "rustune.peft_names:get_peft_model",
        "prepare_model_for_kbit_training": "rustune.peft_names:prepare_model_for_kbit_training",
    },
    "torch": {"cuda": "torch.cuda:"},
    "torch.cuda": {
        name: f"rustune.drop_in.machine:{name}"
        for name in (
            "current_device",
            "empty_cache",
            "get_device_capability",
            "get_device_name",
            "get_device_properties",
            "ipc_collect",
            "max_memory_allocated",
            "max_memory_reserved",
            "mem_get_info",
            "memory_allocated",
            "memory_reserved",
            "memory_summary",
            "reset_max_memory_allocated",
            "reset_peak_memory_stats",
            "synchronize",
        )
    },
}
"""Modules of which only these names are ours where they are installed."""

_LOGGING: Final[Names] = {name: f"rustune.verbosity:{name}" for name in verbosity.__all__}

STAND_INS: Final[Mapping[str, Names]] = {
    "transformers": {
        "DataCollatorWithPadding": "rustune.collators:DataCollatorWithPadding",
        "MaxTimeCriteria": "rustune.stopping:MaxTimeCriteria",
        "PreTrainedTokenizerBase": "rustune.tokenizer:Tokenizer",
        "StoppingCriteria": "rustune.stopping:StoppingCriteria",
        "StoppingCriteriaList": "rustune.stopping:StoppingCriteriaList",
        "TrainerControl": "rustune.callbacks:TrainerControl",
        "TrainerState": "rustune.callbacks:TrainerState",
        "default_data_collator": "rustune.collators:default_data_collator",
        "logging": "transformers.utils.logging:",
    },
    "transformers.trainer_callback": {
        "EarlyStoppingCallback": "rustune.callbacks:EarlyStoppingCallback",
        "TrainerCallback": "rustune.callbacks:TrainerCallback",
        "TrainerControl": "rustune.callbacks:TrainerControl",
        "TrainerState": "rustune.callbacks:TrainerState",
    },
    "transformers.trainer_utils": {"set_seed": "rustune.auto:set_seed"},
    "transformers.utils": {"logging": "transformers.utils.logging:"},
    "transformers.utils.logging": _LOGGING,
    "peft": {},
    "torch": {
        **{
            name: f"rustune.drop_in.torch_stand_in:{name}"
            for name in (
                "BoolTensor FloatTensor Generator IntTensor LongTensor Tensor __version__ all any arange argmax "
                "as_tensor autocast backends bfloat16 cat compile device distributed double dtype enable_grad eq exp "
                "float16 float32 float64 from_numpy full half inference_mode int16 int32 int64 int8 is_grad_enabled "
                "is_tensor isin log log_softmax long manual_seed "
                "mean no_grad ones ones_like set_default_dtype set_float32_matmul_precision set_grad_enabled "
                "softmax stack tensor uint8 version zeros zeros_like"
            ).split()
        },
        "bool": "rustune.drop_in.torch_stand_in:bool_",
        "float": "rustune.drop_in.torch_stand_in:float_",
        "int": "rustune.drop_in.torch_stand_in:int_",
    },
    "torch.cuda": {
        name: f"rustune.drop_in.machine:{name}"
        for name in (
            "device_count",
            "is_available",
            "is_bf16_supported",
            "is_initialized",
            "manual_seed",
            "manual_seed_all",
        )
    },
    "torch.nn": {"Module": "rustune.drop_in.torch_stand_in:Module", "functional": "torch.nn.functional:"},
    "torch.nn.functional": {
        "log_softmax": "rustune.drop_in.torch_stand_in:log_softmax",
        "softmax": "rustune.drop_in.torch_stand_in:softmax",
    },
    "torch.utils": {"data": "torch.utils.data:"},
    "torch.utils.data": {
        name: f"rustune.drop_in.torch_stand_in:{name}"
        for name in ("DataLoader", "Dataset", "IterableDataset", "get_worker_info")
    },
}
"""What stands in for absent modules besides."""
