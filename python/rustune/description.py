"""What a model says of itself: its device, its config, its weights by name and size."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any


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


class Parameter:
    """A weight's description.

    Attributes:
        name: As in the checkpoint.
        shape: Rows and columns.
        requires_grad: Whether it is trained.
    """

    def __init__(self, name: str, shape: tuple[int, ...], requires_grad: bool) -> None:
        self.name = name
        self.shape = shape
        self.requires_grad = requires_grad

    def __repr__(self) -> str:
        return f"Parameter({self.name!r}, {list(self.shape)}, requires_grad={self.requires_grad})"

    def numel(self) -> int:
        """Returns the number of elements."""
        return math.prod(self.shape)

    nelement = numel


def weight_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Lists the weights of a Llama's checkpoint.

    Args:
        config: Its config.

    Yields:
        Names and shapes.
    """
    hidden, mlp, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    heads = config.num_attention_heads
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    linears = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config.num_hidden_layers):
        for name, shape in linears.items():
            yield f"model.layers.{layer}.{name}.weight", shape
            if config.get("attention_bias" if name.startswith("self_attn") else "mlp_bias"):
                yield f"model.layers.{layer}.{name}.bias", shape[:1]
        yield f"model.layers.{layer}.input_layernorm.weight", (hidden,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (vocab, hidden)
