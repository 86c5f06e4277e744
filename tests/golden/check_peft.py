"""Check with transformers + PEFT that an adapter written by rustune gives the logits rustune computed.

    python tests/golden/check_peft.py MODEL_FOLDER ADAPTER_FOLDER LOGITS.{npz,safetensors} [--tolerance 1e-3]

The logits file holds `input_ids` [batch, seq], `logits` [batch, seq, vocab] and optionally `lengths` [batch]; without a
batch axis it is one row. Rows are computed one by one in float32. Exit status: 0 when the largest absolute difference
is within the tolerance, 1 when it is not (or not a number), 2 when the files do not fit together.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM


def read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of an npz or safetensors file.

    Args:
        path: The file; its suffix says which it is.

    Returns:
        Name to array.
    """
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    return dict(load_file(path))


def logits_rows(model: torch.nn.Module, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the logits `[len, vocab]` of each row of ids, computed alone.

    Args:
        model: A causal language model.
        rows: Ids, each `[len]`.

    Returns:
        One tensor per row.
    """
    with torch.no_grad():
        return [model(input_ids=row[None]).logits[0].float() for row in rows]


def main() -> int:
    """Compare, print, and return the exit status."""
    parser = argparse.ArgumentParser(description="Compare rustune's logits with those of transformers + PEFT.")
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("logits", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    options = parser.parse_args()

    arrays = read_arrays(options.logits)
    missing = {"input_ids", "logits"} - set(arrays)
    if missing:
        print(f"{options.logits}: lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(arrays))}")
        return 2
    ids = torch.from_numpy(np.atleast_2d(np.asarray(arrays["input_ids"])).astype(np.int64))  # [batch, seq]
    got = torch.from_numpy(np.asarray(arrays["logits"]).astype(np.float32))
    got = got[None] if got.dim() == 2 else got  # [batch, seq, vocab]
    if got.dim() != 3 or got.shape[:2] != ids.shape or got.numel() == 0:
        print(f"logits {list(got.shape)} do not fit input_ids {list(ids.shape)}")
        return 2
    lengths = np.asarray(arrays.get("lengths", np.full(len(ids), ids.shape[1]))).astype(int).reshape(-1).tolist()
    if len(lengths) != len(ids) or not all(0 < n <= ids.shape[1] for n in lengths):
        print(f"lengths {lengths} do not fit input_ids {list(ids.shape)}")
        return 2

    rows = [row[:n] for row, n in zip(ids, lengths, strict=True)]
    base = AutoModelForCausalLM.from_pretrained(str(options.model), dtype=torch.float32).eval()
    if got.shape[2] > base.config.vocab_size:
        # The adapter brings the rows of tokens that were added.
        base.resize_token_embeddings(got.shape[2])
    plain = logits_rows(base, rows)
    want = logits_rows(PeftModel.from_pretrained(base, str(options.adapter)).eval(), rows)
    if got.shape[2] != want[0].shape[1]:
        print(f"logits have {got.shape[2]} columns, the model's vocabulary has {want[0].shape[1]}")
        return 2
    worst = max(float((got[i, :n] - want[i]).abs().max()) for i, n in enumerate(lengths))
    effect = max(float((a - b).abs().max()) for a, b in zip(want, plain, strict=True))
    nan = not all(bool(torch.isfinite(got[i, :n]).all()) for i, n in enumerate(lengths))
    ok = not nan and worst <= options.tolerance
    print(f"adapter changes logits by up to {effect:.3e}")
    print(f"max |rustune - PEFT| = {worst:.3e} (tolerance {options.tolerance:.0e}): {'ok' if ok else 'DIFFERENT'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
