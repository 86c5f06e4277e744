"""Optimizer, schedule and shuffling vectors: bitsandbytes' 8-bit AdamW, transformers' schedules, torch.randperm."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from bitsandbytes import functional as bnb
from golden_common import GOLDEN_DIR, generator, save_json, save_tensors
from transformers import get_scheduler
from transformers.optimization import Adafactor

LARGE = 5000  # 19 blocks of 256 and a tail of 136; 8-bit state
SMALL = 1000  # under 4,096 elements: f32 state
BLOCK = 256
STEPS = 10
STORED_STEPS = (1, 2, 10)
STORED_GRADS = 4
LR = 1e-3
BETA1, BETA2 = 0.9, 0.999
EPS = 1e-8
WEIGHT_DECAY = 0.01

Quantizer = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class EightBit:
    """The 8-bit state of one tensor: codes and block maxima of both moments."""

    state1: torch.Tensor
    absmax1: torch.Tensor
    state2: torch.Tensor
    absmax2: torch.Tensor


def quantize_nearest(values: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize block-wise to the nearest code, a tie to the lower one: the rule of the default and CUDA backends."""
    blocks = -(-values.numel() // BLOCK)
    padded = torch.zeros(blocks * BLOCK)
    padded[: values.numel()] = values
    absmax = padded.view(blocks, BLOCK).abs().amax(dim=1)
    scaled = (padded.view(blocks, BLOCK) * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    index = torch.bucketize(scaled.reshape(-1), (code[:-1] + code[1:]) / 2, out_int32=True)
    return index[: values.numel()].to(torch.uint8), absmax


def quantize_cpu(values: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize with bitsandbytes' CPU kernel, which rounds to a table of 65,536 equal bins first."""
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(values, code, BLOCK)
    return codes, absmax


def dequantize(codes: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Return `code[codes] * absmax` of each block."""
    return code[codes.long()] * absmax.repeat_interleave(BLOCK)[: codes.numel()]


def adamw8bit_step(
    param: torch.Tensor, grad: torch.Tensor, state: EightBit, step: int, quantize: Quantizer
) -> tuple[torch.Tensor, EightBit]:
    """Take one step by the rule of bitsandbytes' CPU backend, spelled out; `step` counts from 1."""
    signed, unsigned = bnb.create_dynamic_map(signed=True), bnb.create_dynamic_map(signed=False)
    m = dequantize(state.state1, state.absmax1, signed).mul_(BETA1).add_(grad, alpha=1.0 - BETA1)
    v = dequantize(state.state2, state.absmax2, unsigned).mul_(BETA2).addcmul_(grad, grad, value=1.0 - BETA2)
    denominator = (v.sqrt() / math.sqrt(1.0 - BETA2**step)).add_(EPS)
    param = param * (1.0 - LR * WEIGHT_DECAY)
    param = param.addcdiv(m, denominator, value=-LR / (1.0 - BETA1**step))
    codes1, absmax1 = quantize(m, signed)
    codes2, absmax2 = quantize(v, unsigned)
    return param, EightBit(codes1, absmax1, codes2, absmax2)


def run_by_rule(
    param: torch.Tensor, grads: torch.Tensor, quantize: Quantizer
) -> dict[int, tuple[torch.Tensor, EightBit]]:
    """Return parameters and state after every stored step."""
    blocks = -(-param.numel() // BLOCK)
    zeros, none = torch.zeros(param.numel(), dtype=torch.uint8), torch.zeros(blocks)
    state = EightBit(zeros, none, zeros, none)
    found: dict[int, tuple[torch.Tensor, EightBit]] = {}
    for step in range(1, STEPS + 1):
        param, state = adamw8bit_step(param, grads[(step - 1) % STORED_GRADS], state, step, quantize)
        if step in STORED_STEPS:
            found[step] = (param, state)
    return found


def run_library(param: torch.Tensor, grads: torch.Tensor) -> dict[int, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Return parameters and state after every stored step of bitsandbytes' own AdamW8bit on the CPU."""
    weight = torch.nn.Parameter(param.clone())
    optimizer = bitsandbytes.optim.AdamW8bit(
        [weight], lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=WEIGHT_DECAY, min_8bit_size=4096
    )
    found: dict[int, tuple[torch.Tensor, dict[str, torch.Tensor]]] = {}
    for step in range(1, STEPS + 1):
        weight.grad = grads[(step - 1) % STORED_GRADS].clone()
        optimizer.step()
        if step in STORED_STEPS:
            state = {k: v.clone() for k, v in optimizer.state[weight].items() if isinstance(v, torch.Tensor)}
            found[step] = (weight.detach().clone(), state)
    return found


def make_adamw8bit() -> None:
    """Write `adamw8bit.safetensors`."""
    rng = generator(1000)
    large, small = 0.1 * torch.randn(LARGE, generator=rng), 0.1 * torch.randn(SMALL, generator=rng)
    # Gradients of very different size from block to block and element to element, as real ones have.
    scale = torch.logspace(-4, 0, LARGE)[torch.randperm(LARGE // 8, generator=rng).repeat_interleave(8)]
    grads_large = torch.randn(STORED_GRADS, LARGE, generator=rng) * scale
    grads_large[0, 3 * BLOCK : 4 * BLOCK] = 0.0  # a block whose absmax is 0 after the first step
    grads_small = 0.01 * torch.randn(STORED_GRADS, SMALL, generator=rng)

    library = run_library(large, grads_large)
    by_cpu_rule = run_by_rule(large, grads_large, quantize_cpu)
    by_nearest = run_by_rule(large, grads_large, quantize_nearest)
    small_run = run_library(small, grads_small)
    tensors = {"param8/0": large, "grads8": grads_large, "param32/0": small, "grads32": grads_small}
    tensors["map_signed"], tensors["map_unsigned"] = bnb.create_dynamic_map(signed=True), bnb.create_dynamic_map(False)
    distance: dict[str, float] = {}
    for step in STORED_STEPS:
        weight, state = library[step]
        rule_weight, rule_state = by_cpu_rule[step]
        if not torch.equal(weight, rule_weight) or not torch.equal(state["state1"], rule_state.state1):
            raise ValueError(f"step {step}: the spelled-out rule is not what bitsandbytes computes")
        param, codes = by_nearest[step]
        distance[str(step)] = float((param - weight).abs().max())
        tensors[f"param8/{step}"] = param
        tensors[f"state1/{step}"], tensors[f"absmax1/{step}"] = codes.state1, codes.absmax1
        tensors[f"state2/{step}"], tensors[f"absmax2/{step}"] = codes.state2, codes.absmax2
        param32, state32 = small_run[step]
        tensors[f"param32/{step}"] = param32
        tensors[f"exp_avg/{step}"], tensors[f"exp_avg_sq/{step}"] = state32["state1"], state32["state2"]
    print(f"  largest difference of a parameter between nearest and bitsandbytes' CPU table: {distance}")
    settings = {"lr": LR, "betas": [BETA1, BETA2], "eps": EPS, "weight_decay": WEIGHT_DECAY, "block": BLOCK}
    metadata = {
        "settings": json.dumps({**settings, "grad_of_step": f"row (step - 1) % {STORED_GRADS}, step from 1"}),
        "source": "8-bit: update rule of bitsandbytes' CPU backend (checked equal to AdamW8bit), state quantized to "
        "the nearest code as its default and CUDA backends do; f32: bitsandbytes AdamW8bit as it runs on the CPU",
        "max_param_diff_to_cpu_table": json.dumps(distance),
    }
    save_tensors(GOLDEN_DIR / "adamw8bit.safetensors", tensors, metadata)


def make_schedules() -> None:
    """Write `schedules.json`: the learning rate at every step of whole runs, counted from 0, and one past the end."""
    settings: list[tuple[str, dict[str, Any]]] = [
        ("linear", {}),
        ("cosine", {}),
        ("cosine", {"num_cycles": 1.5}),
        ("cosine_with_restarts", {}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("cosine_with_min_lr", {"min_lr": 2e-5}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.25, "num_cycles": 0.75}),
        ("polynomial", {}),
        ("polynomial", {"power": 2.5, "lr_end": 1e-5}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("inverse_sqrt", {}),
        ("inverse_sqrt", {"timescale": 50}),
        ("warmup_stable_decay", {"num_decay_steps": 4}),
        (
            "warmup_stable_decay",
            {
                "num_decay_steps": 5,
                "num_stable_steps": 2,
                "warmup_type": "cosine",
                "decay_type": "1-sqrt",
                "min_lr_ratio": 0.1,
            },
        ),
    ]
    peak = 2e-4
    cases = []
    for name, kwargs in settings:
        for warmup in (0, 3):
            for total in (10, 25):
                optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
                schedule = get_scheduler(
                    name, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=kwargs
                )
                rates = []
                for _ in range(total + 2):
                    rates.append(schedule.get_last_lr()[0])
                    optimizer.step()
                    schedule.step()
                case = {"name": name, "kwargs": kwargs, "warmup": warmup, "total": total, "lr": peak, "rates": rates}
                cases.append(case)
    save_json(GOLDEN_DIR / "schedules.json", {"cases": cases})


LIBRARY_SHAPE = (24, 40)
LIBRARY_LR = 1e-2


def optimizers(weight_decay: float) -> dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]]:
    """Return the makers of the optimizers beside AdamW, as transformers' Trainer sets them up."""
    lr, betas = LIBRARY_LR, (BETA1, BETA2)
    sgd, rmsprop = torch.optim.SGD, torch.optim.RMSprop
    rest: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    return {
        "adafactor": lambda p: Adafactor(p, scale_parameter=False, relative_step=False, **rest),
        "sgd": lambda p: sgd(p, **rest),
        "sgd_momentum": lambda p: sgd(p, momentum=0.9, dampening=0.25, **rest),
        "sgd_nesterov": lambda p: sgd(p, momentum=0.9, nesterov=True, **rest),
        "lion": lambda p: bitsandbytes.optim.Lion(p, betas=betas, optim_bits=32, **rest),
        "rmsprop": lambda p: rmsprop(p, **rest),
        "rmsprop_centered": lambda p: rmsprop(p, alpha=0.9, momentum=0.8, centered=True, **rest),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr_decay=0.1, **rest),
    }


def lion8bit_step(
    param: torch.Tensor, grad: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor], quantize: Quantizer
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Take one step by the rule of bitsandbytes' CPU backend, spelled out."""
    signed = bnb.create_dynamic_map(signed=True)
    m = dequantize(*state, signed)
    param = param * (1.0 - LR * WEIGHT_DECAY)
    param = param.add(torch.sign(m.mul(BETA1) + grad.mul(1.0 - BETA1)), alpha=-LR)
    return param, quantize(m.mul(BETA2).add(grad, alpha=1.0 - BETA2), signed)


def make_optimizers() -> None:
    """Write `optimizers.safetensors`: a matrix and a vector after ten steps of each optimizer beside AdamW."""
    rng = generator(1100)
    start = {"matrix": 0.1 * torch.randn(LIBRARY_SHAPE, generator=rng), "vector": 0.1 * torch.randn(40, generator=rng)}
    grads = {name: torch.randn(STORED_GRADS, *value.shape, generator=rng) for name, value in start.items()}
    tensors = {f"{name}/start": value for name, value in start.items()}
    tensors |= {f"{name}/grads": value for name, value in grads.items()}
    for optimizer_name, make in optimizers(WEIGHT_DECAY).items():
        weights = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
        optimizer = make(list(weights.values()))
        for step in range(STEPS):
            for name, weight in weights.items():
                weight.grad = grads[name][step % STORED_GRADS].clone()
            optimizer.step()
        tensors |= {f"{name}/{optimizer_name}": weight.detach() for name, weight in weights.items()}

    large = 0.1 * torch.randn(LARGE, generator=rng)
    large_grads = torch.randn(STORED_GRADS, LARGE, generator=rng)
    weight = torch.nn.Parameter(large.clone())
    library = bitsandbytes.optim.Lion(
        [weight], lr=LR, betas=(BETA1, BETA2), weight_decay=WEIGHT_DECAY, optim_bits=8, min_8bit_size=4096
    )
    zeros = (torch.zeros(LARGE, dtype=torch.uint8), torch.zeros(-(-LARGE // BLOCK)))
    by_table, by_nearest = (large, zeros), (large, zeros)
    for step in range(STEPS):
        grad = large_grads[step % STORED_GRADS]
        weight.grad = grad.clone()
        library.step()
        by_table = lion8bit_step(by_table[0], grad, by_table[1], quantize_cpu)
        by_nearest = lion8bit_step(by_nearest[0], grad, by_nearest[1], quantize_nearest)
    if not torch.equal(weight.detach(), by_table[0]):
        raise ValueError("the spelled-out rule is not what bitsandbytes computes")
    tensors |= {"large/start": large, "large/grads": large_grads, "large/lion_8bit": by_nearest[0]}
    tensors |= {"large/codes": by_nearest[1][0], "large/absmax": by_nearest[1][1]}
    settings = {"lr": LIBRARY_LR, "lr_of_large": LR, "betas": [BETA1, BETA2], "weight_decay": WEIGHT_DECAY}
    metadata = {"settings": json.dumps({**settings, "grad_of_step": f"row step % {STORED_GRADS}, step from 0"})}
    save_tensors(GOLDEN_DIR / "optimizers.safetensors", tensors, metadata)


def make_randperm() -> None:
    """Write `randperm.json`: whole small permutations, and the start of one of 100,000."""
    cases = []
    for seed in (0, 42, 3407, 3408, 2**31 + 5):
        for count in (1, 2, 5, 8, 100):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            cases.append({"seed": seed, "n": count, "order": order.tolist()})
    order = torch.randperm(100_000, generator=torch.Generator().manual_seed(3407))
    cases.append({"seed": 3407, "n": 100_000, "order": order[:8].tolist()})
    save_json(GOLDEN_DIR / "randperm.json", {"cases": cases})
