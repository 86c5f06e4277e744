"""Packing, grouping by length, and what is kept of the forward: which rows share a step changes nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from rustune import ConfigError, FastLanguageModel, Model, SFTConfig, SFTTrainer, TrainingArguments, _native


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("llama"))


def mixed_rows(count: int = 30) -> list[dict[str, list[int]]]:
    """Rows of 4 to 33 tokens."""
    return [tiny.rows(count, length=4 + 7 * at % 30, seed=3)[at] for at in range(count)]


def load(folder: Path, **adapter: Any) -> Model:
    model, _ = FastLanguageModel.from_pretrained(str(folder), 40, dtype="float32", load_in_4bit=False)
    return FastLanguageModel.get_peft_model(model, r=4, **adapter)


def trainer(folder: Path, out: Path, adapter: dict[str, Any] | None = None, **arguments: Any) -> SFTTrainer:
    settings = {
        "output_dir": str(out),
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "optim": "adamw_torch",
        **arguments,
    }
    return SFTTrainer(load(folder, **(adapter or {})), SFTConfig(**settings), train_dataset=mixed_rows())


def losses(made: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def test_a_packed_step_over_all_rows_has_the_loss_of_the_unpacked_one(folder: Path, tmp_path: Path) -> None:
    # All rows in one step: packing can only change how they stand beside each other.
    one_step = {"max_steps": 3, "gradient_accumulation_steps": 1, "adapter": {"lora_dropout": 0.1}}
    unpacked = trainer(folder, tmp_path / "a", per_device_train_batch_size=30, **one_step)
    packed = trainer(folder, tmp_path / "b", per_device_train_batch_size=30, packing=True, **one_step)
    unpacked.train()
    packed.train()
    # Sums of f32 in another order.
    np.testing.assert_allclose(losses(packed), losses(unpacked), rtol=1e-5)
    for name, array in unpacked.model.native.parameters().items():
        np.testing.assert_allclose(packed.model.native.parameters()[name], array, atol=2e-4)


def test_a_packed_row_counts_as_one_row(folder: Path, tmp_path: Path) -> None:
    made = trainer(folder, tmp_path, packing=True, max_steps=-1, num_train_epochs=1)
    rows = made.train_dataset
    assert rows is not None
    n_packed = rows.rows.n_packed(40)
    assert n_packed == pytest.approx(rows.rows.n_tokens / 40, abs=1.5) and n_packed < len(rows)
    out = made.train()
    assert out.global_step == -(-n_packed // 4)
    assert out.metrics["train_samples_per_second"] == pytest.approx(30 / out.metrics["train_runtime"])
    # As an argument of the trainer too.
    same = SFTTrainer(made.model, SFTConfig(output_dir=str(tmp_path)), train_dataset=rows, packing=True)
    assert same.args.packing


@pytest.mark.parametrize("how", [{"packing": True}, {"group_by_length": True}])
def test_a_resumed_run_goes_on_with_the_same_rows(folder: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    settings: dict[str, Any] = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 3,
        "adapter": {"lora_dropout": 0.1},
    }
    whole = trainer(folder, tmp_path, **settings, **how)
    whole.train()
    again = trainer(folder, tmp_path / "again", **settings, **how)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(again) == losses(whole)
    for name, array in whole.model.native.parameters().items():
        np.testing.assert_array_equal(array, again.model.native.parameters()[name])


def test_the_longest_row_comes_first_when_grouped_by_length(folder: Path, tmp_path: Path) -> None:
    one_row = {"max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    made = trainer(folder, tmp_path, group_by_length=True, **one_row)
    made.train()
    assert made.state.num_input_tokens_seen == max(len(row["input_ids"]) for row in mixed_rows())


def test_what_is_kept_changes_no_bit(folder: Path, tmp_path: Path) -> None:
    ways: list[bool | str] = [True, False, "unsloth"]
    made = [trainer(folder, tmp_path / str(way), {"lora_dropout": 0.1}, gradient_checkpointing=way) for way in ways]
    for one in made:
        one.train()
    assert losses(made[0]) == losses(made[1]) == losses(made[2])
    # The trainer's argument wins over the model's; without it the model's counts.
    assert [one._checkpointing() for one in made] == ["true", "false", "unsloth"]
    kept = trainer(folder, tmp_path, {"use_gradient_checkpointing": False})
    assert kept._checkpointing() == "false"
    with pytest.raises(ConfigError, match="use_gradient_checkpointing = 'always'"):
        load(folder, use_gradient_checkpointing="always")


def test_the_memory_is_estimated_and_shown(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(folder, tmp_path, disable_tqdm=None, max_steps=1)
    rows = made.train_dataset
    assert rows is not None
    estimates = {
        asked: json.loads(made.model.native.training_memory(rows.rows, made._engine_options(), asked))["estimate"]
        for asked in ("true", "false", "unsloth")
    }
    assert estimates["true"]["layers"] == [1, 0, 1] and estimates["false"]["layers"] == [2, 0, 0]
    assert estimates["true"]["kept"] < estimates["false"]["kept"] == estimates["unsloth"]["kept"]
    n_trained = sum(array.size for array in made.model.native.parameters().values())
    assert estimates["true"]["gradients"] == 4 * n_trained and estimates["true"]["optimizer"] == 8 * n_trained
    made.train()
    shown = capsys.readouterr().err
    assert "memory      about" in shown and "2 of 2 layers kept" in shown and "GiB are free" in shown


MEASURE = """
import json, sys
from rustune import FastLanguageModel, SFTConfig, SFTTrainer, info
folder, way, bits = sys.argv[1:]
model, _ = FastLanguageModel.from_pretrained(folder, 1024, dtype="float32", **{f"load_in_{bits}bit": True})
model = FastLanguageModel.get_peft_model(model, r=8)
rows = [{"input_ids": [at % 250 for at in range(700)]} for _ in range(4)]
config = SFTConfig(max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=1, save_strategy="no",
                   optim="adamw_torch", gradient_checkpointing=way == "true", disable_tqdm=True)
