"""Times training steps of random Llamas, ours and the peers', against what the machine can do; `make bench-train`.

Each measurement runs in a process of its own, so that its peak memory is its own. Prints one table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_model import SHAPES, make, tensors

HERE = Path(__file__).resolve().parent
ALPACA = HERE.parents[1] / "shared/data/instruct/llamafactory_alpaca_en_demo.json"
GIB = 2.0**30
# What keeps torch's libraries to the instructions that `--isa` forces ours to.
PEER_ISA = {
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}


def main() -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b-4l")
    parser.add_argument("--mode", choices=["nf4", "bf16", "f32"], default="nf4")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--checkpointing", choices=["unsloth", "true", "false"], default="unsloth")
    parser.add_argument("--steps", type=int, default=3, help="timed steps after one that warms up; 0 times that")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "int16"], help="of products; default: the fastest")
    parser.add_argument("--isa", help="forces an instruction set")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--peer-python", help="an interpreter with torch, peft and bitsandbytes")
    parser.add_argument("--peer-mode", choices=["nf4", "bf16", "f32"], help="the peer's; --mode if not given")
    parser.add_argument("--rounds", type=int, default=1, help="ours and the peer in turn, so often; medians count")
    parser.add_argument("--real-lengths", action="store_true", help="rows as long as alpaca's against full ones")
    parser.add_argument("--packing", action="store_true", help="with --real-lengths: packed to --seq tokens")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_child(options)))
    elif options.real_lengths:
        _real_lengths(options)
    else:
        _compare(options)


def flops_per_token(name: str, *, recompute: bool) -> float:
    """Returns the useful floating-point operations of a training step, for each token.

    Two for each weight forward and two for the input's gradient, and two more for those of the layers where they run
    again (ours leaves out the last product of each layer and all of the last layer, and is credited with them like its
    peer). Adapters, attention scores and norms are not counted.

    Args:
        name: One of `SHAPES`.
        recompute: Whether layers run again in the backward.

    Returns:
        For Llama-3.2-1B 6.9e9 with recomputation and 4.9e9 without.
    """
    shape, sizes = SHAPES[name], tensors(SHAPES[name])
    layers = sum(dims[0] * dims[1] for tensor, dims in sizes.items() if ".layers." in tensor and len(dims) == 2)
    return 2.0 * ((3 if recompute else 2) * layers + 2 * shape["hidden"] * shape["vocab"])


def _folder(options: argparse.Namespace) -> Path:
    return make(Path(tempfile.gettempdir()) / "rustune-bench", SHAPES[options.shape])


def _compare(options: argparse.Namespace) -> None:
    """Ours beside the peers' and the machine's peak."""
    folder = _folder(options)
    rounds = [(_run_child(options, "full"), _peer(options, folder)) for _ in range(options.rounds)]
    ours, theirs = (_median([pair[side] for pair in rounds]) for side in (0, 1))
    n_tokens = options.batch * options.seq
    recomputed = ours["memory"]["estimate"]["layers"][2] > 0
    flops = flops_per_token(options.shape, recompute=recomputed) * n_tokens
    peak, kept = ours["peak"], ours["memory"]["estimate"]
    print(f"{options.shape} {options.mode}, {options.batch} x {options.seq} tokens, r = {options.rank}", end="")
    print(f", peer {options.peer_mode or options.mode}" if options.peer_python else "", end="")
    print(f", dropout {options.dropout:g}, checkpointing {options.checkpointing}, {options.optim}")
    print(f"{ours['threads']} threads, {ours['isa']}, products in {ours['dtype']}", end="")
    print(f"; layers kept, in part, recomputed: {kept['layers']}")
    print(f"peak of products from the nearest cache {peak['flops'] / 1e9:.0f} GFLOP/s", end="")
    print(f", memory read {peak['read_bytes'] / 1e9:.1f} GB/s")
    print(f"estimated peak memory {ours['memory']['peak'] / GIB:.2f} GiB")
    print()
    print(f"{'':>14} {'s/step':>9} {'tokens/s':>9} {'peak GiB':>9} {'load s':>7} {'GFLOP/s':>8} {'of peak':>8}")
    for name, made in (("rustune", ours), ("torch + peft", theirs)):
        if "missing" in made:
            print(f"{name:>14} peer not installed ({made['missing']})")
            continue
        step = made["step_s"]
        useful = flops / step / 1e9
        print(
            f"{name:>14} {step:9.3f} {n_tokens / step:9.1f} {made['peak_bytes'] / GIB:9.2f} {made['load_s']:7.1f}"
            f" {useful:8.1f} {100e9 * useful / peak['flops']:7.1f}%"
        )
    if "missing" not in theirs:
        faster, less = theirs["step_s"] / ours["step_s"], theirs["peak_bytes"] / ours["peak_bytes"]
        loads = theirs["load_s"] / ours["load_s"]
        print(f"{'ratio':>14} {faster:9.2f} {faster:9.2f} {less:9.2f} {loads:7.1f}")
        for number, (mine, other) in enumerate(rounds if len(rounds) > 1 else [], 1):
            pair = f"{other['step_s']:.2f} / {mine['step_s']:.2f} s = {other['step_s'] / mine['step_s']:.2f}"
            print(f"{'round ' + str(number):>14} {pair}")


def _median(made: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of several measurements, with the median step of all and the largest peak."""
    if "missing" in made[0]:
        return made[0]
    step = statistics.median(one["step_s"] for one in made)
    return {**made[0], "step_s": step, "peak_bytes": max(one["peak_bytes"] for one in made)}


