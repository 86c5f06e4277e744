"""rustune: fine-tune Llama-family models in 4 bits on a plain CPU, with the interface Unsloth notebooks use."""

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
)

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "HubError",
    "ModelError",
    "RustuneError",
    "ShapeError",
    "TokenizerError",
    "WeightsError",
    "__version__",
]
