"""`SFTConfig` and `TrainingArguments`: the settings of a run, as notebooks write them.

What is not written is filled in by the engine, the one home of every default, as soon as the object is made: reading a
field back gives what will run.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar, Final, TypeVar

from rustune import _native, checks, reporting
from rustune._native import ConfigError
from rustune.checks import is_unicode
from rustune.notices import tell_meaningless
from rustune.notices import unknown_argument as unknown_argument

_T = TypeVar("_T")

# Older spellings of the same setting.
_ALIASES: Final = {
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
}

# What the engine is told, and the kind of value it takes.
_ENGINE: Final[dict[str, type]] = {
    "per_device_train_batch_size": int,
    "per_device_eval_batch_size": int,
    "gradient_accumulation_steps": int,
    "warmup_steps": float,
    "warmup_ratio": float,
    "max_steps": int,
    "num_train_epochs": float,
    "learning_rate": float,
    "lr_scheduler_type": str,
    "lr_scheduler_kwargs": dict,
    "optim": str,
    "optim_args": str,
    "weight_decay": float,
    "adam_beta1": float,
    "adam_beta2": float,
    "adam_epsilon": float,
    "max_grad_norm": float,
    "logging_strategy": str,
    "logging_steps": float,
    "logging_first_step": bool,
    "save_strategy": str,
    "save_steps": float,
    "save_total_limit": int,
    "eval_strategy": str,
    "eval_steps": float,
    "eval_delay": float,
    "eval_on_start": bool,
    "metric_for_best_model": str,
    "greater_is_better": bool,
    "load_best_model_at_end": bool,
    "save_only_model": bool,
    "dataloader_drop_last": bool,
    "seed": int,
    "data_seed": int,
    "output_dir": str,
    "train_sampling_strategy": str,
    "max_length": int,
    "packing": bool,
    "group_by_length": bool,
    "neftune_noise_alpha": float,
    "embedding_learning_rate": float,
}

_SEEDS: Final = ("seed", "data_seed")
_LARGEST: Final = 2**63 - 1

# Where a number of rows is asked for and none is known yet; enough for a batch of any size.
_ANY_ROWS: Final = 1 << 31

_HUB_STRATEGIES: Final = ("end", "every_save", "checkpoint", "all_checkpoints")

# The kinds of values of the other fields.
_KINDS: Final[dict[str, checks.Kind]] = {
    **dict.fromkeys(
        (
            "assistant_only_loss",
            "batch_eval_metrics",
            "bf16",
            "completion_only_loss",
            "disable_tqdm",
            "do_eval",
            "fp16",
            "hub_private_repo",
            "overwrite_output_dir",
            "prediction_loss_only",
            "push_to_hub",
        ),
        checks.BOOL,
    ),
    **dict.fromkeys(
        (
            "chat_template_path",
            "dataset_text_field",
            "eos_token",
            "hub_model_id",
            "hub_revision",
            "hub_strategy",
            "logging_dir",
            "loss_type",
            "packing_strategy",
            "pad_token",
            "project",
            "run_name",
            "truncation_mode",
        ),
        checks.TEXT,
    ),
    **dict.fromkeys(("gradient_checkpointing", "resume_from_checkpoint"), checks.SWITCH),
    **dict.fromkeys(("dataset_kwargs", "model_init_kwargs"), checks.TABLE),
    "report_to": checks.TEXTS,
}

# What would change the result and is not there yet: only these values pass (falsy ones always do).
_MISSING: Final[dict[str, tuple[Any, ...]]] = {
    "include_for_metrics": (),
    "label_smoothing_factor": (),
    "loss_type": ("nll",),
    "optim_target_modules": (),
    "truncation_mode": ("keep_start",),
}

# Fields that mean nothing here, and the values that are not worth a line.
_IDLE: Final[dict[str, tuple[Any, ...]]] = {
    "activation_offloading": (False,),
    "auto_find_batch_size": (False,),  # what a run takes is known before its first step
    "dataloader_num_workers": (0,),
    "dataloader_persistent_workers": (False,),
    "dataloader_prefetch_factor": (None,),
    "ddp_find_unused_parameters": (None, False),
    "deepspeed": (None,),
    "eval_packing": (None, False),  # rows of evaluation never see each other, packed or not
    "fsdp": (None, False, "", []),
    "ignore_data_skip": (False,),  # a resumed run finds its place without going over what it has seen
    "shuffle_dataset": (False,),  # the rows are shuffled in every pass
    "tf32": (None, False),
    "torch_compile": (False,),
    "torch_empty_cache_steps": (None,),
    "use_liger_kernel": (False,),
}

# Further names of transformers and trl, of this year or an earlier one, that mean nothing here.
_FOREIGN: Final = frozenset(
    """
    accelerator_config activation_checkpointing activation_checkpointing_kwargs chars_per_token dataloader_in_order
    dataloader_multiprocessing_context dataset_batch_size ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_static_graph ddp_timeout debug dispatch_batches enable_jit_checkpoint eval_use_gather_object fp16_backend
    fp16_opt_level fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap half_precision_backend infinite
    jit_mode_eval liger_kernel_config mp_parameters num_of_sequences parallelism_config past_index ray_scope
    restore_callback_states_from_checkpoint router_aux_loss_coef save_on_each_node save_safetensors sharded_ddp
    skip_memory_metrics split_batches torch_compile_backend torch_compile_mode torchdynamo tpu_metrics_debug
    tpu_num_cores trackio_bucket_id trackio_space_id trackio_static_space_id trust_remote_code
    unsloth_logit_chunk_multiplier unsloth_num_chunks use_cache use_ipex use_legacy_prediction_loop use_liger
    use_mps_device vllm_sampling_params xpu_backend
    """.split()
)


def _plain(value: Any) -> Any:
    """An enum's value, a numpy number's number, a path's text; other things as they are."""
    if isinstance(value, Enum):
        value = value.value
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        # Arrays of several numbers have none to give; whoever checks the value names it.
        with contextlib.suppress(ValueError, RuntimeError, TypeError):
            value = value.item()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return value


