"""Writes tiny random Llamas with a byte tokenizer, so that the tests need no files from elsewhere."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAD, BOS, EOS, USER, ASSISTANT = range(256, 261)
SPECIAL = {PAD: "<|pad|>", BOS: "<|begin|>", EOS: "<|end|>", USER: "<|user|>", ASSISTANT: "<|assistant|>"}
# Llama 3's tokens around messages, for a tokenizer that has them too; nothing else uses these ids.
LLAMA_3 = {261: "<|start_header_id|>", 262: "<|end_header_id|>", 263: "<|eot_id|>"}
VOCAB = 264
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_model(folder: Path, *, seed: int = 0, tokenizer: bool = True, llama_3: bool = False, **changes: Any) -> Path:
    """Writes a two-layer Llama with grouped heads; `changes` go into its config."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": "float32",
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", weights(config, seed))
    if tokenizer:
        write_tokenizer(folder, {**SPECIAL, **LLAMA_3} if llama_3 else SPECIAL)
    return folder


def weights(config: dict[str, Any], seed: int) -> dict[str, NDArray[np.float32]]:
    """Draws the tensors of a config."""
    random = np.random.default_rng(seed)
    hidden, mlp, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def matrix(out: int, into: int) -> NDArray[np.float32]:
        return random.normal(0.0, 0.15, (out, into)).astype(np.float32)

    made = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden) * 4}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes = {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
        }
        made |= {f"{name}.{module}.weight": matrix(*shape) for module, shape in shapes.items()}
        made |= {
            f"{name}.{norm}.weight": np.ones(hidden, np.float32)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
    made["model.norm.weight"] = np.ones(hidden, np.float32)
    return made | {"lm_head.weight": matrix(config["vocab_size"], hidden)}


def write_safetensors(path: Path, tensors: dict[str, NDArray[np.float32]]) -> None:
    """Writes float32 tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(array.tobytes() for array in tensors.values()))


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Reads a file's metadata and tensors."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    kinds = {"F32": np.float32, "F64": np.float64, "I64": np.int64, "I32": np.int32, "U8": np.uint8}
    tensors: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + at for at in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[begin:end], kinds[entry["dtype"]]).reshape(entry["shape"])
    return header["__metadata__"], tensors


def write_tokenizer(folder: Path, tokens: dict[int, str] = SPECIAL) -> None:
    """Writes a tokenizer whose tokens are bytes and special ones."""
    special = [
        {
            "id": id_,
            "content": content,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for id_, content in tokens.items()
    ]
    contents: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {sign: byte for byte, sign in enumerate(byte_signs())},
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "pad_token": SPECIAL[PAD],
        "chat_template": TEMPLATE,
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def byte_signs() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary, GPT-2's."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def rows(count: int = 24, length: int = 12, seed: int = 1) -> list[dict[str, list[int]]]:
    """Draws rows that can be learned: a start, then every token is the one before plus a step."""
    random = np.random.default_rng(seed)
    made = []
    for start, step in zip(random.integers(0, 256, count), random.integers(1, 4, count), strict=True):
        ids = [int(start + step * at) % 256 for at in range(length)]
        made.append({"input_ids": ids, "labels": list(ids)})
    return made
