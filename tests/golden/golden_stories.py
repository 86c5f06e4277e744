"""A LoRA run of PyTorch + PEFT on a real small model: loss curve and held-out loss."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from golden_common import GOLDEN_DIR, save_tensors
from golden_llama import IGNORE, TARGETS, lora_parameters
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaForCausalLM, get_linear_schedule_with_warmup

SEED = 3407
RANK = 8
ALPHA = 16
BATCH = 8
EPOCHS = 2
LR = 2e-3
WARMUP = 5
MAX_NORM = 1.0
MAX_TOKENS = 256
TRAIN_ROWS = 256
EVAL_ROWS = 64
EOS = 2


def shared_data() -> Path:
    """Return the folder of test material, beside the repository or one level up (a worktree).

    Raises:
        FileNotFoundError: It is in neither place.
    """
    root = GOLDEN_DIR.parents[1]
    for candidate in (root / "../shared/data", root / "../../shared/data"):
        if candidate.is_dir():
            return candidate.resolve()
    raise FileNotFoundError(f"test material not found at {root}/../shared/data")


def token_rows(data: Path) -> list[list[int]]:
    """Return the token ids of the first rows of the instruction set, in file order."""
    tokenizer = Tokenizer.from_file(str(data / "models/stories260K-hf/tokenizer.json"))
    text = (data / "instruct/llamafactory_alpaca_en_demo.json").read_text(encoding="utf-8")
    rows = []
    for entry in json.loads(text)[: TRAIN_ROWS + EVAL_ROWS]:
        ids = tokenizer.encode(entry["instruction"] + "\n" + entry["output"]).ids
        rows.append([*ids, EOS][:MAX_TOKENS])
    return rows


def collate(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels, right-padded; under causal attention right padding changes no real token."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    labels = torch.tensor([[*row, *[IGNORE] * (longest - len(row))] for row in rows])
    return ids, labels


def loss_sum(model: nn.Module, rows: list[list[int]]) -> tuple[torch.Tensor, int]:
    """Return the sum of the token losses and the number of predicted tokens."""
    ids, labels = collate(rows)
    logits = model(input_ids=ids).logits[:, :-1]  # [batch, seq - 1, vocab]
    total = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total, int((labels[:, 1:] != IGNORE).sum())


def eval_loss(model: nn.Module, rows: list[list[int]]) -> float:
    """Return the mean loss over all predicted tokens of all rows."""
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(rows), BATCH):
            loss, tokens = loss_sum(model, rows[start : start + BATCH])
            total += loss.item()
            count += tokens
    return total / count


def fingerprint(prefix: str, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Return each row's length and the sum of `id * (position + 1)`.

    The rows themselves stay out of the repository; a test that has the test material makes them again as
    `token_rows` does and compares.
    """
    return {
        f"{prefix}_lengths": torch.tensor([len(row) for row in rows], dtype=torch.int64),
        f"{prefix}_sums": torch.tensor([sum(t * (i + 1) for i, t in enumerate(row)) for row in rows]),
    }


def make_stories() -> None:
    """Write `stories_lora.safetensors`."""
    data = shared_data()
    rows = token_rows(data)
    train, held_out = rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]
    base = LlamaForCausalLM.from_pretrained(
        str(data / "models/stories260K-hf"), dtype=torch.float32, attn_implementation="eager"
    )
    torch.manual_seed(SEED)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, bias="none", task_type="CAUSAL_LM"
    )
    model: PeftModel = get_peft_model(base, config)
    model.train()
    parameters = lora_parameters(model)
    tensors = {f"lora/{name}": p.detach().clone() for name, p in parameters.items() if ".lora_A." in name}
    before = eval_loss(model, held_out)

    optimizer = torch.optim.AdamW(list(parameters.values()), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    steps_per_epoch = -(-len(train) // BATCH)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, EPOCHS * steps_per_epoch)
    losses, norms, lrs = [], [], []
    for epoch in range(EPOCHS):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SEED + epoch)).tolist()
        for start in range(0, len(train), BATCH):
            optimizer.zero_grad()
            total, count = loss_sum(model, [train[i] for i in order[start : start + BATCH]])
            loss = total / count
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(list(parameters.values()), MAX_NORM)))
            lrs.append(schedule.get_last_lr()[0])
            losses.append(loss.item())
            optimizer.step()
            schedule.step()
    after = eval_loss(model, held_out)
    print(f"  held-out loss {before:.4f} -> {after:.4f}; train {losses[0]:.4f} -> {losses[-1]:.4f}")

    tensors.update(fingerprint("train", train))
    tensors.update(fingerprint("eval", held_out))
    tensors["train_losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors["grad_norms"] = torch.tensor(norms, dtype=torch.float64)
    tensors["lrs"] = torch.tensor(lrs, dtype=torch.float64)
    tensors["eval_loss"] = torch.tensor([before, after], dtype=torch.float64)
    settings = {
        "r": RANK,
        "alpha": ALPHA,
        "dropout": 0.0,
        "targets": TARGETS,
        "batch": BATCH,
        "accumulation": 1,
        "epochs": EPOCHS,
        "lr": LR,
        "schedule": "linear",
        "warmup": WARMUP,
        "weight_decay": 0.0,
        "max_grad_norm": MAX_NORM,
        "seed": SEED,
        "rows": f"text = instruction + newline + output of the first {TRAIN_ROWS} (train) and next {EVAL_ROWS} "
        f"(held out) rows of llamafactory_alpaca_en_demo.json; ids = the tokenizer's with BOS, then {EOS}, "
        f"cut to {MAX_TOKENS}",
        "order": "epoch e: torch.randperm(n) of a generator seeded with seed + e; labels = ids",
    }
    save_tensors(
        GOLDEN_DIR / "stories_lora.safetensors", tensors, {"settings": json.dumps(settings), "base": "stories260K-hf"}
    )
