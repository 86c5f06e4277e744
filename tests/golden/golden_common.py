"""What all golden files share: seeds, library versions, a byte-stable safetensors writer."""

from __future__ import annotations

import json
import platform
import struct
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN_DIR = Path(__file__).resolve().parent
SEED = 3407
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "numpy", "safetensors", "tokenizers")
MAX_BYTES = 1_000_000

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.int8: "I8",
}


def generator(offset: int = 0) -> torch.Generator:
    """Return a CPU generator seeded with the shared seed plus an offset.

    Args:
        offset: Keeps the random streams of different files apart.

    Returns:
        A fresh generator.
    """
    return torch.Generator().manual_seed(SEED + offset)


def provenance() -> dict[str, str]:
    """Return seed, script and versions as they go into every file's metadata.

    Returns:
        Flat string pairs, as safetensors metadata wants them.
    """
    facts = {name: version(name) for name in LIBRARIES}
    facts["python"] = platform.python_version()
    facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    facts["seed"] = str(SEED)
    facts["script"] = "tests/golden/make_golden.py"
    return facts


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its content only.

    The library's own writer orders metadata by a randomised hash, which would make every run a new file.
    Tensors are laid out by name; data starts at a multiple of 8 bytes.

    Args:
        path: Where to write.
        tensors: Name to tensor.
        metadata: Further metadata; `provenance()` is added.

    Raises:
        ValueError: A dtype has no safetensors name here, or the file is too large for the repository.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted({**provenance(), **metadata}.items()))}
    chunks: list[bytes] = []
    offset = 0
    # Wide dtypes first, so that every tensor starts at a multiple of its element size.
    for name in sorted(tensors, key=lambda key: (-tensors[key].element_size(), key)):
        tensor = tensors[name].detach().contiguous()
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{name}: dtype {tensor.dtype} has no name here; add it to _DTYPE_NAMES")
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    blob = struct.pack("<Q", len(text)) + text + b"".join(chunks)
    if len(blob) >= MAX_BYTES:
        raise ValueError(f"{path.name}: {len(blob)} bytes, but a golden file must stay under {MAX_BYTES}")
    path.write_bytes(blob)
    print(f"  {path.name}: {len(blob):,} bytes, {len(tensors)} tensors")


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file with the provenance under `metadata`.

    Args:
        path: Where to write.
        content: What to write besides the metadata.
    """
    text = json.dumps({"metadata": provenance(), **content}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"  {path.name}: {len(text):,} bytes")


def max_rel_diff(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return max |got - want| over max |want|, the measure the tests use.

    Args:
        got: The tensor under test.
        want: The reference.

    Returns:
        The ratio; 0 for two zero tensors.
    """
    diff = float((got.double() - want.double()).abs().max())
    scale = float(want.double().abs().max())
    return diff / scale if scale > 0.0 else diff


def one_thread() -> None:
    """Make torch single-threaded and deterministic, so that reruns give the same bytes."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    np.random.seed(SEED)  # PEFT and accelerate touch the global generators
    torch.manual_seed(SEED)
