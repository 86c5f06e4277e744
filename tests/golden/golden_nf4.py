"""NF4 quantization vectors from bitsandbytes for every block size, 16-bit inputs and tails."""

from __future__ import annotations

import torch
from bitsandbytes import functional as bnb
from golden_common import GOLDEN_DIR, generator, save_tensors

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def indices_by_threshold(values: torch.Tensor, block: int) -> torch.Tensor:
    """Return the indices by the documented rule: thresholds strictly below `x * (1 / absmax)`."""
    code = bnb.get_4bit_type("nf4", device="cpu")
    blocks = -(-values.numel() // block)
    padded = torch.zeros(blocks * block)
    padded[: values.numel()] = values.float().reshape(-1)
    absmax = padded.view(blocks, block).abs().amax(dim=1).clamp(min=1e-38)
    scaled = (padded.view(blocks, block) * (1.0 / absmax)[:, None]).reshape(-1)[: values.numel()]
    return torch.bucketize(scaled, (code[:-1] + code[1:]) / 2)


def make_nf4_extra() -> None:
    """Write `nf4_extra.safetensors`.

    Raises:
        ValueError: bitsandbytes and the documented rule differ; the seed has hit a near-tie in a tail, which
            bitsandbytes divides by absmax where full blocks multiply by its reciprocal.
    """
    rng = generator(2000)
    tensors: dict[str, torch.Tensor] = {}
    for block in BLOCK_SIZES:
        for name, dtype in DTYPES.items():
            # Two blocks and a tail; the tail of the f16 case is odd, so its last low nibble is padding.
            tail = {"f32": 2, "bf16": block // 2, "f16": block // 3 // 2 * 2 + 1}[name]
            values = 0.05 * torch.randn(2 * block + tail, generator=rng)
            if name == "bf16":
                values[:block] *= 100.0
            values = values.to(dtype)
            packed, state = bnb.quantize_4bit(values, blocksize=block, quant_type="nf4")
            flat = packed.reshape(-1).long()
            got = torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)[: values.numel()]
            if not torch.equal(got, indices_by_threshold(values, block)):
                raise ValueError(f"block size {block}, {name}: bitsandbytes differs from the documented rule")
            key = f"{name}_{block}"
            tensors[f"{key}/input"] = values
            tensors[f"{key}/packed"] = packed
            tensors[f"{key}/absmax"] = state.absmax
    save_tensors(GOLDEN_DIR / "nf4_extra.safetensors", tensors, {"quant_type": "nf4"})
