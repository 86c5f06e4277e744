"""DoRA, PiSSA and LoftQ in PEFT over the tiny Llamas of golden_llama: logits, gradients, ten losses."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bitsandbytes import functional as bnb
from golden_common import GOLDEN_DIR, generator, max_rel_diff, save_tensors
from golden_llama import (
    ALPHA,
    CASES,
    LR,
    NF4_CASE,
    RANK,
    TARGETS,
    Batch,
    Case,
    adamw_run,
    batch_tensors,
    build_batch,
    build_model,
    dequantize,
    gradients,
    logits_of,
    loss_of,
    precision_report,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

DORA_FOLDER = "peft_adapter_dora"


def saved_name(parameter_name: str) -> str:
    """Return the name under which PEFT saves a parameter: without the adapter's name, a magnitude without `weight`."""
    return parameter_name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector").replace(
        ".default.", "."
    )


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable tensors of an adapter under their saved names, sorted."""
    found = {saved_name(name): p for name, p in model.named_parameters() if "lora_" in name}
    return dict(sorted(found.items()))


def wrap(base: LlamaForCausalLM, **options: Any) -> PeftModel:
    """Return the model with an adapter as PEFT starts it."""
    settings: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return get_peft_model(base, LoraConfig(**{**settings, **options})).eval()


def shake(model: PeftModel, offset: int) -> None:
    """Give every trainable tensor random values, so that each gets a real gradient: magnitudes near their start."""
    rng = generator(offset)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            noise = torch.randn(parameter.shape, generator=rng)
            if "magnitude" in name:
                parameter.mul_(1.0 + 0.2 * noise)
            else:
                parameter.copy_((0.1 if ".lora_B." in name else parameter.shape[1] ** -0.5) * noise)


def reference(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the trainable tensors, logits, loss, gradients and ten AdamW losses of an adapted model."""
    parameters = trained(model)
    tensors = {f"lora/{name}": p.detach().clone() for name, p in parameters.items()}
    tensors.update({f"logits/{i}": row for i, row in enumerate(logits_of(model, batch))})
    with torch.no_grad():
        tensors["loss"] = loss_of(model, batch).reshape(1)
    tensors.update({f"grad/{name}": g for name, g in gradients(model, batch, parameters).items()})
    tensors["losses_adamw"] = adamw_run(model, batch, parameters, LR, clip=False)["losses"]
    return tensors


def base_of(case: Case) -> LlamaForCausalLM:
    """Return the model of a case, after a look that it is still the one of its own golden file."""
    model = build_model(case)
    stored = load_file(GOLDEN_DIR / f"llama_{case.name}.safetensors")
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter, stored[f"model/{name}"]):
            raise ValueError(f"llama_{case.name}.safetensors holds another {name}; make it anew first")
    return model


