"""Decode and prefill speed on a Llama-3.2-1B shape, against the machine's read bandwidth and against llama.cpp.

    python benches/decode.py [--smoke] [--peer-python PYTHON]

Prints one table: tokens a second of one sequence and of a batch, bytes of weights that a token reads, what share of the
bandwidth bound that is, and prefill; as it is, with the head in 8 bits, and with activations in 8 bits too, as those of
llama.cpp are. The peer runs when PYTHON has `xllamacpp` and `gguf`; it decodes a Q4_0 GGUF of the same shape. All
weights are random; both use the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bench_model
import numpy as np

import rustune
from rustune import FastLanguageModel, _native


def best(repeat: int, run: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def ours(folder: Path, args: argparse.Namespace) -> list[tuple[str, float, float]]:
    """(what, tokens a second, bytes of weights that a step reads)."""
    vocab, hidden = args.shape["vocab"], args.shape["hidden"]
    model, _ = FastLanguageModel.from_pretrained(str(folder), 4096, dtype=args.dtype, load_in_4bit=True)
    rng = np.random.default_rng(0)

    def generate(n_prompt: int, n_new: int, batch: int = 1) -> Callable[[], object]:
        ids = rng.integers(2, vocab, (batch, n_prompt))
        # An id that random weights hardly prefer ends nothing.
        return lambda: model.generate(ids, max_new_tokens=n_new, do_sample=False, eos_token_id=[0])

    def decode(batch: int) -> float:
        prefill = best(args.repeat, generate(8, 1, batch))
        return args.new * batch / (best(args.repeat, generate(8, args.new + 1, batch)) - prefill)

    generate(8, 4)()
    weights = float(model.native.nbytes)
    table = 2.0 * vocab * hidden
    rows = [("decode, 1 sequence", decode(1), weights)]
    rows += [(f"decode, {batch} sequences", decode(batch), weights) for batch in (4, 8)]
    small = weights - table + vocab * hidden * (1 + 4 / 64)

    def prefill() -> float:
        return args.prompt / best(args.repeat, generate(args.prompt, 1))

    rows.append((f"prefill of {args.prompt}", prefill(), 0.0))
    model.for_inference(lm_head_bits=8)
    rows.append(("decode, 1 sequence, 8-bit head", decode(1), small))
    model.for_inference(lm_head_bits=8, activation_bits=8)
    rows.append(("decode, 1 sequence, all in 8 bits", decode(1), small))
    rows += [(f"decode, {batch} sequences, all in 8 bits", decode(batch), small) for batch in (4, 8)]
    rows.append((f"prefill of {args.prompt}, all in 8 bits", prefill(), 0.0))
    return rows


def peer(args: argparse.Namespace, table: str) -> dict[str, float]:
    """What peer_decode.py measures."""
    command = [args.peer_python, str(Path(__file__).with_name("peer_decode.py"))]
    command += ["--folder", str(args.folder), "--shape", json.dumps(args.shape), "--table", table]
    command += ["--threads", str(_native.num_threads()), "--prompt", str(args.prompt), "--new", str(args.new)]
    command += ["--repeat", str(args.repeat)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "int16"], help="of products; default: the fastest")
    parser.add_argument("--peer-python", help="an interpreter with xllamacpp and gguf")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bench-decode")
    parser.add_argument("--repeat", type=int, default=6, help="runs, of which the fastest counts; the peer's too")
    args = parser.parse_args()
    args.shape = bench_model.SHAPES["smoke" if args.smoke else "llama-3.2-1b"]
    args.prompt, args.new = (32, 4) if args.smoke else (512, 16)
    args.folder.mkdir(parents=True, exist_ok=True)

    folder = bench_model.make(args.folder, args.shape)
    # Before and after: other guests of the machine come and go.
    before = json.loads(_native.measure_peak("float32"))["read_bytes"]
    rows = ours(folder, args)
    bandwidth = max(before, json.loads(_native.measure_peak("float32"))["read_bytes"])
    print(f"rustune {rustune.__version__}, {_native.info()}")
    print(f"{'':38}{'tok/s':>9}{'MB/step':>9}{'of bound':>10}")
    print(f"{'memory read, GB/s':38}{bandwidth / 1e9:9.1f}")
    for what, speed, nbytes in rows:
        batch = int(what.split(", ")[1].split()[0]) if what.startswith("decode") else 1
        share = f"{speed / batch * nbytes / bandwidth:10.0%}" if nbytes else ""
        size = f"{nbytes / 1e6:9.0f}" if nbytes else ""
        print(f"{'ours, ' + what:38}{speed:9.1f}{size}{share}")
    if not args.peer_python:
        print("llama.cpp: left out (give --peer-python)", file=sys.stderr)
        return
    speeds = {what: speed for what, speed, _ in rows}
    for table in ("q6_k", "q4_0"):
        measured = peer(args, table)
        decode, prefill, nbytes = (measured[key] for key in ("decode_tok_per_s", "prefill_tok_per_s", "bytes"))
        name = f"llama.cpp Q4_0, table {table}"
        print(f"{name:38}{decode:9.1f}{nbytes / 1e6:9.0f}{decode * nbytes / bandwidth:10.0%}")
        print(f"{name + ', prefill':38}{prefill:9.1f}")
        for kind, theirs, ways in (
            ("decode, 1 sequence", decode, ("", ", 8-bit head", ", all in 8 bits")),
            (f"prefill of {args.prompt}", prefill, ("", ", all in 8 bits")),
        ):
            for way in ways:
                print(f"  ours / llama.cpp, {kind + way}: {speeds[kind + way] / theirs:.2f}")


if __name__ == "__main__":
    main()
