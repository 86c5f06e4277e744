"""Trains the shipped model from nothing, with our own engine, on text of the small world; writes it into the package.

`python scripts/train_shipped_model.py` reproduces python/rustune/quickstart/model; its options are for trying things.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rustune import FastLanguageModel, SFTConfig, SFTTrainer
from rustune.quickstart import tokenizer, world

ROOT = Path(__file__).resolve().parents[1]
SEED = 1
ROW = 128  # tokens
ROWS_PER_STEP = 8
STEPS = 3000

README = """# The shipped model

A Llama of {millions:.2f} million parameters, trained from nothing by rustune on {tokens:.1f} million tokens of text
about a made-up small world (`rustune/quickstart/world.py`). It knows 160 people, small sums and games with words, and
has never been asked a question: answering is what `rustune quickstart` teaches it. It is of no other use.

Made by `make model` (`scripts/train_shipped_model.py`): {steps} steps of {rows} rows of {row} tokens, AdamW, peak
learning rate {learning_rate}, final loss {loss:.3f}, {minutes:.0f} minutes. The text is our own, and so is the model:
Apache-2.0.
"""


def config(vocab: int) -> dict[str, Any]:
    """Returns the model's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def first_weights(settings: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Draws the weights training starts from: N(0, 0.02) for matrices, ones for norms."""
    random = np.random.RandomState(SEED)  # the one numpy generator whose numbers never change
    hidden, mlp, head = settings["hidden_size"], settings["intermediate_size"], settings["head_dim"]
    heads, kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]

    def matrix(out: int, into: int) -> NDArray[np.float32]:
        return random.normal(0.0, 0.02, (out, into)).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(settings["vocab_size"], hidden)}
    for layer in range(settings["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        weights |= {
            f"{name}.input_layernorm.weight": np.ones(hidden, np.float32),
            f"{name}.self_attn.q_proj.weight": matrix(heads * head, hidden),
            f"{name}.self_attn.k_proj.weight": matrix(kv_heads * head, hidden),
            f"{name}.self_attn.v_proj.weight": matrix(kv_heads * head, hidden),
            f"{name}.self_attn.o_proj.weight": matrix(hidden, heads * head),
            f"{name}.post_attention_layernorm.weight": np.ones(hidden, np.float32),
            f"{name}.mlp.gate_proj.weight": matrix(mlp, hidden),
            f"{name}.mlp.up_proj.weight": matrix(mlp, hidden),
            f"{name}.mlp.down_proj.weight": matrix(hidden, mlp),
        }
    return weights | {"model.norm.weight": np.ones(hidden, np.float32)}


def write_safetensors(path: Path, tensors: dict[str, NDArray[np.float32]]) -> None:
    """Writes float32 arrays."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(a.tobytes() for a in tensors.values()))


def rows(ids: dict[str, int], count: int) -> list[dict[str, list[int]]]:
    """Returns rows of exactly ROW tokens, documents end to end, each from <|begin|> to <|end|>.

    They are laid out so that the trainer, which shuffles, meets them as they are told: the story begins with few
    people.
    """
    told = world.documents(world.make_world(), SEED)
    tokens: list[int] = []
    laid_out: list[dict[str, list[int]]] = [{} for _ in range(count)]
    for place in shuffled(count):
        while len(tokens) < ROW:
            tokens += [ids[tokenizer.BOS], *tokenizer.encode(next(told), ids), ids[tokenizer.EOS]]
        laid_out[place] = {"input_ids": tokens[:ROW], "labels": tokens[:ROW]}
        tokens = tokens[ROW:]
    return laid_out


def shuffled(count: int) -> list[int]:
    """Returns the order in which the trainer takes `count` rows: `torch.randperm` of a generator seeded with SEED."""
    draws = np.random.RandomState(SEED).randint(0, 2**32, size=count, dtype=np.uint32)
    order = list(range(count))
    for place in range(count - 1):
        other = place + int(draws[place]) % (count - place)
        order[place], order[other] = order[other], order[place]
    return order


def write_folder(folder: Path, tokens: list[str]) -> None:
    """Writes config and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "config.json": config(len(tokens)),
        "tokenizer.json": tokenizer.tokenizer_json(tokens),
        "tokenizer_config.json": tokenizer.tokenizer_config(),
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Trains and writes the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=ROOT / "python/rustune/quickstart/model")
    options = parser.parse_args()

    tokens = tokenizer.vocabulary()
    ids = {token: place for place, token in enumerate(tokens)}
    with tempfile.TemporaryDirectory() as scratch:
        start, done = Path(scratch, "start"), Path(scratch, "done")
        weights = first_weights(config(len(tokens)))
        write_folder(start, tokens)
        write_safetensors(start / "model.safetensors", weights)
        model, _ = FastLanguageModel.from_pretrained(
            str(start), max_seq_length=ROW, dtype="float32", load_in_4bit=False, full_finetuning=True
        )
        trainer = SFTTrainer(
            model=model,
            train_dataset=rows(ids, options.steps * ROWS_PER_STEP),
            args=SFTConfig(
                output_dir=str(Path(scratch, "checkpoints")),
                per_device_train_batch_size=ROWS_PER_STEP,
                gradient_accumulation_steps=1,
                max_steps=options.steps,
                learning_rate=options.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=100,
                weight_decay=0.05,
                adam_beta2=0.98,
                optim="adamw_torch",
                logging_steps=min(50, options.steps),
                save_strategy="no",
                seed=SEED,
            ),
        )
        started = time.monotonic()
        trainer.train()
        minutes = (time.monotonic() - started) / 60
        model.save_pretrained(str(done))
        write_folder(options.out, tokens)
        shutil.copyfile(done / "model.safetensors", options.out / "model.safetensors")  # in config.json's bfloat16
    shutil.copyfile(ROOT / "LICENSE", options.out / "LICENSE")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (options.out / "README.md").write_text(
        README.format(
            millions=sum(array.size for array in weights.values()) / 1e6,
            tokens=options.steps * ROWS_PER_STEP * ROW / 1e6,
            steps=options.steps,
            rows=ROWS_PER_STEP,
            row=ROW,
            learning_rate=options.learning_rate,
            loss=losses[-1],
            minutes=minutes,
        )
    )
    print(f"{options.out}: final loss {losses[-1]:.4f} after {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