def nf4_base() -> LlamaForCausalLM:
    """Return the NF4 case with its linears quantized plainly and dequantized."""
    model = base_of(NF4_CASE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                packed, state = bnb.quantize_4bit(parameter.detach(), blocksize=64, quant_type="nf4")
                parameter.copy_(dequantize(packed, state))
    return model


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors under a prefix."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def make_dora() -> None:
    """Write `dora.safetensors` and the PEFT folder of a DoRA adapter."""
    tensors: dict[str, torch.Tensor] = {}
    reports: dict[str, str] = {}
    bases = {"gqa": base_of(CASES["gqa"]), "bias": base_of(CASES["bias"]), "nf4": nf4_base()}
    for offset, (name, base) in enumerate(bases.items()):
        batch = build_batch(NF4_CASE if name == "nf4" else CASES[name])
        model = wrap(copy.deepcopy(base), use_dora=True)
        start = logits_of(model, batch)
        if max(max_rel_diff(row, want) for row, want in zip(start, logits_of(base, batch), strict=True)) > 1e-5:
            raise ValueError(f"{name}: DoRA does not start as the base")
        shake(model, 700 + offset)
        single = reference(model, batch)
        reports[f"f32_vs_f64_{name}"] = precision_report(single, reference(model.double(), batch))
        print(f"  {name}: losses {[round(x, 4) for x in single['losses_adamw'].tolist()]}, {reports}")
        tensors.update(prefixed(name, single))

    case = CASES["gqa"]
    batch = build_batch(case)
    path = GOLDEN_DIR / DORA_FOLDER
    shutil.rmtree(path, ignore_errors=True)
    model = wrap(build_model(case), use_dora=True, use_rslora=True, r=6, rank_pattern={"down_proj": 2})
    shake(model, 710)
    model.peft_config["default"].base_model_name_or_path = "llama_gqa"
    model.save_pretrained(str(path))
    (path / "README.md").unlink(missing_ok=True)
    config_path = path / "adapter_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])  # a set in PEFT: its order is random
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    loaded = PeftModel.from_pretrained(build_model(case), str(path)).eval()
    for i, row in enumerate(logits_of(loaded, batch)):
        if max_rel_diff(row, logits_of(model, batch)[i]) > 0.0:
            raise ValueError("the DoRA adapter does not load as it was saved")
        tensors[f"{DORA_FOLDER}/logits/{i}"] = row
    save_tensors(GOLDEN_DIR / "dora.safetensors", tensors, reports)


def make_pissa() -> None:
    """Write `pissa.safetensors`: PiSSA as it starts, after ten steps, and converted by PEFT to a plain adapter."""
    case = CASES["gqa"]
    batch = build_batch(case)
    base = base_of(case)
    model = wrap(copy.deepcopy(base), init_lora_weights="pissa")
    tensors = prefixed("start", reference(model, batch))
    with TemporaryDirectory() as temporary:
        first, converted = Path(temporary) / "first", Path(temporary) / "converted"
        model.save_pretrained(str(first))
        optimizer = torch.optim.AdamW(list(trained(model).values()), lr=LR)
        for _ in range(10):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        tensors.update({f"trained/lora/{name}": p.detach().clone() for name, p in trained(model).items()})
        tensors.update({f"trained/logits/{i}": row for i, row in enumerate(logits_of(model, batch))})
        model.save_pretrained(str(converted), path_initial_model_for_weight_conversion=str(first))
        plain = PeftModel.from_pretrained(copy.deepcopy(base), str(converted)).eval()
        for i, row in enumerate(logits_of(plain, batch)):
            if max_rel_diff(row, tensors[f"trained/logits/{i}"]) > 1e-4:
                raise ValueError("the converted adapter is not the trained one")
    for name, parameter in base.named_parameters():
        if name.endswith("_proj.weight"):
            tensors[f"singular_values/{name}"] = torch.linalg.svdvals(parameter.detach().double())[: 2 * RANK].clone()
    save_tensors(GOLDEN_DIR / "pissa.safetensors", tensors, {"base": "llama_gqa.safetensors"})


def make_loftq() -> None:
    """Write `loftq.safetensors`: adapters that PEFT's decomposition makes of what NF4 loses, at a scale of 1."""
    batch = build_batch(NF4_CASE)
    plain, quantized = base_of(NF4_CASE), nf4_base()
    weights = dict(plain.named_parameters())
    model = wrap(copy.deepcopy(quantized), lora_alpha=RANK)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            module = name.removeprefix("base_model.model.").split(".lora_")[0]
            lost = weights[f"{module}.weight"] - dict(quantized.named_parameters())[f"{module}.weight"]
            halves = _low_rank_decomposition(lost, reduced_rank=RANK)
            parameter.copy_(halves["R"] if ".lora_A." in name else halves["L"])
    tensors = reference(model, batch)
    near = max(
        max_rel_diff(row, want) for row, want in zip(logits_of(model, batch), logits_of(plain, batch), strict=True)
    )
    far = max(
        max_rel_diff(row, want) for row, want in zip(logits_of(quantized, batch), logits_of(plain, batch), strict=True)
    )
    print(f"  logits from those of the plain weights: quantized {far:.3f}, with the adapter {near:.3f}")
    if near >= far:
        raise ValueError("the adapter brings the quantized model no nearer to the plain one")
    save_tensors(
        GOLDEN_DIR / "loftq.safetensors", {**batch_tensors(batch), **tensors}, {"base": "llama_nf4.safetensors"}
    )