def _real_lengths(options: argparse.Namespace) -> None:
    """Tokens a second over rows of alpaca's lengths against rows that are all of full length."""
    _folder(options)
    full, real = _run_child(options, "full"), _run_child(options, "real")
    print(f"{options.shape} {options.mode}, batches of {options.batch} rows of up to {options.seq} tokens")
    print(f"{'rows':>14} {'tokens/step':>12} {'s/step':>9} {'tokens/s':>9} {'peak GiB':>9}")
    for name, made in (("full length", full), ("alpaca", real)):
        print(
            f"{name:>14} {made['tokens'] / made['timed']:12.0f} {made['step_s']:9.3f}"
            f" {made['tokens'] / made['seconds']:9.1f} {made['peak_bytes'] / GIB:9.2f}"
        )
    ratio = (real["tokens"] / real["seconds"]) / (full["tokens"] / full["seconds"])
    print(f"trained tokens a second: {100 * ratio:.0f} % of full-length rows; lengths from {real['source']}")


def _run_child(options: argparse.Namespace, rows: str) -> dict[str, Any]:
    environment = dict(os.environ)
    if options.isa:
        environment["RUSTUNE_ISA"] = options.isa
    if options.threads:
        environment["RAYON_NUM_THREADS"] = str(options.threads)
    command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--child", rows]
    return _last_json(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _peer(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if not options.peer_python:
        return {"missing": "give --peer-python"}
    same = ("batch", "seq", "rank", "dropout", "checkpointing", "steps")
    arguments = [part for name in same for part in (f"--{name}", str(getattr(options, name)))]
    command = [options.peer_python, str(HERE / "peer_train.py"), str(folder), *arguments]
    command += ["--mode", options.peer_mode or options.mode]
    environment = {**os.environ, **PEER_ISA.get(options.isa or "", {})}
    return _last_json(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _last_json(output: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return made


def _child(options: argparse.Namespace) -> dict[str, Any]:
    """Trains in this process."""
    import rustune
    from rustune import FastLanguageModel, SFTConfig, SFTTrainer, TrainerCallback, _native

    folder = _folder(options)
    started = time.perf_counter()
    model, _ = FastLanguageModel.from_pretrained(
        str(folder),
        options.seq,
        dtype=options.dtype or ("float32" if options.mode == "f32" else None),
        load_in_4bit=options.mode == "nf4",
    )
    load_s = time.perf_counter() - started
    model = FastLanguageModel.get_peft_model(model, options.rank, lora_dropout=options.dropout)
    rows, source = _rows(options, model.vocab_size)
    times: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            times[-1] = time.perf_counter() - times[-1]
            tokens.append(state.num_input_tokens_seen)

    config = SFTConfig(
        max_steps=options.steps + 1,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=1,
        gradient_checkpointing="unsloth" if options.checkpointing == "unsloth" else options.checkpointing == "true",
        optim=options.optim,
        learning_rate=2e-4,
        packing=options.packing and options.child == "real",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model, config, train_dataset=rows, callbacks=[Clock()])
    assert trainer.train_dataset is not None
    memory = json.loads(
        model.native.training_memory(trainer.train_dataset.rows, trainer._engine_options(), trainer._checkpointing())
    )
    trainer.train()
    info = rustune.info()
    timed = times[1:] or times
    made = {
        "step_s": statistics.median(timed),
        "peak_bytes": info["peak_rss_bytes"],
        "load_s": load_s,
        "seconds": sum(timed),
        "tokens": tokens[-1] - (tokens[0] if options.steps else 0),
        "timed": len(timed),
        "memory": memory,
        "isa": info["isa"],
        "dtype": model.products,
        "threads": info["threads"],
        "source": source,
    }
    # The peak's buffers come last: they would count as the run's memory.
    return {**made, "peak": json.loads(_native.measure_peak(model.products))}


def _rows(options: argparse.Namespace, vocab: int) -> tuple[list[dict[str, list[int]]], str]:
    """Random ids, all of full length or as long as alpaca's rows."""
    draw = random.Random(0)
    count = options.batch * (options.steps + 1)
    lengths, source = [options.seq] * count, "--seq"
    if options.child == "real":
        # About four characters are a token of English; the 999 rows have a median of 124 tokens, and 1 in 100 over 512.
        if ALPACA.is_file():
            texts = json.loads(ALPACA.read_text(encoding="utf-8"))
            drawn = [sum(len(text) for text in row.values() if isinstance(text, str)) // 4 + 30 for row in texts]
            source = ALPACA.name
        else:
            drawn = [int(draw.lognormvariate(4.8, 0.7)) for _ in range(999)]
            source = "a log-normal with a median of 122 tokens"
        many = count * (8 if options.packing else 1)
        lengths = [min(max(draw.choice(drawn), 8), options.seq) for _ in range(many)]
    ids = [[draw.randrange(vocab) for _ in range(length)] for length in lengths]
    return [{"input_ids": row, "labels": row} for row in ids], source


if __name__ == "__main__":
    main()