trainer = SFTTrainer(model, config, train_dataset=rows)
memory = json.loads(model.native.training_memory(trainer.train_dataset.rows, trainer._engine_options(), way))
trainer.train()
print(json.dumps([memory["peak"], info()["peak_rss_bytes"]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory a process has")
@pytest.mark.parametrize(("way", "bits"), [("true", "4"), ("false", "4"), ("true", "8"), ("true", "16")])
def test_the_estimated_peak_is_the_measured_one(tmp_path: Path, way: str, bits: str) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 8192}
    folder = tiny.write_model(tmp_path, tokenizer=False, num_attention_heads=8, head_dim=64, **sizes)
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(folder), way, bits]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    estimated, measured = json.loads(out.splitlines()[-1])
    assert estimated == pytest.approx(measured, rel=0.15)


def test_a_model_is_estimated_from_its_config_alone(folder: Path) -> None:
    eight, _ = FastLanguageModel.from_pretrained(str(folder), dtype="float32", load_in_8bit=True)
    FastLanguageModel.get_peft_model(eight, r=4)
    forecast = json.loads(
        _native.estimate_memory(str(folder), '{"load_in_8bit": true}', '{"r": 4}', 100, dtype="float32")
    )
    assert forecast["estimate"]["model"] == pytest.approx(eight.native.nbytes, rel=0.02)
    model = load(folder)
    arguments = (str(folder), '{"load_in_4bit": false}', '{"r": 4}', 100)
    forecast = json.loads(_native.estimate_memory(*arguments, dtype="float32", available=2**40))
    assert forecast["estimate"]["model"] == pytest.approx(model.native.nbytes, rel=0.02)
    assert forecast["fits"] is True and forecast["estimate"]["layers"] == [2, 0, 0]
    tight = json.loads(_native.estimate_memory(*arguments, dtype="float32", available=1000))
    assert tight["fits"] is False and tight["estimate"]["layers"] == [1, 0, 1]


def test_other_ways_to_pack_are_named() -> None:
    assert SFTConfig(packing=True).packing and TrainingArguments(group_by_length=True).group_by_length
    with pytest.raises(ConfigError, match="packing_strategy = 'wrapped'"):
        SFTConfig(packing=True, packing_strategy="wrapped")
