"""Loading a bf16 Llama-3.2-1B shape and quantizing it to NF4, against transformers + bitsandbytes.

    python benches/load.py [--smoke] [--peer-python PYTHON]

Prints one table: seconds, gigabytes of the file a second, and peak resident memory beside the model's own bytes, for
quantizing while loading and for opening a folder in bitsandbytes' layout. Each measurement is a process of its own; the
file has been read before, so all find it in the page cache. The peer runs when PYTHON has torch, transformers and
bitsandbytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import bench_model
import numpy as np

from rustune import nf4

# Run in a process of its own, with the folder as its argument.
OURS = """
import json, sys, time, warnings
from rustune import FastLanguageModel
warnings.simplefilter("ignore")
peak = lambda: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
started = time.perf_counter()
model, _ = FastLanguageModel.from_pretrained(sys.argv[1], load_in_4bit=True)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "peak": peak(), "model": model.native.nbytes}))
"""


def quantized(source: Path, shape: dict[str, int]) -> Path:
    """The folder in bitsandbytes' layout, made once: weights in 4 bits and their scales in f32."""
    folder = source.with_name(source.name + "-bnb-4bit")
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(exist_ok=True)
    shutil.copy(source / "config.json", folder)
    data = np.memmap(source / "model.safetensors", np.uint8, "r")
    data = data[8 + int.from_bytes(data[:8].tobytes(), "little") :]
    code_book = np.array(nf4.quantize(np.linspace(-1, 1, 64, dtype=np.float32)).dequantize())
    code_book = np.unique(code_book)
    made: list[tuple[str, str, list[int], bytes]] = []
    at = 0
    for name, dims in bench_model.tensors(shape).items():
        n = int(np.prod(dims))
        values = data[at : at + 2 * n].view(np.uint16).reshape(dims)
        at += 2 * n
        if not name.endswith("_proj.weight"):
            made.append((name, "BF16", list(dims), values.tobytes()))
            continue
        tensor = nf4.quantize(values, dtype="bfloat16")
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(dims)}
        text = json.dumps(state).encode()
        made.append((name, "U8", [n // 2, 1], tensor.packed.tobytes()))
        made.append((name + ".absmax", "F32", [n // 64], tensor.absmax.tobytes()))
        made.append((name + ".quant_map", "F32", [16], code_book.astype(np.float32).tobytes()))
        made.append((name + ".quant_state.bitsandbytes__nf4", "U8", [len(text)], text))
    header: dict[str, object] = {}
    offset = 0
    for name, dtype, dims, content in made:
        header[name] = {"dtype": dtype, "shape": dims, "data_offsets": [offset, offset + len(content)]}
        offset += len(content)
    text = json.dumps(header).encode()
    with (folder / "model.part").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for *_, content in made:
            file.write(content)
    (folder / "model.part").rename(folder / "model.safetensors")
    return folder


def run(command: list[str]) -> dict[str, float]:
    """The JSON that a command prints last."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--peer-python", help="an interpreter with torch, transformers and bitsandbytes")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bench-decode")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    shape = bench_model.SHAPES["smoke" if args.smoke else "llama-3.2-1b"]
    source = bench_model.make(args.folder, shape)
    ready = quantized(source, shape)

    def measure(what: str, folder: Path, command: list[str], repeat: int) -> float:
        runs = [run([*command, str(folder)]) for _ in range(repeat)]
        fastest = min(runs, key=lambda measured: measured["seconds"])
        seconds, peak, model = (fastest[key] for key in ("seconds", "peak", "model"))
        size = (folder / "model.safetensors").stat().st_size
        print(
            f"{what:38}{seconds:8.2f}{size / seconds / 1e9:8.2f}{model / 2**20:10.0f}{peak / 2**20:10.0f}"
            f"{(peak - model) / 2**20:12.0f}"
        )
        return seconds

    print(f"{'':38}{'s':>8}{'GB/s':>8}{'model MiB':>10}{'peak MiB':>10}{'peak - model':>12}")
    np.fromfile(source / "model.safetensors", np.uint8)
    ours = [sys.executable, "-c", OURS]
    loaded = measure("ours, bf16 -> NF4", source, ours, args.repeat)
    measure("ours, already NF4", ready, ours, args.repeat)
    if not args.peer_python:
        print("bitsandbytes: left out (give --peer-python)", file=sys.stderr)
        return
    script = str(Path(__file__).with_name("peer_load.py"))
    peer = measure("transformers + bitsandbytes", source, [args.peer_python, script], 1)
    print(f"  ours is {peer / loaded:.1f} times as fast")


if __name__ == "__main__":
    main()
