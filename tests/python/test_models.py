"""Loading, adapters, calling the model, and saving."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import rustune
from rustune import ConfigError, DataError, FastLanguageModel, Model, ModelError, RustuneError, WeightsError, notices

IDS = [[5, 9, 200, 31, 7, 66], [40, 41, 42, 43, 44, 45]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("llama"))


def load(folder: Path, **changes: Any) -> Model:
    arguments = {"max_seq_length": 64, "dtype": "float32", "load_in_4bit": False, **changes}
    return FastLanguageModel.from_pretrained(str(folder), **arguments)[0]


def move(model: Model) -> None:
    """Trains one step, so that the adapter differs from what it starts as."""
    from rustune import SFTConfig, SFTTrainer

    args = SFTConfig(max_steps=2, learning_rate=1e-2, warmup_ratio=0.0, save_strategy="no", disable_tqdm=True)
    SFTTrainer(model, args, train_dataset=tiny.rows()).train()


def test_four_bits_take_less_memory_and_nearly_say_the_same(folder: Path) -> None:
    full, quantized = load(folder), load(folder, load_in_4bit=True)
    assert quantized.get_memory_footprint() < full.get_memory_footprint()
    assert quantized.num_parameters() == full.num_parameters()
    a, b = full(IDS).logits, quantized(IDS).logits
    assert a.shape == (2, 6, tiny.VOCAB) and a.dtype == np.float32
    assert 0 < np.abs(a - b).max() < 0.5 * np.abs(a).max()


def test_eight_bits_lie_between_four_and_all(folder: Path) -> None:
    bits = {16: load(folder), 8: load(folder, load_in_4bit=None, load_in_8bit=True), 4: load(folder, load_in_4bit=True)}
    sizes = {n: model.get_memory_footprint() for n, model in bits.items()}
    assert sizes[4] < sizes[8] < sizes[16]
    assert bits[8].num_parameters() == bits[16].num_parameters()
    error = {n: np.abs(bits[n](IDS).logits - bits[16](IDS).logits).max() for n in (4, 8)}
    assert 0 < 4 * error[8] < error[4]
    by_config = load(folder, quantization_config={"load_in_8bit": True, "load_in_4bit": False})
    np.testing.assert_array_equal(by_config(IDS).logits, bits[8](IDS).logits)
    assert by_config.get_memory_footprint() == sizes[8]


def test_no_tokenizer_files_give_none_and_a_warning(tmp_path: Path) -> None:
    tiny.write_model(tmp_path, tokenizer=False)
    with pytest.warns(UserWarning, match="no tokenizer files"):
        _, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path))
    assert tokenizer is None


def test_arguments_without_meaning_are_named_in_one_line_once(folder: Path) -> None:
    changes = {"gpu_memory_utilization": 0.5, "fast_inference": True, "device_map": {"": 0}}
    with pytest.warns(UserWarning, match="device_map, fast_inference, gpu_memory_utilization mean nothing") as caught:
        load(folder, **changes)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder, **changes)
        # What is done anyway needs no word.
        load(folder, device_map="auto", random_state=7, trust_remote_code=True, fix_tokenizer=True)


def test_float16_is_told_of_and_computed_as_the_machine_does_best(folder: Path) -> None:
    best = load(folder, dtype=None)
    for dtype in ("float16", np.float16):
        with pytest.warns(UserWarning, match="dtype = float16") as caught:
            assert load(folder, dtype=dtype).products == best.products
        assert len(caught) == 1
        notices.forget()


def test_what_products_are_rounded_to_is_asked_for_by_name_and_told(folder: Path) -> None:
    exact = load(folder, dtype="float32")
    ids = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    want = exact.native.logits(ids)[0]
    for dtype, computes_in in (("int16", "float32"), ("bfloat16", "bfloat16")):
        model = load(folder, dtype=dtype)
        assert (model.products, model.dtype) == (dtype, computes_in) and dtype in repr(model)
        off = float(np.abs(model.native.logits(ids)[0] - want).max() / np.abs(want).max())
        # Codes are off by 1/11584 of their block's largest at most, bfloat16 by 1/256 of itself; some layers of it.
        assert 0 < off < (2e-3 if dtype == "int16" else 5e-2), (dtype, off)
    assert rustune.info()["products"] == load(folder, dtype=None).products
    with pytest.raises(ConfigError, match=r"dtype = int4: expected None .* float32, bfloat16 or int16"):
        load(folder, dtype="int4")


def test_a_literal_token_is_warned_about_and_not_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="HF_TOKEN") as caught:
        load(folder, token="hf_secret")
    assert "secret" not in str(caught[0].message).replace("a secret written", "")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder, token="hf_secret")


def test_what_a_bitsandbytes_config_says_counts(folder: Path) -> None:
    quantized = load(folder, load_in_4bit=None, quantization_config={"load_in_4bit": True})
    assert quantized.get_memory_footprint() < load(folder).get_memory_footprint()
    with pytest.raises(ConfigError, match="fp4"):
        load(folder, load_in_4bit=True, quantization_config={"bnb_4bit_quant_type": "fp4"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resize_model_vocab": 0}, "resize_model_vocab = 0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_scaling = .*"dynamic" is not supported yet'),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor = 0: expected at least 1"),
        ({"rope_scaling": {"type": "linear", "factor": np.nan}}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "max_seq_length": 513}, "room for 512 tokens"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear': expected a dict"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "load_in_8bit = true: contradicts load_in_4bit"),
        ({"load_in_8bit": True, "full_finetuning": True}, "load_in_8bit = true: contradicts full_finetuning"),
        ({"load_in_8bit": True, "load_in_16bit": True}, "load_in_8bit = true: contradicts load_in_16bit"),
        ({"load_in_4bit": True, "load_in_16bit": True}, "load_in_4bit"),
        ({"dtype": "int8"}, "dtype = int8"),
        ({"load_in_4bits": True}, "did you mean load_in_4bit"),
        ({"max_seq_length": 0}, "max_seq_length = 0"),
    ],
)
def test_what_cannot_be_is_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FastLanguageModel.from_pretrained(str(folder), **changes)


def test_unsloths_name_for_saving_an_adapter_keeps_its_tokenizer_beside_it(folder: Path, tmp_path: Path) -> None:
    model = FastLanguageModel.get_peft_model(load(folder), r=4)
    move(model)
    model.save_pretrained_merged(tmp_path / "both", model.tokenizer, save_method="LoRA", max_shard_size="5GB")
    model.save_pretrained(tmp_path / "adapter")
    written = {path.name: path.read_bytes() for path in (tmp_path / "both").iterdir()}
    assert written.items() >= {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}.items()
    assert "tokenizer.json" in written
    again, tokenizer = FastLanguageModel.from_pretrained(
        str(tmp_path / "both"), 64, dtype="float32", load_in_4bit=False
    )
    np.testing.assert_array_equal(again(IDS).logits, model(IDS).logits)
    assert tokenizer == model.tokenizer


def test_positions_are_scaled_as_asked_and_as_the_file_would_say(folder: Path, tmp_path: Path) -> None:
    linear = {"type": "linear", "factor": np.float32(2)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = load(folder, rope_scaling=linear, max_seq_length=400)
    ids = [list(range(60))]
    assert asked.max_seq_length == 400 and asked.config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    written = tiny.write_model(tmp_path / "written", rope_scaling={"rope_type": "linear", "factor": 2.0})
    np.testing.assert_array_equal(asked(ids).logits, load(written)(ids).logits)
    assert not np.array_equal(asked(ids).logits, load(folder)(ids).logits)
    # What is asked for goes over what the file says, also in the newer spelling.
    none = load(written, rope_scaling={"rope_type": "default"})
    np.testing.assert_array_equal(none(ids).logits, load(folder)(ids).logits)
    newer = tiny.write_model(
        tmp_path / "newer", rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    )
    asked_newer = load(newer, rope_scaling=linear)
    np.testing.assert_array_equal(asked_newer(ids).logits, asked(ids).logits)
    assert asked_newer.config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


def test_folders_that_cannot_be_loaded(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        load(tmp_path / "nowhere")
    other = tiny.write_model(tmp_path / "other", architectures=["MambaForCausalLM"], model_type="mamba")
    with pytest.raises(ModelError, match=r"(?i)mamba"):
        load(other)
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    (cut / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        load(cut)
    wide = tiny.write_model(tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(WeightsError, match=r"gate_proj|up_proj|down_proj"):
        load(wide)
    _, tensors = tiny.read_safetensors(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for bad in (np.nan, np.inf):
        damaged = tensors[name].copy()
        damaged[3, 5] = bad
        tiny.write_safetensors(wide / "model.safetensors", tensors | {name: damaged})
        (wide / "config.json").write_text(json.dumps(config))
        with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj\.weight: element \d+ is (NaN|inf)"):
            load(wide)
    tiny.write_safetensors(wide / "model.safetensors", tensors | {"model.layers.0.self_attn.q_norm.weight": damaged})
    with pytest.raises(WeightsError, match="q_norm"):
        load(wide)


def test_the_loss_is_the_mean_of_the_token_losses(folder: Path) -> None:
    model = load(folder)
    labels = [list(row) for row in IDS]
    labels[0][:3] = [-100] * 3
    labels[1][4] = -100
    logits = model(IDS).logits.astype(np.float64)
    losses = []
    for row, targets in zip(logits, labels, strict=True):
        for scores, target in zip(row, targets[1:], strict=False):
            if target != -100:
                losses.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[target])
    out = model(IDS, labels=labels)
    assert out.loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert isinstance(out.loss, float) and model(IDS).loss is None
    assert out["loss"] == out[0] and out[1].shape == out.logits.shape


def test_arguments_of_a_call_that_change_nothing_pass_and_others_do_not(folder: Path) -> None:
    model = load(folder)
    out = model(IDS, use_cache=False, return_dict=True, token_type_ids=[[0] * 6] * 2)
    np.testing.assert_array_equal(out.logits, model(IDS).logits)
    for name in ("past_key_values", "position_ids", "output_hidden_states", "label"):
        with pytest.raises(ConfigError, match=name):
            model(IDS, **{name: [1]})


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(folder: Path, side: str) -> None:
    model = load(folder)
    short = IDS[0][:4]
    padding = [tiny.PAD] * 2
    row = padding + short if side == "left" else short + padding
    mask = np.array([[0, 0, 1, 1, 1, 1] if side == "left" else [1, 1, 1, 1, 0, 0], [1] * 6])
    alone, both = model([short]).logits[0], model([row, IDS[1]], attention_mask=mask).logits
    np.testing.assert_allclose(both[0][mask[0] == 1], alone, atol=1e-5)
    assert not both[0][mask[0] == 0].any()
    np.testing.assert_allclose(both[1], model([IDS[1]]).logits[0], atol=1e-5)
    # Without a mask the pad token marks padding.
    np.testing.assert_array_equal(model([row, IDS[1]]).logits, both)
    labels = [[-100 if id_ == tiny.PAD else id_ for id_ in row]]
    assert model([row], labels=labels).loss == pytest.approx(float(model([short], labels=[short]).loss or 0), abs=1e-6)


def test_what_tokenizers_and_torch_give_is_taken(folder: Path) -> None:
    class Tensor:
        def __init__(self, values: Any) -> None:
            self.values = np.asarray(values)

        def detach(self) -> Tensor:
            return self

        cpu = detach

        def numpy(self) -> Any:
            return self.values

    model = load(folder)
    expected = model(np.array(IDS)).logits
    for given in (Tensor(IDS), IDS, {"input_ids": np.array(IDS), "attention_mask": np.ones((2, 6))}, tuple(IDS)):
        np.testing.assert_array_equal(model(given).logits, expected)
    _, tokenizer = FastLanguageModel.from_pretrained(str(folder))
    assert model(**tokenizer(["abc", "abcdef"], padding=True, return_tensors="np")).logits.shape[:2] == (2, 6)


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        ([[1.5, 2.5]], {}, "whole numbers"),
        ([[1, 2]], {"attention_mask": [[1]]}, "attention_mask"),
        ([[1, 2]], {"labels": [[1, 2, 3]]}, "labels"),
        ([[1, 2]], {"labels": [[-100, -100]]}, "labels"),
        ([[1, 2]], {"attention_mask": [[0, 0]]}, "row 0"),
        (None, {}, "input_ids"),
    ],
)
def test_batches_that_do_not_fit(folder: Path, ids: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(folder)(ids, **arguments)


def test_ids_outside_the_vocabulary_are_named(folder: Path) -> None:
    with pytest.raises(RustuneError, match=str(tiny.VOCAB)):
        _ = load(folder)([[tiny.VOCAB]]).logits


def test_an_untrained_adapter_changes_nothing_to_the_bit(folder: Path) -> None:
    model = load(folder)
    before = model(IDS).logits
    assert FastLanguageModel.get_peft_model(model, r=4) is model
    np.testing.assert_array_equal(model(IDS).logits, before)
    # Per layer: r * (in + out) of the seven linear layers.
    assert model.num_parameters(only_trainable=True) == 2 * 4 * (128 + 96 + 96 + 128 + 160 + 160 + 160)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_saved_adapter_says_the_same_when_loaded(folder: Path, tmp_path: Path, bits: int) -> None:
    storage: dict[str, Any] = {"load_in_4bit": None, f"load_in_{bits}bit": True}
    model = FastLanguageModel.get_peft_model(load(folder, **storage), r=4, lora_alpha=8)
    base = model(IDS).logits
    move(model)
    trained = model(IDS).logits
    assert np.abs(trained - base).max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    again, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), 64, dtype="float32", **storage)
    np.testing.assert_array_equal(again(IDS).logits, trained)
    assert tokenizer is not None and again.adapter is not None and again.adapter["r"] == 4
    # The same settings are no second adapter; others are an error.
    FastLanguageModel.get_peft_model(again, r=4, lora_alpha=8)
    with pytest.raises(ConfigError, match="r = 8"):
        FastLanguageModel.get_peft_model(again, r=8, lora_alpha=8)


def test_the_base_may_lie_beside_the_adapter(folder: Path, tmp_path: Path) -> None:
    model = FastLanguageModel.get_peft_model(load(folder), r=4)
    model.save_pretrained(tmp_path / "adapter")
    shutil.copytree(folder, tmp_path / "base")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "../base"}))
    assert load(tmp_path / "adapter").native.has_adapter


def test_full_finetuning_saves_a_whole_model(folder: Path, tmp_path: Path) -> None:
    model = load(folder, full_finetuning=True, load_in_4bit=None)
    assert model.num_parameters(only_trainable=True) == model.num_parameters()
    move(model)
    model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(load(tmp_path / "model")(IDS).logits, model(IDS).logits)
    assert not np.array_equal(load(folder)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r = 0"),
        ({"r": 8.0}, "r = 8.0"),
        ({"target_modules": ["q_proj", "w_proj"]}, "w_proj"),
        ({"lora_dropuot": 0.1}, "lora_dropout"),
        ({"use_dora": "yes"}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["q_proj"]}, "modules_to_save = q_proj: expected some of embed_tokens, lm_head"),
        ({"target_modules": ["lm_head"]}, "target_modules = lm_head: expected a linear layer too"),
        ({"ensure_weight_tying": "yes"}, "ensure_weight_tying"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "pissa", "r": 40}, "r = 40: .*no more than 32 singular values"),
        ({"init_lora_weights": "pissa_niter_"}, "pissa_niter_N"),
        ({"init_lora_weights": "loftq"}, "load_in_4bit=True"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}}, "loftq_bits: 8"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 5}}, "loftq_iter: 5: expected 1"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bit": 4}}, "did you mean loftq_bits"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": "4"}}, "a whole number"),
        ({"loftq_config": 4}, "a dict or a LoftQConfig"),
        ({"layers_to_transform": [5]}, "layers_to_transform"),
    ],
)
def test_adapters_that_cannot_be_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    model = load(folder)
    with pytest.raises(RustuneError, match=message):
        FastLanguageModel.get_peft_model(model, **changes)
    # And nothing was half done.
    assert not model.native.has_adapter
    FastLanguageModel.get_peft_model(model, r=2)


def test_the_model_answers_what_notebooks_ask(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = FastLanguageModel.get_peft_model(load(folder), r=4)
    model.print_trainable_parameters()
    assert "trainable params: 7,424 ||" in capsys.readouterr().out
    model.config.use_cache = False
    assert model.config.hidden_size == 64 and model.config.get("nothing") is None and "vocab_size" in model.config
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.config.nothing
    assert model.device == "cpu" == model.device.type and model.dtype == "float32"
    assert model.to("cuda").eval().train().cpu() is model
    assert FastLanguageModel.for_training(FastLanguageModel.for_inference(model)).training


@pytest.mark.parametrize(
    "name",
    [
        "save_pretrained_merged",
        "push_to_hub_merged",
        "save_pretrained_gguf",
        "push_to_hub_gguf",
        "merge_and_unload",
    ],
)
def test_what_comes_later_says_so_in_one_line(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="in a later version") as caught:
        getattr(load(folder), name)("somewhere")
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_without_anything_trained_is_not_saved(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to save"):
        load(folder).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
