"""DoRA, PiSSA and LoftQ: trained, saved, resumed, mixed with what else adapters have, and the names of PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from numpy.typing import NDArray

from rustune import (
    ConfigError,
    FastLanguageModel,
    LoftQConfig,
    LoraConfig,
    Model,
    SFTConfig,
    SFTTrainer,
    WeightsError,
    get_peft_model,
)

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


def off(a: Model, b: Model) -> float:
    """How far the logits of two models are apart, relative to their size."""
    ours, theirs = a(IDS).logits, b(IDS).logits
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def update(folder: Path, module: str) -> NDArray[np.float32]:
    """`s B A` of a saved adapter without a rank pattern."""
    _, tensors = tiny.read_safetensors(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    a, b = (tensors[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
    return np.asarray(b @ a * (config["lora_alpha"] / config["r"]))


@pytest.mark.parametrize("four_bits", [False, True])
def test_pissa_is_the_same_when_resumed_and_loaded_and_plain_to_others(
    folder: Path, tmp_path: Path, four_bits: bool
) -> None:
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa"}
    exact = load(folder, load_in_4bit=False)
    plain = load(folder, load_in_4bit=four_bits)
    model = FastLanguageModel.get_peft_model(load(folder, load_in_4bit=four_bits), **options)
    # The same function as before, but for what 4 bits lose: less, since the leading part is no longer among it.
    assert off(model, exact) < (off(plain, exact) if four_bits else 1e-5)
    train(model, tmp_path / "out")
    resumed = FastLanguageModel.get_peft_model(load(folder, load_in_4bit=four_bits), **options)
    train(resumed, tmp_path / "again", resume=str(tmp_path / "out" / "checkpoint-2"))
    assert_same(model, resumed)
    np.testing.assert_array_equal(resumed(IDS).logits, model(IDS).logits)

    model.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["init_lora_weights"]) == (8, 16, True)
    loaded = load(tmp_path / "adapter", load_in_4bit=four_bits)
    np.testing.assert_array_equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.adapter is not None and loaded.adapter["r"] == 4, "goes on as it was trained"
    # To others it is a plain adapter of rank 8 over the base as it is.
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    metadata, tensors = tiny.read_safetensors(path)
    assert metadata["format"] == "pt"
    tiny.write_safetensors(path, tensors)
    converted = load(tmp_path / "adapter", load_in_4bit=four_bits)
    assert converted.adapter is not None and converted.adapter["r"] == 8
    # In 4 bits it stands on another rounding of the base than it was trained on.
    assert off(converted, model) < (0.5 if four_bits else 1e-5)


def test_a_pissa_checkpoint_of_another_beginning_is_refused(folder: Path, tmp_path: Path) -> None:
    options = {"r": 4, "init_lora_weights": "pissa_niter_2"}
    train(FastLanguageModel.get_peft_model(load(folder), **options), tmp_path / "out", steps=2)
    other = FastLanguageModel.get_peft_model(load(folder), random_state=5, **options)
    with pytest.raises(WeightsError, match="began with other singular vectors"):
        train(other, tmp_path / "again", resume=str(tmp_path / "out" / "checkpoint-2"))
    # Loaded as an adapter it goes on, whatever it began with.
    train(load(tmp_path / "out" / "checkpoint-2"), tmp_path / "more", steps=2)


@pytest.mark.parametrize("config", [None, {}, {"loftq_bits": 4, "loftq_iter": 1}, LoftQConfig()])
def test_loftq_brings_four_bits_nearer_to_the_model(folder: Path, tmp_path: Path, config: Any) -> None:
    exact, plain = load(folder, load_in_4bit=False), load(folder)
    model = FastLanguageModel.get_peft_model(
        load(folder), r=32, lora_alpha=64, init_lora_weights="loftq", loftq_config=config
    )
    assert off(model, exact) < 0.8 * off(plain, exact)
    model.save_pretrained(tmp_path / "adapter")
    np.testing.assert_array_equal(load(tmp_path / "adapter")(IDS).logits, model(IDS).logits)
    # The leading part of what was lost: of rank 32, the best there is.
    weights = tiny.read_safetensors(folder / "model.safetensors")[1]["model.layers.0.mlp.up_proj.weight"]
    from rustune import nf4

    lost = weights - np.asarray(nf4.quantize(weights, double_quant=True).dequantize())
    u, s, v = np.linalg.svd(lost, full_matrices=False)
    best = (u[:, :32] * s[:32]) @ v[:32]
    got = update(tmp_path / "adapter", "model.layers.0.mlp.up_proj")
    assert np.linalg.norm(lost - got) < 1.001 * np.linalg.norm(lost - best)


def test_names_of_peft_take_pissa_and_loftq(folder: Path) -> None:
    config = LoraConfig(r=2, init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4))
    model = get_peft_model(load(folder), config)
    assert model.adapter is not None and model.adapter["init_lora_weights"] == "loftq"
    model = get_peft_model(load(folder), LoraConfig(r=2, init_lora_weights="pissa_niter_4"))
    assert model.adapter is not None and model.adapter["init_lora_weights"] == "pissa_niter_4"
    with pytest.warns(UserWarning, match="loftq_config: means nothing without"):
        FastLanguageModel.get_peft_model(load(folder), r=2, loftq_config={"loftq_bits": 4})


def test_loftq_needs_the_weights_before_they_were_quantized(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    model = load(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises((OSError, WeightsError), match="model"):
        FastLanguageModel.get_peft_model(model, r=2, init_lora_weights="loftq")
    FastLanguageModel.get_peft_model(model, r=2)
