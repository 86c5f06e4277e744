"""LLM.int8() weights from bitsandbytes and transformers: codes, scales, a checkpoint, and its dequantized model."""

from __future__ import annotations

import json
import tempfile

import torch
from bitsandbytes import functional as bnb
from golden_common import GOLDEN_DIR, generator, save_tensors
from golden_llama import (
    CASES,
    batch_tensors,
    build_batch,
    build_model,
    config_jsons,
    precision_report,
    reference_of,
    run_metadata,
)
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def vectors() -> dict[str, torch.Tensor]:
    """Return matrices of each dtype with the codes, scales and dequantized values that bitsandbytes gives."""
    rng = generator(6000)
    tensors: dict[str, torch.Tensor] = {}
    for name, dtype in DTYPES.items():
        matrix = 0.05 * torch.randn(7, 77, generator=rng)
        matrix[1] = torch.arange(77) * 0.5 - 19.0  # halves of a step, were absmax 127
        matrix[1, 0] = 127.0
        matrix[2] *= 1e5
        matrix[3] *= 1e-5  # denormal in half precision
        matrix[4, 5] = 900.0  # an outlier: everything else is close to zero
        matrix = matrix.to(dtype)
        codes, scales, _ = bnb.int8_vectorwise_quant(matrix.to(torch.float16))
        tensors[f"vectors/{name}/input"] = matrix
        tensors[f"vectors/{name}/codes"] = codes
        tensors[f"vectors/{name}/SCB"] = scales
        tensors[f"vectors/{name}/dequantized"] = bnb.int8_vectorwise_dequant(codes, scales)
    return tensors


def quantized(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return the model as transformers loads it with `load_in_8bit=True`."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(
            folder,
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
            dtype=torch.float32,
            attn_implementation="eager",
            device_map="cpu",
        )


def make_llama_int8() -> None:
    """Write `llama_int8.safetensors`: the model of `llama_gqa`, its linears in 8 bits.

    Raises:
        ValueError: transformers quantizes to something else than `int8_vectorwise_quant` of half precision.
    """
    case = CASES["gqa"]
    batch = build_batch(case)
    model = build_model(case)
    tensors = {**batch_tensors(batch), **vectors()}
    loaded = quantized(model)
    for name, tensor in loaded.state_dict().items():
        if "_proj." in name:
            tensors[f"bnb/{name}"] = tensor
    dense = build_model(case)
    modules = dict(loaded.named_modules())
    for name, parameter in dense.named_parameters():
        if not name.endswith("_proj.weight"):
            continue
        codes, scales, _ = bnb.int8_vectorwise_quant(parameter.detach().to(torch.float16))
        module: nn.Module = modules[name.removesuffix(".weight")]
        if not torch.equal(codes, module.weight.data) or not torch.equal(codes, tensors[f"bnb/{name}"]):
            raise ValueError(f"{name}: transformers' codes are not those of int8_vectorwise_quant")
        with torch.no_grad():
            parameter.copy_(bnb.int8_vectorwise_dequant(codes, scales))
    reference = reference_of(dense, case, batch, full=False)
    report = precision_report(reference, reference_of(dense.double(), case, batch, full=False))
    print(f"  int8: losses {[round(x, 4) for x in reference['losses_adamw'].tolist()]}, f32 to f64: {report}")
    metadata = {"case": "gqa", "f32_vs_f64": report, **config_jsons(case), **run_metadata()}
    metadata["quantization_config"] = json.dumps(loaded.config.quantization_config.to_dict())
    save_tensors(GOLDEN_DIR / "llama_int8.safetensors", {**tensors, **reference}, metadata)