def _checked(name: str, value: Any, kind: type) -> Any:
    """A value the engine can take, or an error that names the field."""
    if value is None:
        return None
    expected = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", dict: "a dict"}[kind]
    fits = {
        dict: isinstance(value, dict),
        int: isinstance(value, int) or (isinstance(value, float) and value.is_integer()),
        float: isinstance(value, (int, float)),
        str: isinstance(value, str),
        bool: isinstance(value, bool),
    }[kind]
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{name} = {value!r}: expected {expected}")
    if kind is float and not _is_finite(value):
        raise ConfigError(f"{name} = {value}: expected a finite number")
    if kind is int and not (0 if name in _SEEDS else -_LARGEST) <= value <= _LARGEST:
        raise ConfigError(f"{name} = {value}: expected {'at least 0, and ' if name in _SEEDS else ''}less than 2**63")
    if kind is str and not is_unicode(value):
        raise ConfigError(f"{name} = {value!r}: holds half of a surrogate pair, which stands for no character")
    return int(value) if kind is int else value


def _is_finite(value: float) -> bool:
    """Whether a number is one that 64 bits can hold."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _is_nothing(value: Any) -> bool:
    """Whether a value asks for nothing: None, False, 0, or something empty."""
    if hasattr(value, "__len__"):
        return len(value) == 0
    return value is None or (isinstance(value, (bool, int, float)) and not value)


def _from_json(name: str, text: str) -> Any:
    """What a text of the command line says."""
    try:
        return json.loads(text)
    except ValueError:
        raise ConfigError(f"{name} = {text!r}: expected a dict, or one written as JSON") from None


def _names_unknown(cls: type[_T]) -> type[_T]:
    """Lets a dataclass accept older spellings, and answer an unknown argument with the nearest known one."""
    generated: Callable[..., None] = cls.__init__
    known = {entry.name for entry in fields(cls) if entry.init}  # type: ignore[arg-type]

    @functools.wraps(generated)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in list(kwargs):
            right = _ALIASES.get(name, name)
            if right in _FOREIGN:
                continue
            if right not in known:
                raise unknown_argument(cls.__name__, name, known | _ALIASES.keys())
            if right == name:
                continue
            value = kwargs.pop(name)
            if kwargs.get(right) not in (None, value):
                raise ConfigError(f"{name} = {value!r}: contradicts {right} = {kwargs[right]!r}; write one of them")
            kwargs[right] = value
        foreign = {name: kwargs.pop(name) for name in _FOREIGN & kwargs.keys()}
        generated(self, *args, **kwargs)
        idle = [name for name, usual in _IDLE.items() if not checks.is_one_of(getattr(self, name), usual)]
        tell_meaningless(cls.__name__, [*idle, *(name for name, value in foreign.items() if not _is_nothing(value))])

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_names_unknown
@dataclass
class TrainingArguments:
    """Settings of a run with transformers' defaults: batches of 8, AdamW, a log entry every 500 steps.

    Fields that mean nothing on a CPU are accepted; those that would elsewhere are told of in one line. A field whose
    feature is not there yet is an error unless it is left at its default.

    Raises:
        ConfigError: For an unknown name, a value out of range, or what is not there yet.

    Example:
        >>> TrainingArguments(output_dir="outputs", max_steps=60).learning_rate
        5e-05
    """

    preset: ClassVar[str] = "training_arguments"

    # Any: None until the engine has filled it in; enums, paths and numpy's numbers are accepted.
    output_dir: Any = None
    per_device_train_batch_size: Any = None
    per_device_eval_batch_size: Any = None
    gradient_accumulation_steps: Any = None
    warmup_steps: Any = None
    warmup_ratio: Any = None
    max_steps: Any = None
    num_train_epochs: Any = None
    learning_rate: Any = None
    embedding_learning_rate: float | None = None
    lr_scheduler_type: Any = None
    lr_scheduler_kwargs: Any = None
    optim: Any = None
    optim_args: Any = None
    optim_target_modules: Any = None
    weight_decay: Any = None
    adam_beta1: Any = None
    adam_beta2: Any = None
    adam_epsilon: Any = None
    max_grad_norm: Any = None
    label_smoothing_factor: float = 0.0
    neftune_noise_alpha: float | None = None
    seed: Any = None
    data_seed: Any = None
    logging_strategy: Any = None
    logging_steps: Any = None
    logging_first_step: Any = None
    logging_dir: str | None = None
    logging_nan_inf_filter: bool = True
    save_strategy: Any = None
    save_steps: Any = None
    save_total_limit: int | None = None
    save_only_model: bool = False
    eval_strategy: Any = None
    eval_steps: Any = None
    eval_delay: float = 0
    eval_on_start: bool = False
    eval_accumulation_steps: int | None = None
    batch_eval_metrics: bool = False
    eval_do_concat_batches: bool = True
    do_train: bool = False
    do_eval: bool = False
    do_predict: bool = False
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    resume_from_checkpoint: Any = None
    overwrite_output_dir: bool = False
    ignore_data_skip: bool = False
    fp16: bool = False
    bf16: bool | None = None
    fp16_full_eval: bool = False
    bf16_full_eval: bool = False
    tf32: bool | None = None
    group_by_length: bool = False
    train_sampling_strategy: Any = None
    length_column_name: str = "length"
    auto_find_batch_size: bool = False
    full_determinism: bool = False
    gradient_checkpointing: bool | str | None = None
    gradient_checkpointing_kwargs: Any = None
    report_to: Any = None
    run_name: str | None = None
    project: str | None = None
    disable_tqdm: bool | None = None
    log_level: str = "passive"
    log_level_replica: str = "warning"
    log_on_each_node: bool = True
    remove_unused_columns: bool = True
    label_names: Any = None
    prediction_loss_only: bool = False
    dataloader_drop_last: bool = False
    dataloader_num_workers: int = 0
    dataloader_pin_memory: bool = True
    dataloader_persistent_workers: bool = False
    dataloader_prefetch_factor: int | None = None
    include_tokens_per_second: bool = False
    include_num_input_tokens_seen: Any = False
    average_tokens_across_devices: bool = True
    torch_compile: bool = False
    torch_empty_cache_steps: int | None = None
    use_cpu: bool = False
    no_cuda: bool = False
    use_liger_kernel: bool = False
    deepspeed: Any = None
    fsdp: Any = None
    ddp_find_unused_parameters: bool | None = None
    local_rank: int = -1
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_strategy: str = "every_save"
    hub_token: str | None = field(default=None, repr=False)
    hub_private_repo: bool | None = None
    hub_always_push: bool = False
    hub_revision: str | None = None
    include_for_metrics: Any = None
    # What trl's SFTConfig adds. TrainingArguments take them too: notebooks mix both.
    max_length: int | None = None
    dataset_text_field: str = "text"
    dataset_num_proc: int | None = None
    dataset_kwargs: Any = None
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    packing: bool = False
    packing_strategy: str = "bfd"
    truncation_mode: str = "keep_start"
    shuffle_dataset: bool = False
    padding_free: bool | None = None
    eval_packing: bool | None = None
    pad_to_multiple_of: int | str | None = None
    pad_token: str | None = None
    eos_token: str | None = None
    chat_template_path: str | None = None
    model_init_kwargs: Any = None
    loss_type: str = "nll"
    activation_offloading: bool = False

    def __post_init__(self) -> None:
        """Checks every field and fills in what was not written."""
        for name in _ENGINE:
            setattr(self, name, _plain(getattr(self, name)))
        for name in _KINDS:
            setattr(self, name, _plain(getattr(self, name)))
        for name in ("lr_scheduler_kwargs", "dataset_kwargs", "model_init_kwargs"):
            if isinstance(text := getattr(self, name), str):
                setattr(self, name, _from_json(name, text))
        checks.check(_KINDS, vars(self))
        self.engine_options()
        if self.hub_token is not None and not isinstance(self.hub_token, str):
            raise ConfigError("hub_token: expected a text")
        for name, passes in _MISSING.items():
            value = _plain(getattr(self, name))
            if not _is_nothing(value) and not checks.is_one_of(value, passes):
                raise ConfigError(f"{name} = {value!r}: not there yet; leave it out")
        self._check_dataset_kwargs()
        if self.packing and self.packing_strategy != "bfd":
            raise ConfigError(f"packing_strategy = {self.packing_strategy!r}: not there yet; expected 'bfd'")
        if self.hub_strategy not in _HUB_STRATEGIES:
            raise ConfigError(f"hub_strategy = {self.hub_strategy!r}: expected {', '.join(_HUB_STRATEGIES)}")
        if self.fp16 and self.bf16:
            raise ConfigError("fp16 = True: contradicts bf16 = True; dtype of from_pretrained chooses the arithmetic")
        self._check_report_to()
        self._fill_in()

    @property
    def train_batch_size(self) -> int:
        """Rows of a micro-batch."""
        return int(self.per_device_train_batch_size)

    @property
    def eval_batch_size(self) -> int:
        """Rows of an evaluation batch."""
        return int(self.per_device_eval_batch_size)

    @property
    def max_seq_length(self) -> int | None:
        """The older name of `max_length`."""
        return self.max_length

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields; a token is not shown.

        Returns:
            Name to value.
        """
        shown = asdict(self)
        if shown["hub_token"]:
            shown["hub_token"] = "<HUB_TOKEN>"
        return shown

    def engine_options(self) -> str:
        """Returns what the engine is told.

        Returns:
            JSON for `resolve_train_options` and `Model.train`.

        Raises:
            ConfigError: If a field holds what the engine cannot take.
        """
        written = {name: _checked(name, _plain(getattr(self, name)), kind) for name, kind in _ENGINE.items()}
        return json.dumps(
            {"preset": self.preset, **{name: value for name, value in written.items() if value is not None}}
        )

    def plan(self, n_rows: int) -> dict[str, int]:
        """Returns the length of the run.

        Args:
            n_rows: Rows of the training data.

        Returns:
            steps_per_epoch, total_steps and epochs.

        Raises:
            ConfigError: If a field was changed to what cannot be used.
        """
        plan: dict[str, int] = json.loads(_native.resolve_train_options(self.engine_options(), n_rows))["plan"]
        return plan

    def _check_dataset_kwargs(self) -> None:
        """Refuses wishes of `dataset_kwargs` that nothing is done about."""
        known = ("add_special_tokens", "skip_prepare_dataset", "append_concat_token")
        for name, value in (self.dataset_kwargs or {}).items():
            if name not in known:
                raise unknown_argument("dataset_kwargs", name, known)
            if not isinstance(value, bool):
                raise ConfigError(f"dataset_kwargs: {name} = {value!r}: expected True or False")

    def _check_report_to(self) -> None:
        named = self.report_to if isinstance(self.report_to, (list, tuple)) else [self.report_to]
        self.report_to = reporting.checked([name for name in map(_plain, named) if name not in (None, "none")])

    def _fill_in(self) -> None:
        resolved = json.loads(_native.resolve_train_options(self.engine_options(), _ANY_ROWS))["train"]
        adam = resolved["adam"]
        self.per_device_train_batch_size = resolved["per_device_train_batch_size"]
        self.per_device_eval_batch_size = resolved["per_device_eval_batch_size"]
        self.gradient_accumulation_steps = resolved["gradient_accumulation_steps"]
        self.warmup_steps = resolved["warmup"].get("steps", 0)
        self.warmup_ratio = resolved["warmup"].get("share", 0.0)
        self.max_steps = resolved["length"].get("steps", -1)
        if "epochs" in resolved["length"]:
            self.num_train_epochs = resolved["length"]["epochs"]
        elif self.num_train_epochs is None:
            unset = json.loads(_native.resolve_train_options(json.dumps({"preset": self.preset}), _ANY_ROWS))["train"]
            self.num_train_epochs = unset["length"]["epochs"]
        self.learning_rate = resolved["learning_rate"]
        self.lr_scheduler_type = self.lr_scheduler_type or resolved["schedule"]
        self.optim = self.optim or {"adamw": "adamw_torch"}.get(resolved["optimizer"], resolved["optimizer"])
        self.adam_beta1, self.adam_beta2, self.adam_epsilon = adam["beta1"], adam["beta2"], adam["eps"]
        self.weight_decay = adam["weight_decay"]
        self.max_grad_norm = resolved["max_grad_norm"]
        self.logging_strategy, self.logging_steps = _when(resolved["logging"], self.logging_steps)
        self.save_strategy, self.save_steps = _when(resolved["save"], self.save_steps)
        self.eval_strategy, self.eval_steps = _when(resolved["eval"], self.eval_steps)
        self.logging_first_step = resolved["logging_first_step"]
        self.do_eval = self.do_eval or self.eval_strategy != "no"
        if self.load_best_model_at_end or self.save_strategy == "best":
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = resolved["best"]["greater"]
        if self.bf16 is None:
            # As Unsloth and trl set it: what the machine does best, unless something else is asked for.
            prefers = self.preset == "sft" and not self.fp16
            self.bf16 = prefers and bool(json.loads(_native.info())["prefers_bfloat16"])
        self.seed = resolved["seed"]
        self.output_dir = resolved["output_dir"]


