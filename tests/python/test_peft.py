"""Adapter folders that PEFT wrote, against the logits PEFT computed with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import read_safetensors, write_safetensors

from rustune import AdapterError, FastLanguageModel, WeightsError


@pytest.fixture
def base(golden: Path, tmp_path: Path) -> Path:
    """The model of llama_gqa.safetensors as a folder."""
    metadata, tensors = read_safetensors(golden / "llama_gqa.safetensors")
    folder = tmp_path / "base"
    folder.mkdir()
    weights = {name.removeprefix("model/"): values for name, values in tensors.items() if name.startswith("model/")}
    write_safetensors(folder / "model.safetensors", weights)
    (folder / "config.json").write_text(metadata["config"])
    return folder


def _adapter(golden: Path, name: str, base: Path, **changes: object) -> Path:
    """A copy of a golden adapter that names `base`."""
    folder = base.parent / name
    shutil.copytree(golden / name, folder, dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": str(base), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.filterwarnings("ignore:.*has no tokenizer files:UserWarning")
@pytest.mark.parametrize("name", ["peft_adapter", "peft_adapter_rslora", "peft_adapter_dora"])
def test_an_adapter_of_peft_gives_its_logits(golden: Path, base: Path, name: str) -> None:
    _, want = read_safetensors(golden / "peft_logits.safetensors")
    want |= read_safetensors(golden / "dora.safetensors")[1]
    folder = _adapter(golden, name, base)
    model, _ = FastLanguageModel.from_pretrained(str(folder), dtype="float32", load_in_4bit=False)
    bare, _ = FastLanguageModel.from_pretrained(str(base), dtype="float32", load_in_4bit=False)
    for row, length in enumerate(want["lengths"]):
        ids = want["input_ids"][row : row + 1, :length]
        np.testing.assert_allclose(model(ids).logits[0], want[f"{name}/logits/{row}"], atol=1e-3, rtol=0)
        assert np.abs(bare(ids).logits - model(ids).logits).max() > 0.1, "the adapter does something"
    # Saved by us and loaded again, it is the same adapter to the bit.
    again = base.parent / "again"
    model.save_pretrained(str(again))
    loaded, _ = FastLanguageModel.from_pretrained(str(again), dtype="float32", load_in_4bit=False)
    np.testing.assert_array_equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modules_to_save", ["q_proj"]),
        ("target_modules", ["q_proj", "embed_tokens"]),
        ("trainable_token_indices", [3, 5]),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("something_new", 3),
        ("r", 0),
        ("init_lora_weights", "pissa"),
    ],
)
def test_what_would_change_the_numbers_is_refused_by_name(golden: Path, base: Path, key: str, value: object) -> None:
    folder = _adapter(golden, "peft_adapter", base, **{key: value})
    with pytest.raises(AdapterError, match=key):
        FastLanguageModel.from_pretrained(str(folder), dtype="float32", load_in_4bit=False)


def test_a_damaged_adapter_is_refused_by_name(golden: Path, base: Path) -> None:
    folder = _adapter(golden, "peft_adapter", base)
    _, tensors = read_safetensors(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    write_safetensors(folder / "adapter_model.safetensors", tensors | {name: np.full_like(tensors[name], np.nan)})
    with pytest.raises(WeightsError, match="damaged"):
        FastLanguageModel.from_pretrained(str(folder), dtype="float32", load_in_4bit=False)
    write_safetensors(folder / "adapter_model.safetensors", {key: v for key, v in tensors.items() if key != name})
    with pytest.raises(WeightsError, match="missing"):
        FastLanguageModel.from_pretrained(str(folder), dtype="float32", load_in_4bit=False)
    # A magnitude that the config asks for and the file lacks, and the other way round.
    without = _adapter(golden, "peft_adapter", base, use_dora=True)
    with pytest.raises(WeightsError, match=r"q_proj.lora_magnitude_vector: is missing"):
        FastLanguageModel.from_pretrained(str(without), dtype="float32", load_in_4bit=False)
    with_one = _adapter(golden, "peft_adapter_dora", base, use_dora=False)
    with pytest.raises(WeightsError, match="lora_magnitude_vector: is not part of what"):
        FastLanguageModel.from_pretrained(str(with_one), dtype="float32", load_in_4bit=False)
