"""DoRA: trained, saved, resumed, mixed with what else adapters have, and the drop-in names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from rustune import ConfigError, FastLanguageModel, LoraConfig, Model, SFTConfig, SFTTrainer, get_peft_model

IDS = [[5, 9, 200, 31, 7, 66], [40, 41, 42, 43, 44, 45]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("llama"))


def load(folder: Path, **changes: Any) -> Model:
    return FastLanguageModel.from_pretrained(str(folder), 64, **{"dtype": "float32", **changes})[0]


def train(model: Model, out: Path, steps: int = 4, resume: Any = None, **changes: Any) -> None:
    settings = {
        "output_dir": str(out),
        "max_steps": steps,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "warmup_steps": 0,
        "disable_tqdm": True,
        **changes,
    }
    SFTTrainer(model, SFTConfig(**settings), train_dataset=tiny.rows()).train(resume_from_checkpoint=resume)


def assert_same(a: Model, b: Model) -> None:
    ours, theirs = a.native.parameters(), b.native.parameters()
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name], err_msg=name)


MIXED = {"r": 4, "use_dora": True, "use_rslora": True, "lora_dropout": 0.1, "rank_pattern": {"down_proj": 2}}


@pytest.mark.parametrize("four_bits", [False, True])
def test_dora_starts_as_the_base_and_is_the_same_when_resumed_and_loaded(
    folder: Path, tmp_path: Path, four_bits: bool
) -> None:
    base = load(folder, load_in_4bit=four_bits)
    model = FastLanguageModel.get_peft_model(load(folder, load_in_4bit=four_bits), **MIXED)
    np.testing.assert_array_equal(model(IDS).logits, base(IDS).logits)
    begun = model.native.parameters()
    train(model, tmp_path / "out")
    now = model.native.parameters()
    assert all(np.any(now[name] != values) for name, values in begun.items()), "every tensor moves"
    assert begun["model.layers.0.mlp.down_proj.lora_magnitude_vector"].shape == (64,)

    resumed = FastLanguageModel.get_peft_model(load(folder, load_in_4bit=four_bits), **MIXED)
    train(resumed, tmp_path / "again", resume=str(tmp_path / "out" / "checkpoint-2"))
    assert_same(model, resumed)

    model.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["use_dora"] is True
    loaded = load(tmp_path / "adapter", load_in_4bit=four_bits)
    np.testing.assert_array_equal(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(ConfigError, match="use_dora = False: the model has an adapter with use_dora = True"):
        FastLanguageModel.get_peft_model(loaded, **{**MIXED, "use_dora": False})


def test_peft_names_take_dora(folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, use_dora=True)
    model = get_peft_model(load(folder), config)
    assert model.adapter is not None and model.adapter["use_dora"] is True
    names = [name for name in model.native.parameters() if name.endswith("lora_magnitude_vector")]
    assert len(names) == 4, "q_proj and v_proj of two layers"
    # As notebooks generate: token by token, and as the whole says.
    train(model, tmp_path / "out", save_strategy="no")
    prompt = [5, 9, 200]
    generated = model.generate(input_ids=[prompt], max_new_tokens=4, do_sample=False)[0]
    ids = np.asarray(generated).tolist()
    for length in range(len(prompt), len(ids)):
        assert int(np.argmax(model([ids[:length]]).logits[0, -1])) == ids[length]
