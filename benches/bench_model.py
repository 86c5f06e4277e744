"""A model folder of random weights in the shape of a real one, made once and used again by the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

SHAPES: dict[str, dict[str, int]] = {
    "llama-3.2-1b": {
        "hidden": 2048,
        "ffn": 8192,
        "layers": 16,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 64,
        "vocab": 128256,
    },
    "llama-3.2-1b-4l": {
        "hidden": 2048,
        "ffn": 8192,
        "layers": 4,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 64,
        "vocab": 128256,
    },
    "llama-3.2-3b": {
        "hidden": 3072,
        "ffn": 8192,
        "layers": 28,
        "heads": 24,
        "kv_heads": 8,
        "head_dim": 128,
        "vocab": 128256,
    },
    "smoke": {"hidden": 256, "ffn": 512, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 1024},
}


def tensors(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's tensors, with tied embeddings."""
    hidden, ffn = shape["hidden"], shape["ffn"]
    q_width, kv_width = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    made: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape["vocab"], hidden)}
    for i in range(shape["layers"]):
        layer = f"model.layers.{i}."
        made |= {
            layer + "self_attn.q_proj.weight": (q_width, hidden),
            layer + "self_attn.k_proj.weight": (kv_width, hidden),
            layer + "self_attn.v_proj.weight": (kv_width, hidden),
            layer + "self_attn.o_proj.weight": (hidden, q_width),
            layer + "mlp.gate_proj.weight": (ffn, hidden),
            layer + "mlp.up_proj.weight": (ffn, hidden),
            layer + "mlp.down_proj.weight": (hidden, ffn),
            layer + "input_layernorm.weight": (hidden,),
            layer + "post_attention_layernorm.weight": (hidden,),
        }
    made["model.norm.weight"] = (hidden,)
    return made


def make(folder: Path, shape: dict[str, int]) -> Path:
    """Writes `config.json` and bf16 `model.safetensors` unless they are there; returns the folder."""
    folder = folder / ("model-" + "-".join(str(value) for value in shape.values()))
    done = folder / "model.safetensors"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["ffn"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "vocab_size": shape["vocab"],
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    header: dict[str, object] = {}
    offset = 0
    for name, dims in tensors(shape).items():
        end = offset + 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(1)
    # Normal numbers are slow to draw: one pool of them, read from another place for each tensor.
    pool = (rng.standard_normal(1 << 24, np.float32) * 0.02).view(np.uint32) >> 16
    pool16 = pool.astype(np.uint16)
    part = done.with_suffix(".part")
    with part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dims in tensors(shape).values():
            n = int(np.prod(dims))
            if len(dims) == 1:
                file.write(np.full(n, 0x3F80, np.uint16).tobytes())
                continue
            start = int(rng.integers(0, 1 << 20))
            while n:
                taken = min(n, len(pool16) - start)
                file.write(pool16[start : start + taken].tobytes())
                n, start = n - taken, 0
    part.rename(done)
    return folder