@_names_unknown
@dataclass
class SFTConfig(TrainingArguments):
    """Settings of a run with Unsloth's defaults: batches of 4 x 2, 8-bit AdamW, warm-up 0.1, a log entry every step.

    The fields are those of `TrainingArguments`.

    Raises:
        ConfigError: For an unknown name, a value out of range, or what is not there yet.

    Example:
        >>> SFTConfig(learning_rate=2e-4, max_steps=60).gradient_accumulation_steps
        2
    """

    preset: ClassVar[str] = "sft"


def settings_from(args: Any) -> TrainingArguments:
    """Returns settings of ours for what a trainer was given.

    Args:
        args: Settings of ours, an object of transformers or trl with `to_dict`, a mapping of names, or None.

    Returns:
        The object itself if it is ours; `SFTConfig` for a mapping or None.

    Raises:
        ConfigError: If something in it cannot be used.
    """
    if isinstance(args, TrainingArguments):
        return args
    if args is None:
        return SFTConfig()
    if isinstance(args, Mapping):
        checks.check({"args": checks.TABLE}, {"args": args})
        return SFTConfig(**args)
    if not callable(getattr(args, "to_dict", None)):
        raise ConfigError(f"args = {type(args).__name__}: expected SFTConfig or TrainingArguments")
    written: dict[str, Any] = args.to_dict()
    # Their to_dict hides whatever is called a token, eos_token and pad_token too.
    written |= {name: getattr(args, name, None) for name in written if name.endswith("_token")}
    # Their objects list every reporter that happens to be installed, asked for or not.
    reporters = written.pop("report_to", None)
    if reporters and reporters not in ("none", ["none"], "all"):
        warnings.warn(f"report_to = {reporters}: nothing is reported; write it in rustune's SFTConfig", stacklevel=3)
    # Their default, and not a wish to keep every layer: what the model was loaded with decides.
    if written.get("gradient_checkpointing") is False:
        del written["gradient_checkpointing"]
    if written.pop("train_sampling_strategy", None) == "group_by_length":
        written["group_by_length"] = True
    known = {entry.name for entry in fields(TrainingArguments)}
    return TrainingArguments(**{name: value for name, value in written.items() if name in known})


def _when(resolved: str | dict[str, float], written: float | None) -> tuple[str, float | None]:
    """Strategy and steps of something done in the course of a run."""
    if isinstance(resolved, dict):
        return "steps", next(iter(resolved.values()))
    return {"never": "no"}.get(resolved, resolved), written
