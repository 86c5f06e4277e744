"""What a run promises: the same bits for any number of threads, any split of a step, and after any kill."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import VOCAB, read_safetensors, write_model, write_safetensors

from rustune import FastLanguageModel, SFTConfig, SFTTrainer, num_threads, set_num_threads


def _rows(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Rows of 5 to 40 random tokens, all trained."""
    draw = np.random.default_rng(seed)
    made = [draw.integers(0, VOCAB, int(draw.integers(5, 40))).tolist() for _ in range(count)]
    return [{"input_ids": ids, "labels": list(ids)} for ids in made]


def _train(folder: Path, out: Path, **changes: Any) -> tuple[list[float], dict[str, NDArray[np.float32]]]:
    """Trains for a few steps with dropout; returns the losses and the adapter."""
    model, _ = FastLanguageModel.from_pretrained(str(folder), dtype="float32", load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, lora_dropout=0.1)
    settings = {
        "output_dir": str(out),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": 12,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }
    trainer = SFTTrainer(model=model, train_dataset=_rows(40, 0), args=SFTConfig(**settings))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, model.native.parameters()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def test_any_number_of_threads_gives_the_same_bits(folder: Path, tmp_path: Path) -> None:
    before = num_threads()
    runs = []
    try:
        for threads in (1, 2, 4):
            set_num_threads(threads)
            runs.append(_train(folder, tmp_path / "out"))
    finally:
        set_num_threads(before)
    for losses, adapter in runs[1:]:
        assert losses == runs[0][0]
        for name, values in adapter.items():
            np.testing.assert_array_equal(values, runs[0][1][name], err_msg=name)


def test_any_split_of_a_step_gives_the_same_curve(folder: Path, tmp_path: Path) -> None:
    curves = [
        _train(folder, tmp_path / "out", per_device_train_batch_size=batch, gradient_accumulation_steps=steps)[0]
        for batch, steps in ((8, 1), (4, 2), (2, 4))
    ]
    # 1e-5: float32 sums in another order; a lost token or another mask moves the loss by 1e-2.
    np.testing.assert_allclose(curves[1], curves[0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(curves[2], curves[0], atol=1e-5, rtol=0)
    assert curves[0][-1] < curves[0][0]


_CHILD = """
import sys, warnings
sys.path.insert(0, {tests!r})
warnings.simplefilter("ignore")
from test_promises import _train
from pathlib import Path
from rustune import FastLanguageModel, SFTConfig, SFTTrainer
from test_promises import _rows
model, _ = FastLanguageModel.from_pretrained({folder!r}, dtype="float32", load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, lora_dropout=0.1)
trainer = SFTTrainer(model=model, train_dataset=_rows(40, 0), args=SFTConfig(
    output_dir={out!r}, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps={steps},
    learning_rate=5e-3, save_steps=1, save_total_limit=3, optim={optim!r}, disable_tqdm=True))
print("begin", flush=True)
trainer.train(resume_from_checkpoint=True)
"""


def _checkpoint(out: Path, step: int) -> dict[str, bytes]:
    names = ("adapter_model.safetensors", "optimizer.safetensors")
    return {name: (out / f"checkpoint-{step}" / name).read_bytes() for name in names}


def _newest(out: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in out.glob("checkpoint-*")), default=0)


def _being_written(out: Path) -> set[str]:
    """The temporary folders of checkpoints, what earlier kills left behind included."""
    return {path.name for path in out.iterdir() if path.name.startswith(".")} if out.is_dir() else set()


@pytest.mark.timeout(540)
def test_twenty_kills_leave_the_run_the_same_to_the_bit(folder: Path, tmp_path: Path) -> None:
    steps, tests = 60, str(Path(__file__).parent)

    def command(out: Path) -> list[str]:
        code = _CHILD.format(tests=tests, folder=str(folder), out=str(out), steps=steps, optim="adamw_torch")
        return [sys.executable, "-c", code]

    def finish(out: Path) -> None:
        subprocess.run(command(out), check=True, timeout=240, stdout=subprocess.DEVNULL)

    whole = tmp_path / "whole"
    finish(whole)
    out = tmp_path / "killed"
    draw = random.Random(0)
    kills = while_writing = 0
    while kills < 20:
        with subprocess.Popen(command(out), stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "begin\n"
            # What the kill before left behind is there until the first save sweeps it: only a new name counts.
            begun, stale = _newest(out), _being_written(out)
            aim_at_writing = kills % 2 == 0
            # Odd rounds make some progress and die anywhere; even rounds die amid the writing of a checkpoint.
            deadline = time.monotonic() + 60
            while child.poll() is None and time.monotonic() < deadline:
                if aim_at_writing and _being_written(out) - stale:
                    break
                if not aim_at_writing and _newest(out) >= min(begun + draw.randint(1, 2), steps - 1):
                    time.sleep(draw.random() * 0.02)
                    break
            assert child.poll() is None, "the run ended before it could be killed"
            child.send_signal(signal.SIGKILL)
            child.wait(30)
        kills += 1
        while_writing += bool(_being_written(out) - stale)
    assert while_writing >= 5, f"only {while_writing} of {kills} kills fell into the writing of a checkpoint"
    finish(out)
    assert _checkpoint(out, steps) == _checkpoint(whole, steps)
    assert not _being_written(out), "what the kills left behind was swept"


def test_a_lora_run_ends_where_torch_and_peft_end(shared_data: Path, golden: Path, tmp_path: Path) -> None:
    metadata, want = read_safetensors(golden / "stories_lora.safetensors")
    settings = json.loads(metadata["settings"])
    base = shared_data / "models" / "stories260K-hf"
    model, tokenizer = FastLanguageModel.from_pretrained(str(base), dtype="float32", load_in_4bit=False)
    source = json.loads((shared_data / "instruct" / "llamafactory_alpaca_en_demo.json").read_text())
    ids = [[*tokenizer.encode(row["instruction"] + "\n" + row["output"]), 2][:256] for row in source[:320]]
    rows = [{"input_ids": row, "labels": list(row)} for row in ids]
    lengths = np.array([len(row) for row in ids])
    np.testing.assert_array_equal(lengths[:256], want["train_lengths"])
    np.testing.assert_array_equal(lengths[256:], want["eval_lengths"])

    # The adapter that torch's run began with, as PEFT would have saved it.
    start = tmp_path / "start"
    start.mkdir()
    tensors = {}
    for name, values in want.items():
        if name.startswith("lora/"):
            key = name.removeprefix("lora/")
            tensors[key] = values
            layer = key.removesuffix(".lora_A.weight").removeprefix("base_model.model.").split(".")
            narrow, ffn, kv = 64, 172, 32
            out = {"gate_proj": ffn, "up_proj": ffn, "k_proj": kv, "v_proj": kv}.get(layer[-1], narrow)
            tensors[key.replace("lora_A", "lora_B")] = np.zeros((out, settings["r"]), np.float32)
    write_safetensors(start / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": settings["r"], "lora_alpha": settings["alpha"], "lora_dropout": 0.0}
    config |= {"target_modules": settings["targets"], "base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}
    (start / "adapter_config.json").write_text(json.dumps(config))
    model, _ = FastLanguageModel.from_pretrained(str(start), dtype="float32", load_in_4bit=False)

    trainer = SFTTrainer(
        model=model,
        train_dataset=rows[:256],
        eval_dataset=rows[256:],
        args=SFTConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=settings["batch"],
            gradient_accumulation_steps=1,
            num_train_epochs=settings["epochs"],
            learning_rate=settings["lr"],
            lr_scheduler_type="linear",
            warmup_steps=settings["warmup"],
            weight_decay=0.0,
            max_grad_norm=settings["max_grad_norm"],
            optim="adamw_torch",
            seed=settings["seed"],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose(before, want["eval_loss"][0], rtol=1e-4)
    np.testing.assert_allclose(losses, want["train_losses"], rtol=1e-2)
    # The promise is 1 %; the same arithmetic in another order ends far closer.
    np.testing.assert_allclose(after, want["eval_loss"][1], rtol=1e-3)


def test_a_full_disk_is_an_os_error_and_leaves_no_broken_checkpoint(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(out)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    try:
        with pytest.raises(OSError, match="No space left"):
            _train(folder, out, save_strategy="steps", save_steps=2)
        assert list(out.iterdir()) == []
    finally:
        subprocess.run(["umount", str(out)], check=True)
