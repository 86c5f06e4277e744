"""Llama shapes with random weights: written once to a temporary folder, and the work a token of training takes."""

from __future__ import annotations

import json
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama with a tied head.

    Attributes:
        hidden: Width of the residual stream.
        ffn: Width of the MLP.
        layers: Decoder layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        vocab: Number of tokens.
    """

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name to (out, in) of a layer's matrices."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }

    def flops_per_token(self, *, recompute: bool) -> float:
        """Returns the useful floating-point operations of a training step, for each token.

        Two for each weight forward and two for the input's gradient; recomputation adds the layers' forward without the
        last product of each, and without the last layer. Adapters, attention scores and norms are not counted.

        Args:
            recompute: Whether layers run again in the backward.

        Returns:
            7.1e9 for Llama-3.2-1B with recomputation as torch does it; here a little less.
        """
        sizes = {name: out * into for name, (out, into) in self.linears.items()}
        linear, head = sum(sizes.values()), self.hidden * self.vocab
        again = (linear - sizes["mlp.down_proj"]) * (self.layers - 1) if recompute else 0
        return 2.0 * (2 * (linear * self.layers + head) + again)


SHAPES = {
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 64, 128_256),
    "llama-3.2-1b-4l": Shape(2048, 8192, 4, 32, 8, 64, 128_256),
    "llama-3.2-3b": Shape(3072, 8192, 28, 24, 8, 128, 128_256),
    "tiny": Shape(256, 688, 4, 8, 4, 32, 4096),
}


def write_model(name: str, folder: Path | None = None) -> Path:
    """Writes a shape's config and random bf16 weights, unless they are there.

    Args:
        name: One of `SHAPES`.
        folder: Where to; a folder of its own in the temporary folder if not given.

    Returns:
        The folder.
    """
    shape = SHAPES[name]
    folder = Path(tempfile.gettempdir()) / f"rustune-bench-{name}" if folder is None else folder
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"model.embed_tokens.weight": (shape.vocab, shape.hidden), "model.norm.weight": (shape.hidden,)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.{module}.weight": sizes for module, sizes in shape.linears.items()}
        tensors |= {
            f"{prefix}.{norm}.weight": (shape.hidden,) for norm in ("input_layernorm", "post_attention_layernorm")
        }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor, sizes in tensors.items():
        end = at + 2 * int(np.prod(sizes))
        header[tensor] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for sizes in tensors.values():
            file.write(_bf16(random, sizes).tobytes())
    (folder / "config.json").write_text(json.dumps(_config(shape)))
    return folder


def _bf16(random: np.random.Generator, sizes: tuple[int, ...]) -> NDArray[np.uint16]:
    """Normal with deviation 0.02, as models start; norms are ones."""
    if len(sizes) == 1:
        return np.full(sizes, 0x3F80, np.uint16)
    values: NDArray[np.float32] = random.standard_normal(sizes, dtype=np.float32)
    values *= 0.02
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
