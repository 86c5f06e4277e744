"""Modules trained whole beside an adapter, and resized vocabularies, in transformers + PEFT."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from golden_common import GOLDEN_DIR, generator, max_rel_diff, save_tensors
from golden_llama import (
    CASES,
    LR,
    STEPS,
    WEIGHT_DECAY,
    Batch,
    Case,
    batch_tensors,
    build_batch,
    build_model,
    gradients,
    logits_of,
    lora_parameters,
    loss_of,
    precision_report,
    wrap_lora,
)
from peft import PeftModel
from torch import nn

TABLES = ("embed_tokens", "lm_head")
EMBEDDING_LR = 1e-3
RESIZED = 120


@dataclass(frozen=True)
class Variant:
    """What is trained whole over one of the tiny Llamas."""

    case: str
    modules: tuple[str, ...]
    tying: bool = False


VARIANTS = {
    "copies": Variant("gqa", TABLES),  # tied; PEFT trains two copies
    "one": Variant("gqa", TABLES, tying=True),
    "embedding": Variant("gqa", TABLES[:1]),
    "untied": Variant("head_dim", TABLES),
    "norms": Variant("head_dim", ("norm",)),
}

# Adapter folders over case gqa: settings of the adapter, and the size of the vocabulary.
FOLDERS: dict[str, tuple[dict[str, Any], int]] = {
    "peft_vocab": ({"modules_to_save": list(TABLES)}, RESIZED),
    "peft_vocab_tied": ({"modules_to_save": list(TABLES), "ensure_weight_tying": True}, 112),
    "peft_vocab_frozen": ({}, RESIZED),
}


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the tensors that are trained whole, under their saved names, sorted."""
    inside = ".modules_to_save.default"
    found = {name.replace(inside, ""): p for name, p in model.named_parameters() if inside in name}
    return dict(sorted(found.items()))


def moved(model: PeftModel, offset: int) -> PeftModel:
    """Move what is trained whole a little away from its base, so that an unused copy would be noticed."""
    rng = generator(offset + 3)
    with torch.no_grad():
        for parameter in whole_parameters(model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    return model


def two_rates(model: PeftModel, batch: Batch) -> torch.Tensor:
    """Return ten AdamW losses, each before its update, with a learning rate of its own for embedding table and head."""
    tables = {id(p): p for name, p in whole_parameters(model).items() if "norm" not in name}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in tables]
    groups = [{"params": rest, "lr": LR}, {"params": list(tables.values()), "lr": EMBEDDING_LR}]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=WEIGHT_DECAY)
    losses: list[float] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return torch.tensor(losses, dtype=torch.float64)


def reference(model: PeftModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Return logits, loss, every gradient and the losses of a run."""
    tensors = {f"logits/{i}": row for i, row in enumerate(logits_of(model, batch))}
    with torch.no_grad():
        tensors["loss"] = loss_of(model, batch).reshape(1)
    trained = {**lora_parameters(model), **whole_parameters(model)}
    if len(trained) != sum(p.requires_grad for p in model.parameters()):
        raise ValueError("something else is trained than is known here")
    tensors.update({f"grad/{name}": g for name, g in gradients(model, batch, trained).items()})
    tensors["losses"] = two_rates(model, batch)
    return tensors


def make_vocab() -> None:
    """Write `vocab.safetensors`; weights, rows and the adapter's start are those of the case's own file."""
    tensors: dict[str, torch.Tensor] = {}
    metadata = {"lr": str(LR), "embedding_lr": str(EMBEDDING_LR), "weight_decay": str(WEIGHT_DECAY)}
    for name, variant in VARIANTS.items():
        case = CASES[variant.case]
        batch = build_batch(case)
        options = {"modules_to_save": list(variant.modules), "ensure_weight_tying": variant.tying}
        model = moved(wrap_lora(build_model(case), case, **options), case.offset)
        tensors.update({f"{name}/saved/{key}": p.detach().clone() for key, p in whole_parameters(model).items()})
        double = copy.deepcopy(model).double()
        single = reference(model, batch)
        report = precision_report(single, reference(double, batch))
        print(f"  {name}: losses {[round(x, 4) for x in single['losses'].tolist()]}, f32 against f64: {report}")
        tensors.update({f"{name}/{key}": tensor for key, tensor in single.items()})
        metadata |= {f"case_{name}": variant.case, f"f32_vs_f64_{name}": report}
    save_tensors(GOLDEN_DIR / "vocab.safetensors", tensors, metadata)


def resized_base(case: Case, vocab: int) -> nn.Module:
    """Return the case's model with as many tokens; what transformers draws for new rows is drawn from a fixed seed."""
    torch.manual_seed(case.offset)
    model = build_model(case)
    model.resize_token_embeddings(vocab)
    return model


def make_peft_vocab() -> None:
    """Write adapter folders of PEFT that bring an embedding table and a head, and the logits they give."""
    case = CASES["gqa"]
    batch = build_batch(case)
    tensors = batch_tensors(batch)
    for folder, (options, vocab) in FOLDERS.items():
        path = GOLDEN_DIR / folder
        shutil.rmtree(path, ignore_errors=True)
        with tempfile.TemporaryDirectory() as base:
            # PEFT looks there whether the vocabulary was resized.
            build_model(case).save_pretrained(base)
            settings = {"target_modules": ["q_proj", "v_proj"], **copy.deepcopy(options)}
            model = moved(wrap_lora(resized_base(case, vocab), case, **settings), case.offset)
            model.peft_config["default"].base_model_name_or_path = base
            model.save_pretrained(str(path))
        (path / "README.md").unlink(missing_ok=True)
        config_path = path / "adapter_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config["target_modules"] = sorted(config["target_modules"])
        config["base_model_name_or_path"] = "llama_gqa"
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        loaded = PeftModel.from_pretrained(resized_base(case, vocab), str(path)).eval()
        for i, row in enumerate(logits_of(loaded, batch)):
            if max_rel_diff(row, logits_of(model, batch)[i]) > 0.0:
                raise ValueError(f"{folder}: the adapter does not load as it was saved")
            tensors[f"{folder}/logits/{i}"] = row
    save_tensors(GOLDEN_DIR / "peft_vocab_logits.safetensors", tensors, {"base": "llama_gqa.safetensors"})
