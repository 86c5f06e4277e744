"""Preparing 50,000 rows (template, tokens, mask): rustune against `datasets.map` with transformers' tokenizer.

    python benches/data.py [--rows 50000] [--tokenizer FOLDER] [--alpaca FILE.json]

Prints one table; the peer's lines are there if datasets and transformers are installed. Every line is measured in a
process of its own: seconds from rows in memory to ids and labels, and the highest memory above that of the loaded rows.
The peer trains one token more a row: its loop takes the line break after an answer's end of turn for the answer's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
IGNORE = -100
QUESTION, ANSWER = "<|im_start|>user\n", "<|im_start|>assistant\n"
# Plain ChatML without marks, as transformers and rustune both take it; answers are found by their markers.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PEERS = {"rustune": 0, "datasets.map, num_proc=None": 0, "datasets.map, num_proc=2": 2}


def make_rows(n_rows: int, alpaca: str | None) -> list[list[dict[str, str]]]:
    """Returns conversations of the lengths alpaca rows have, none of them twice."""
    if alpaca:
        entries = json.loads(Path(alpaca).read_text(encoding="utf-8"))
        pairs = [(f"{e['instruction']}\n\n{e['input']}".strip(), e["output"]) for e in entries]
    else:
        draw = random.Random(3407)
        words = ["".join(draw.choices("etaoinshrdlucmfwyp", k=draw.randint(2, 9))) for _ in range(4000)]

        def text(median: float) -> str:
            return " ".join(draw.choices(words, k=max(1, int(draw.lognormvariate(median, 0.8)))))

        pairs = [(text(2.5), text(3.9)) for _ in range(1000)]
    rows = []
    for i in range(n_rows):
        question, answer = pairs[i % len(pairs)]
        rows.append([{"role": "user", "content": f"{question} ({i})"}, {"role": "assistant", "content": answer}])
    return rows


def make_dataset(rows: list[list[dict[str, str]]]) -> Any:
    """Returns a `datasets.Dataset`, or the rows themselves without that library."""
    if find_spec("datasets") is None:
        return [{"messages": row} for row in rows]
    import datasets

    return datasets.Dataset.from_dict({"messages": rows})


def prepare_ours(dataset: Any, folder: str, _: int) -> tuple[int, int]:
    """Prepares the rows as `SFTTrainer` and `train_on_responses_only` do; returns rows and trained tokens."""
    from rustune import Tokenizer, _native
    from rustune.data import iter_columns

    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    options = json.dumps({"max_length": 2048})
    rows = _native.Rows.read(tokenizer.native, options, iter_columns(dataset))
    rows, *_rest = rows.train_on_responses_only(tokenizer.native, QUESTION, ANSWER)
    return len(rows), rows.n_trained


def prepare_theirs(dataset: Any, folder: str, num_proc: int) -> tuple[int, int]:
    """Prepares the rows as notebooks do: three maps, the last one a loop over ids; returns rows and trained tokens."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    question = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    answer = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]

    def render(batch: dict[str, Any]) -> dict[str, Any]:
        return {"text": [tokenizer.apply_chat_template(talk, tokenize=False) for talk in batch["messages"]]}

    def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
        return dict(tokenizer(batch["text"], add_special_tokens=False, truncation=True, max_length=2048))

    def mask(batch: dict[str, Any]) -> dict[str, Any]:
        all_labels = []
        for ids in batch["input_ids"]:
            labels = [IGNORE] * len(ids)
            at = 0
            while at < len(ids):
                if ids[at] == answer[0] and ids[at : at + len(answer)] == answer:
                    at += len(answer)
                    while at < len(ids) and not (ids[at] == question[0] and ids[at : at + len(question)] == question):
                        labels[at] = ids[at]
                        at += 1
                else:
                    at += 1
            all_labels.append(labels)
        return {"labels": all_labels}

    options: dict[str, Any] = {"batched": True, "num_proc": num_proc or None}
    dataset = dataset.map(render, **options).map(tokenize, remove_columns=["messages", "text"], **options)
    dataset = dataset.map(mask, **options)
    trained = sum(label != IGNORE for batch in dataset.iter(1000) for row in batch["labels"] for label in row)
    return len(dataset), trained


def memory() -> int:
    """Returns the bytes this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(which: str, options: argparse.Namespace) -> dict[str, float]:
    """Prepares the rows once, in this process."""
    dataset = make_dataset(make_rows(options.rows, options.alpaca))
    prepare = prepare_ours if which == "rustune" else prepare_theirs
    # Imports, files and thread pools are not what is compared.
    prepare(make_dataset(make_rows(64, options.alpaca)), options.tokenizer, 0)
    before = memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    used = sum(os.times()[:4])
    started = time.perf_counter()
    rows, trained = prepare(dataset, options.tokenizer, PEERS[which])
    seconds = time.perf_counter() - started
    used = sum(os.times()[:4]) - used
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    above = int(peak.split()[1]) * 1024 - before
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 if PEERS[which] else 0
    return {"seconds": seconds, "cpu": used, "rows": rows, "trained": trained, "above": above, "children": children}


def main() -> None:
    """Measures each in a process of its own and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--tokenizer", default=None, help="a folder with tokenizer.json and ChatML's tokens")
    parser.add_argument("--alpaca", default=None, help="a JSON list of instruction, input, output")
    parser.add_argument("--only", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    file = SHARED / "instruct" / "llamafactory_alpaca_en_demo.json"
    options.alpaca = options.alpaca or (str(file) if file.is_file() else None)
    if options.tokenizer is None:
        options.tokenizer = write_tokenizer()
    if options.only:
        print(json.dumps(measure(options.only, options)))
        return
    there = find_spec("datasets") is not None and find_spec("transformers") is not None
    print(f"{options.rows:,} rows of {options.alpaca or 'made-up words'}, {os.cpu_count()} processors")
    print(f"{'':30}{'seconds':>9}{'of CPU':>9}{'rows/s':>10}{'trained tokens':>16}{'MB above rows':>15}{'':>8}")
    ours = 0.0
    for which in PEERS if there else ["rustune"]:
        command = [sys.executable, __file__, "--rows", str(options.rows), "--tokenizer", options.tokenizer]
        command += ["--only", which, *(["--alpaca", options.alpaca] if options.alpaca else [])]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        got = json.loads(out.splitlines()[-1])
        ours = ours or got["seconds"]
        rate, above = got["rows"] / got["seconds"], got["above"] / 1e6
        ratio = f"{got['seconds'] / ours:7.1f}x"
        print(
            f"{which:30}{got['seconds']:9.2f}{got['cpu']:9.2f}{rate:10,.0f}{got['trained']:16,}{above:15.0f}{ratio:>8}"
        )
    if not there:
        print("datasets and transformers are not installed: nothing to compare with")


def write_tokenizer() -> str:
    """Writes GPT-2's vocabulary (or a byte vocabulary without it) with ChatML's tokens; returns the folder."""
    import tempfile

    from rustune import Tokenizer

    folder = Path(tempfile.mkdtemp(prefix="rustune-bench-"))
    source = SHARED / "tokenizers" / "gpt2"
    if not source.is_dir():
        source = ROOT / "tests" / "golden" / "masks_tokenizer"
    tokenizer = Tokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
