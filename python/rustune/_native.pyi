"""What the compiled module offers; options and reports travel as JSON text."""

from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "SPECIAL_TOKEN_ROLES",
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "HubError",
    "Model",
    "ModelError",
    "Nf4Tensor",
    "Rows",
    "RustuneError",
    "ShapeError",
    "Tokenizer",
    "TokenizerError",
    "WeightsError",
    "__version__",
    "estimate_memory",
    "info",
    "mark_forked_child",
    "measure_peak",
    "newest_checkpoint",
    "num_threads",
    "resolve_model",
    "resolve_train_options",
    "set_num_threads",
    "standard_messages",
]

__version__: str

class RustuneError(Exception):
    """The root of every exception of rustune."""

class ConfigError(RustuneError, ValueError):
    """A setting that cannot be used."""

class ShapeError(RustuneError, ValueError):
    """Arrays whose sizes do not fit each other."""

class ModelError(RustuneError, ValueError):
    """A config.json that describes no model that can be run."""

class WeightsError(RustuneError, ValueError):
    """A weight file that is damaged, incomplete, or does not fit its config."""

class AdapterError(RustuneError, ValueError):
    """An adapter folder that cannot be applied."""

class DataError(RustuneError, ValueError):
    """Training or evaluation data that cannot be used."""

class TokenizerError(RustuneError, ValueError):
    """A tokenizer or chat template that cannot be read or rendered."""

class HubError(RustuneError, OSError):
    """A hub repository that could not be had."""

class CheckpointError(RustuneError):
    """A training checkpoint that cannot be written or resumed from."""

class DivergedError(RustuneError, ArithmeticError):
    """The loss or the gradient is no longer a finite number."""

SPECIAL_TOKEN_ROLES: list[str]

@final
class Tokenizer:
    """A vocabulary with its special tokens and chat templates."""

    @staticmethod
    def from_folder(path: str | PathLike[str]) -> Tokenizer | None: ...
    @staticmethod
    def from_state(state: str) -> Tokenizer: ...
    def to_state(self) -> str: ...
    def content_hash(self) -> str: ...
    def __reduce__(self) -> tuple[Any, tuple[str]]: ...
    def __len__(self) -> int: ...
    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]: ...
    def encode_with_offsets(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, id: int) -> str | None: ...
    def vocab(self) -> dict[str, int]: ...
    def special(self, role: str) -> str | None: ...
    def set_special(self, role: str, token: str) -> int: ...
    def special_tokens(self) -> dict[str, str]: ...
    def additional_special_tokens(self) -> list[str]: ...
    def all_special_ids(self) -> list[int]: ...
    def add_special_tokens(self, tokens: list[str]) -> int: ...
    def add_tokens(self, tokens: list[str]) -> int: ...
    @property
    def eos_ids(self) -> list[int]: ...
    @property
    def adds_bos(self) -> bool: ...
    padding_side: str
    model_max_length: int | None
    chat_template: str | None
    def render(
        self,
        messages: Any,
        *,
        tools: Any = None,
        add_generation_prompt: bool = False,
        variables: Any = None,
        template: str | None = None,
    ) -> tuple[str, list[tuple[int, int]]]: ...
    def encode_chat(
        self,
        messages: Any,
        *,
        tools: Any = None,
        add_generation_prompt: bool = False,
        variables: Any = None,
        template: str | None = None,
    ) -> tuple[list[int], list[int] | None]: ...
    def markers(self) -> tuple[str, str]: ...
    def save(self, path: str | PathLike[str]) -> None: ...

@final
class Nf4Tensor:
    """A tensor quantized to NF4."""

    @staticmethod
    def quantize(
        values: NDArray[np.float32] | NDArray[np.uint16],
        shape: list[int],
        dtype: str,
        block_size: int,
        double_quant: bool,
    ) -> Nf4Tensor: ...
    @property
    def packed(self) -> NDArray[np.uint8]: ...
    @property
    def absmax(self) -> NDArray[np.float32]: ...
    @property
    def nested(self) -> tuple[NDArray[np.uint8], NDArray[np.float32], float] | None: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def block_size(self) -> int: ...
    @property
    def double_quant(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...
    def dequantize(self) -> NDArray[np.float32]: ...

@final
class Rows:
    """Tokenised rows."""

    @staticmethod
    def read(tokenizer: Tokenizer | None, options: str, batches: Iterable[dict[str, list[Any]]]) -> Rows: ...
    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> dict[str, list[int]]: ...
    @property
    def report(self) -> str: ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def n_trained(self) -> int: ...
    @property
    def longest(self) -> int: ...
    def n_packed(self, max_length: int) -> int: ...
    def train_on_responses_only(
        self, tokenizer: Tokenizer, instruction_part: str | None, response_part: str | None
    ) -> tuple[Rows, str, str, int]: ...

@final
class Model:
    """A model with its adapter."""

    @staticmethod
    def load(folder: str | PathLike[str], dtype: str | None, quantization: str) -> Model: ...
    def add_adapter(self, options: str) -> str: ...
    def load_adapter(self, folder: str | PathLike[str]) -> str: ...
    def save_adapter(self, folder: str | PathLike[str], base_model: str | None = None) -> None: ...
    def save_full(self, folder: str | PathLike[str]) -> None: ...
    @property
    def config(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def folder(self) -> Path: ...
    @property
    def has_adapter(self) -> bool: ...
    @property
    def is_fully_trained(self) -> bool: ...
    @property
    def n_trainable(self) -> int: ...
    @property
    def n_parameters(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def eos_token_ids(self) -> list[int]: ...
    @property
    def pad_token_id(self) -> int | None: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def logits(self, rows: list[list[int]]) -> list[NDArray[np.float32]]: ...
    def token_losses(self, rows: list[list[int]], labels: list[list[int]]) -> list[NDArray[np.float32]]: ...
    def generate(
        self,
        prompts: list[list[int]],
        options: str,
        tokenizer: Tokenizer | None = None,
        on_token: Callable[[int, list[int]], bool | None] | None = None,
    ) -> list[list[int]]: ...
    def train(
        self,
        train: Rows,
        eval: Rows | None,
        options: str,
        checkpointing: str = "unsloth",
        resume: str | PathLike[str] | None = None,
        observer: object | None = None,
        tokenizer: Tokenizer | None = None,
        base_model: str | None = None,
    ) -> str: ...
    def training_memory(self, train: Rows, options: str, checkpointing: str) -> str: ...
    def evaluate(self, rows: Rows, batch_size: int, observer: object | None = None) -> tuple[float, int]: ...
    def parameters(self) -> dict[str, NDArray[np.float32]]: ...

def standard_messages(conversation: Any) -> list[dict[str, Any]]: ...
def mark_forked_child() -> None: ...
def set_num_threads(n_threads: int) -> None: ...
def num_threads() -> int: ...
def info() -> str: ...
def measure_peak(dtype: str) -> str: ...
def estimate_memory(
    folder: str | PathLike[str],
    quantization: str,
    lora: str,
    n_tokens: int,
    dtype: str | None = None,
    optim: str = "adamw_8bit",
    checkpointing: str = "unsloth",
    available: int | None = None,
) -> str: ...
def newest_checkpoint(output_dir: str | PathLike[str]) -> tuple[Path | None, list[tuple[Path, str]]]: ...
def resolve_model(
    name: str,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    on_event: Callable[[str, str, int, int | None], object] | None = None,
) -> Path: ...
def resolve_train_options(options: str, n_rows: int) -> str: ...
