"""Random tiny Llamas in transformers + PEFT: logits, losses, gradients and optimizer runs, also over an NF4 base."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes import functional as bnb
from golden_common import GOLDEN_DIR, generator, max_rel_diff, save_tensors
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 4
ALPHA = 8
STEPS = 10
LR = 1e-2
FULL_LR = 1e-3
WEIGHT_DECAY = 0.01
MAX_NORM = 0.5
WARMUP = 3
IGNORE = -100


@dataclass(frozen=True)
class Case:
    """One tiny Llama: what config.json says, and how long the two rows are."""

    name: str
    offset: int
    config: dict[str, Any]
    rope: dict[str, Any]
    rope_theta: float
    lengths: tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """Two rows of different length, right-padded in storage and never in computation."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, int]

    def rows(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return each row cut to its length, as `([1, len], [1, len])`."""
        return [(self.input_ids[i : i + 1, :n], self.labels[i : i + 1, :n]) for i, n in enumerate(self.lengths)]

    def trained(self) -> int:
        """Return the number of trained tokens: labels that are not ignored and have a predecessor."""
        return sum(int((labels[:, 1:] != IGNORE).sum()) for _, labels in self.rows())


CASES = {
    case.name: case
    for case in (
        Case(
            "gqa",
            100,
            {
                "hidden_size": 48,
                "intermediate_size": 80,
                "num_hidden_layers": 2,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "vocab_size": 112,
                "rms_norm_eps": 1e-5,
                "tie_word_embeddings": True,
            },
            {},
            10000.0,
            (48, 31),
        ),
        Case(
            "head_dim",
            200,
            {
                "hidden_size": 40,
                "intermediate_size": 100,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "vocab_size": 97,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": False,
            },
            {},
            500000.0,
            (37, 22),
        ),
        Case(
            "bias",
            300,
            {
                "hidden_size": 48,
                "intermediate_size": 72,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 12,
                "vocab_size": 128,
                "rms_norm_eps": 1e-5,
                "tie_word_embeddings": False,
                "attention_bias": True,
                "mlp_bias": True,
            },
            {},
            10000.0,
            (33, 17),
        ),
        Case(
            "rope_llama3",
            400,
            {
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "vocab_size": 150,
                "rms_norm_eps": 1e-5,
                "tie_word_embeddings": True,
            },
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            10000.0,
            (48, 30),
        ),
        Case(
            "rope_linear",
            500,
            {
                "hidden_size": 36,
                "intermediate_size": 56,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "num_key_value_heads": 1,
                "head_dim": 12,
                "vocab_size": 101,
                "rms_norm_eps": 1e-5,
                "tie_word_embeddings": True,
            },
            {"rope_type": "linear", "factor": 2.0},
            10000.0,
            (48, 25),
        ),
    )
}

# Rows of 96 and 172 are no multiples of 64, so blocks run across rows; 96 x 172 has 258 blocks, so the double
# quantization of the MLP has two groups of absmax.
NF4_CASE = Case(
    "nf4",
    600,
    {
        "hidden_size": 96,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    {},
    10000.0,
    (32, 19),
)


def hf_config(case: Case) -> LlamaConfig:
    """Return the transformers config of a case."""
    return LlamaConfig(
        **case.config,
        rope_parameters={"rope_theta": case.rope_theta, **(case.rope or {"rope_type": "default"})},
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
        attn_implementation="eager",
        dtype="float32",
    )


def config_jsons(case: Case) -> dict[str, str]:
    """Return config.json as transformers 5 writes it and in the older spelling, as metadata entries."""
    common = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
        **case.config,
    }
    new = {
        **common,
        "dtype": "float32",
        "rope_parameters": {"rope_theta": case.rope_theta, **(case.rope or {"rope_type": "default"})},
    }
    legacy = {**common, "torch_dtype": "float32", "rope_theta": case.rope_theta, "rope_scaling": case.rope or None}
    for spelling in (new, legacy):
        # Both spellings must mean the same to transformers, or one of them would be a wrong golden.
        kwargs = {k: v for k, v in copy.deepcopy(spelling).items() if k not in ("architectures", "model_type")}
        want = hf_config(case).rope_parameters
        got = LlamaConfig(**kwargs).rope_parameters
        if {k: got[k] for k in want} != want:
            raise ValueError(f"{case.name}: transformers reads rope settings {got} instead of {want}")
    return {"config": json.dumps(new), "config_legacy": json.dumps(legacy)}


def build_model(case: Case) -> LlamaForCausalLM:
    """Return a random model: large enough weights that the logits are not flat, norms and biases not trivial."""
    model = LlamaForCausalLM(hf_config(case)).eval()
    rng = generator(case.offset)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=rng)
            if "norm" in name:
                parameter.copy_(1.0 + 0.1 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(0.15 * noise)
    return model


def build_batch(case: Case) -> Batch:
    """Return two random rows; a prompt and a few tokens in the middle are not trained."""
    rng = generator(case.offset + 1)
    longest = max(case.lengths)
    ids = torch.randint(3, case.config["vocab_size"], (2, longest), generator=rng)
    labels = ids.clone()
    for row, length in enumerate(case.lengths):
        labels[row, : length // (3 + row)] = IGNORE
        labels[row, length // 2 : length // 2 + 3] = IGNORE
        ids[row, length:] = 0
        labels[row, length:] = IGNORE
    return Batch(ids, labels, case.lengths)


def lora_name(parameter_name: str) -> str:
    """Return the name under which PEFT saves a parameter (without the adapter's name)."""
    return parameter_name.replace(".default.", ".")


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable LoRA tensors under their saved names, sorted."""
    found = {lora_name(name): p for name, p in model.named_parameters() if "lora_" in name}
    return dict(sorted(found.items()))


def wrap_lora(base: LlamaForCausalLM, case: Case, **options: Any) -> PeftModel:
    """Return the model with a LoRA adapter whose A *and* B are random, so that both get a real gradient."""
    settings: dict[str, Any] = {
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "target_modules": TARGETS,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    model = get_peft_model(base, LoraConfig(**{**settings, **options}))
    rng = generator(case.offset + 2)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            noise = torch.randn(parameter.shape, generator=rng)
            scale = 0.1 if ".lora_B." in name else parameter.shape[1] ** -0.5
            parameter.copy_(scale * noise)
    model.eval()
    return model


def logits_of(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """Return each row's logits, `[len, vocab]`, computed alone and unpadded."""
    with torch.no_grad():
        return [model(input_ids=ids).logits[0].clone() for ids, _ in batch.rows()]


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the sum of token losses over both rows divided by the number of trained tokens."""
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    for ids, labels in batch.rows():
        logits = model(input_ids=ids).logits[0, :-1]  # [len - 1, vocab]
        total = total + nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORE, reduction="sum")
    return total / batch.trained()


def gradients(model: nn.Module, batch: Batch, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return the gradient of the loss for each named parameter."""
    model.zero_grad()
    loss_of(model, batch).backward()
    found: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        if parameter.grad is None:
            raise ValueError(f"{name} got no gradient")
        found[name] = parameter.grad.clone()
    model.zero_grad()
    return found


def adamw_run(
    model: nn.Module, batch: Batch, parameters: dict[str, nn.Parameter], lr: float, clip: bool
) -> dict[str, torch.Tensor]:
    """Train on the same batch and put the parameters back afterwards.

    Args:
        model: The model, adapter included.
        batch: The batch of every step.
        parameters: What is trained.
        lr: Peak learning rate.
        clip: Whether to clip at `MAX_NORM` and follow the linear schedule with warm-up; else neither.

    Returns:
        `losses` [STEPS] before each update; with `clip` also `lrs` and `grad_norms` [STEPS].
    """
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=WEIGHT_DECAY
    )
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses: list[float] = []
    lrs: list[float] = []
    norms: list[float] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        losses.append(loss.item())
        loss.backward()
        if clip:
            norms.append(float(nn.utils.clip_grad_norm_(list(parameters.values()), MAX_NORM)))
            lrs.append(optimizer.param_groups[0]["lr"])
        else:
            optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(before[name])
    result = {"losses": torch.tensor(losses, dtype=torch.float64)}
    if clip:
        result["lrs"] = torch.tensor(lrs, dtype=torch.float64)
        result["grad_norms"] = torch.tensor(norms, dtype=torch.float64)
    return result


def base_reference(model: LlamaForCausalLM, batch: Batch) -> dict[str, torch.Tensor]:
    """Return logits and loss of the model without adapter."""
    tensors = {f"logits/{i}": row for i, row in enumerate(logits_of(model, batch))}
    with torch.no_grad():
        tensors["loss"] = loss_of(model, batch).reshape(1)
    return tensors


def lora_reference(model: PeftModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Return logits, loss, gradients and the two optimizer runs of the model with adapter."""
    parameters = lora_parameters(model)
    tensors = {f"lora_logits/{i}": row for i, row in enumerate(logits_of(model, batch))}
    with torch.no_grad():
        tensors["lora_loss"] = loss_of(model, batch).reshape(1)
    tensors.update({f"grad/{name}": g for name, g in gradients(model, batch, parameters).items()})
    tensors["losses_adamw"] = adamw_run(model, batch, parameters, LR, clip=False)["losses"]
    clipped = adamw_run(model, batch, parameters, LR, clip=True)
    tensors["losses_clip"] = clipped["losses"]
    tensors["lrs_clip"] = clipped["lrs"]
    tensors["grad_norms_clip"] = clipped["grad_norms"]
    return tensors


def full_reference(model: LlamaForCausalLM, batch: Batch) -> dict[str, torch.Tensor]:
    """Return every parameter's gradient and ten AdamW losses of full fine-tuning (decay on every tensor)."""
    parameters = dict(sorted(model.named_parameters()))
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    tensors = {f"fullgrad/{name}": g for name, g in gradients(model, batch, parameters).items()}
    tensors["losses_full"] = adamw_run(model, batch, parameters, FULL_LR, clip=False)["losses"]
    return tensors


def precision_report(single: dict[str, torch.Tensor], double: dict[str, torch.Tensor]) -> str:
    """Return how far the f32 reference itself is from the same computation in f64, for choosing tolerances."""
    worst: dict[str, float] = {}
    for name, tensor in single.items():
        kind = name.split("/")[0]
        if kind.startswith("losses") or kind in ("loss", "lora_loss") or "logits" in kind:
            diff = float((tensor.double() - double[name].double()).abs().max())
        else:
            diff = max_rel_diff(tensor, double[name])
        worst[kind] = max(worst.get(kind, 0.0), diff)
    return json.dumps({kind: float(f"{value:.2e}") for kind, value in sorted(worst.items())})


def run_metadata() -> dict[str, str]:
    """Return the settings of the optimizer runs as metadata entries."""
    runs = {
        "lora": {"r": RANK, "alpha": ALPHA, "dropout": 0.0, "targets": TARGETS},
        "losses_adamw": {"lr": LR, "schedule": "constant", "clip": None},
        "losses_clip": {"lr": LR, "schedule": "linear", "warmup": WARMUP, "total": STEPS, "clip": MAX_NORM},
        "losses_full": {"lr": FULL_LR, "schedule": "constant", "clip": None},
        "adamw": {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": WEIGHT_DECAY, "steps": STEPS},
    }
    return {"runs": json.dumps(runs)}


def batch_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """Return ids, labels, lengths as stored."""
    return {
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "lengths": torch.tensor(batch.lengths, dtype=torch.int64),
    }


def reference_of(model: LlamaForCausalLM, case: Case, batch: Batch, full: bool) -> dict[str, torch.Tensor]:
    """Return all reference values of a model in its own dtype; leaves the model as it was."""
    dtype = next(model.parameters()).dtype
    tensors = base_reference(model, batch)
    if full:
        tensors.update(full_reference(copy.deepcopy(model), batch))
    adapted = wrap_lora(copy.deepcopy(model), case).to(dtype)
    tensors.update(lora_reference(adapted, batch))
    return tensors


def make_llama(name: str) -> None:
    """Write `llama_<name>.safetensors`."""
    case = CASES[name]
    batch = build_batch(case)
    model = build_model(case)
    full = name == "gqa"
    tensors = batch_tensors(batch)
    tensors.update({f"model/{key}": p.detach().clone() for key, p in model.named_parameters()})
    adapted = wrap_lora(copy.deepcopy(model), case)
    tensors.update({f"lora/{key}": p.detach().clone() for key, p in lora_parameters(adapted).items()})
    reference = reference_of(model, case, batch, full)
    report = precision_report(reference, reference_of(copy.deepcopy(model).double(), case, batch, full))
    print(f"  {name}: losses {[round(x, 4) for x in reference['losses_adamw'].tolist()]}, f32 against f64: {report}")
    metadata = {"case": name, "f32_vs_f64": report, **config_jsons(case), **run_metadata()}
    save_tensors(GOLDEN_DIR / f"llama_{name}.safetensors", {**tensors, **reference}, metadata)


def dequantize(packed: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """Dequantize the plain way.

    bitsandbytes 0.50's AVX-512 kernel is wrong for rows that are no multiple of 64, so this spells out the format:
    high nibble first, 64 consecutive values of the row-major tensor share an absmax.
    """
    absmax = state.absmax
    if state.nested:
        absmax = state.state2.code[state.absmax.long()] * state.state2.absmax.repeat_interleave(256)[: absmax.numel()]
        absmax = absmax + state.offset
    flat = packed.reshape(-1).long()
    index = torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)
    count = state.shape.numel()
    values = state.code[index][:count] * absmax.repeat_interleave(state.blocksize)[:count]
    # The same through bitsandbytes, as one long row, where its kernel is right.
    flat_state = copy.copy(state)
    flat_state.shape = torch.Size([1, count])
    if max_rel_diff(bnb.dequantize_4bit(packed, flat_state).reshape(-1), values) > 1e-6:
        raise ValueError("bitsandbytes dequantizes to something else than the documented format")
    return values.reshape(state.shape)


def make_llama_nf4() -> None:
    """Write `llama_nf4.safetensors`: one base quantized plainly and with double quantization."""
    case = NF4_CASE
    batch = build_batch(case)
    model = build_model(case)
    tensors = batch_tensors(batch)
    tensors.update({f"model/{key}": p.detach().clone() for key, p in model.named_parameters()})
    adapted = wrap_lora(copy.deepcopy(model), case)
    tensors.update({f"lora/{key}": p.detach().clone() for key, p in lora_parameters(adapted).items()})
    metadata = {"case": "nf4", **config_jsons(case), **run_metadata()}
    for variant, double_quant in (("plain", False), ("double", True)):
        quantized = copy.deepcopy(model)
        for name, parameter in quantized.named_parameters():
            if not name.endswith("_proj.weight"):
                continue
            packed, state = bnb.quantize_4bit(
                parameter.detach(), blocksize=64, compress_statistics=double_quant, quant_type="nf4"
            )
            stored = {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
            tensors[f"bnb/{name}"] = packed
            tensors.update({f"bnb_{variant}/{part}": tensor.clone() for part, tensor in stored.items()})
            with torch.no_grad():
                parameter.copy_(dequantize(packed, state))
        reference = reference_of(quantized, case, batch, full=False)
        report = precision_report(reference, reference_of(quantized.double(), case, batch, full=False))
        print(f"  {variant}: losses {[round(x, 4) for x in reference['losses_adamw'].tolist()]}, f32 to f64: {report}")
        metadata[f"f32_vs_f64_{variant}"] = report
        tensors.update({f"{variant}/{key}": tensor for key, tensor in reference.items()})
    save_tensors(GOLDEN_DIR / "llama_nf4.safetensors", tensors, metadata)


def make_peft() -> None:
    """Write the two PEFT adapter folders over case gqa, and the logits they give."""
    case = CASES["gqa"]
    batch = build_batch(case)
    tensors = batch_tensors(batch)
    variants: dict[str, dict[str, Any]] = {
        "peft_adapter": {
            "rank_pattern": {"layers.0.self_attn.q_proj": 8, "down_proj": 2},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 4, "layers.1.mlp.up_proj": 24},
        },
        "peft_adapter_rslora": {"use_rslora": True, "target_modules": ["q_proj", "v_proj", "gate_proj"], "r": 6},
    }
    for folder, options in variants.items():
        path = GOLDEN_DIR / folder
        shutil.rmtree(path, ignore_errors=True)
        model = wrap_lora(build_model(case), case, **options)
        model.peft_config["default"].base_model_name_or_path = "llama_gqa"
        model.save_pretrained(str(path))
        (path / "README.md").unlink(missing_ok=True)
        config_path = path / "adapter_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config["target_modules"] = sorted(config["target_modules"])  # a set in PEFT: its order is random
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        loaded = PeftModel.from_pretrained(build_model(case), str(path)).eval()
        plain = logits_of(build_model(case), batch)
        for i, row in enumerate(logits_of(loaded, batch)):
            if max_rel_diff(row, logits_of(model, batch)[i]) > 0.0 or max_rel_diff(row, plain[i]) < 1e-2:
                raise ValueError(f"{folder}: the adapter does not load as it was saved, or changes nothing")
            tensors[f"{folder}/logits/{i}"] = row
    save_tensors(GOLDEN_DIR / "peft_logits.safetensors", tensors, {"base": "llama_gqa.safetensors"})
