"""Training the vocabulary: the embedding table and the head beside an adapter, and tokens that are added."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from numpy.typing import NDArray

from rustune import (
    AdapterError,
    ConfigError,
    DataError,
    FastLanguageModel,
    Model,
    SFTConfig,
    SFTTrainer,
    WeightsError,
    add_new_tokens,
    estimate,
)

IDS = [[5, 9, 200, 31, 7, 66]]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TABLES = ["embed_tokens", "lm_head"]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"

pytestmark = [
    pytest.mark.filterwarnings("ignore:get_peft_model. embed_tokens and lm_head in target_modules:UserWarning"),
    pytest.mark.filterwarnings("ignore:get_peft_model. the head of this model is its embedding table:UserWarning"),
]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def load(folder: Path, **changes: Any) -> Model:
    arguments = {"dtype": "float32", "load_in_4bit": False, **changes}
    return FastLanguageModel.from_pretrained(str(folder), 64, **arguments)[0]


def adapted(folder: Path, **changes: Any) -> Model:
    loading = {name: changes.pop(name) for name in ("load_in_4bit", "dtype") if name in changes}
    return FastLanguageModel.get_peft_model(
        load(folder, **loading), **{"r": 4, "target_modules": [*LINEARS, *TABLES], **changes}
    )


def trainer(model: Model, out: Path, **settings: Any) -> SFTTrainer:
    args = SFTConfig(
        **{
            "output_dir": str(out),
            "max_steps": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            **settings,
        }
    )
    return SFTTrainer(model, args, train_dataset=tiny.rows(), eval_dataset=tiny.rows(count=4, seed=2))


def values(model: Model) -> dict[str, NDArray[np.float32]]:
    return model.native.parameters()


def test_targets_as_in_unsloths_notebooks_are_trained_whole(untied: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="embed_tokens and lm_head in target_modules: trained whole, in float32"):
        model = adapted(untied)
    assert model.adapter is not None and model.adapter["modules_to_save"] == TABLES
    assert model.adapter["target_modules"] == sorted(LINEARS)
    # 2 tables of 264 x 64 beside the adapter's 7,424.
    assert model.num_parameters(only_trainable=True) == 7_424 + 2 * tiny.VOCAB * 64
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert shapes[EMBED] == shapes[HEAD] == (tiny.VOCAB, 64) and len(shapes) == 2 * 14 + 2
    assert sum(p.numel() for p in model.parameters()) == model.num_parameters()
    before = values(model)
    np.testing.assert_array_equal(model(IDS).logits, load(untied)(IDS).logits)
    run = trainer(model, tmp_path, embedding_learning_rate=1e-3)
    untrained = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < untrained
    after = values(model)
    assert all(not np.array_equal(before[name], after[name]) for name in before), "everything moved"
    # AdamW's first steps move a weight by about the learning rate each.
    assert 1e-4 < np.abs(after[HEAD] - before[HEAD]).max() < 4.1e-3
    lora = "model.layers.0.self_attn.q_proj.lora_B.weight"
    assert np.abs(after[lora] - before[lora]).max() > 8e-3


def test_the_embeddings_rate_is_theirs_alone(untied: Path, tmp_path: Path) -> None:
    model = adapted(untied, modules_to_save=["norm"])
    before = values(model)
    trainer(model, tmp_path, embedding_learning_rate=0.0, optim="adamw_torch", weight_decay=0.1).train()
    still = {name for name, array in values(model).items() if np.array_equal(array, before[name])}
    assert still == {EMBED, HEAD}
    with pytest.raises(ConfigError, match="add them to target_modules"):
        trainer(adapted(untied, target_modules=LINEARS), tmp_path, embedding_learning_rate=1e-3).train()


def test_tied_tables_part_unless_they_are_to_stay(tied: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the head of this model is its embedding table; from now on they are two"):
        model = adapted(tied)
    assert {EMBED, HEAD} <= values(model).keys()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*from now on they are two")
        one = adapted(tied, ensure_weight_tying=True)
    assert EMBED in values(one) and HEAD not in values(one) and one.native.is_tied
    for made in (model, one):
        np.testing.assert_array_equal(made(IDS).logits, load(tied)(IDS).logits)
        trainer(made, tmp_path, optim="adamw_torch").train()
        made.save_pretrained(tmp_path / "adapter")
        _, saved = tiny.read_safetensors(tmp_path / "adapter" / "adapter_model.safetensors")
        tables = [saved[f"base_model.model.{name}"] for name in (EMBED, HEAD)]
        assert np.array_equal(*tables) == (made is one), "PEFT's file holds both in either case"
        again = load(tmp_path / "adapter")
        assert again.native.is_tied == (made is one)
        np.testing.assert_array_equal(again(IDS).logits, made(IDS).logits)
    alone = adapted(tied, target_modules=LINEARS, modules_to_save=["lm_head"])
    trainer(alone, tmp_path, optim="adamw_torch").train()
    assert EMBED not in values(alone) and np.abs(alone(IDS).logits - load(tied)(IDS).logits).max() > 0.01


@pytest.mark.parametrize("optim", ["adamw_8bit", "adafactor", "paged_lion_8bit"])
def test_a_resumed_run_is_the_same_to_the_bit(tied: Path, tmp_path: Path, optim: str) -> None:
    settings = {"optim": optim, "embedding_learning_rate": 2e-3, "neftune_noise_alpha": 5, "weight_decay": 0.01}
    whole = adapted(tied, load_in_4bit=True)
    trainer(whole, tmp_path / "a", save_strategy="steps", save_steps=2, **settings).train()
    resumed = adapted(tied, load_in_4bit=True)
    trainer(resumed, tmp_path / "b", **settings).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, array in values(whole).items():
        np.testing.assert_array_equal(array, values(resumed)[name], err_msg=name)
    # A checkpoint opens like any adapter.
    opened = load(tmp_path / "a" / "checkpoint-4", load_in_4bit=True)
    np.testing.assert_array_equal(opened(IDS).logits, whole(IDS).logits)
    with pytest.raises(WeightsError, match=r"embed_tokens\.weight.*set up"):
        wider = load(tied)
        wider.resize_token_embeddings(300)
        wider = FastLanguageModel.get_peft_model(wider, r=4, target_modules=[*LINEARS, *TABLES])
        trainer(wider, tmp_path / "b", **settings).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_generation_uses_the_trained_head(untied: Path, tmp_path: Path) -> None:
    model = load(untied)
    FastLanguageModel.for_inference(model, lm_head_bits=8)
    model = FastLanguageModel.get_peft_model(model, r=4, modules_to_save=TABLES)
    with pytest.raises(ConfigError, match="lm_head_bits = 8: expected None: the head of this model is trained"):
        FastLanguageModel.for_inference(model, lm_head_bits=8)
    trainer(model, tmp_path, max_steps=30, learning_rate=2e-2).train()
    ids = model.generate([[10, 12, 14, 16]], max_new_tokens=3, do_sample=False, eos_token_id=[263])[0, 4:]
    want = [int(np.argmax(model([[10, 12, 14, 16, *ids[:n]]]).logits[0, -1])) for n in range(3)]
    assert list(ids) == want and model.config.vocab_size == tiny.VOCAB


def test_tokens_are_added_trained_saved_and_found_again(untied: Path, tmp_path: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(untied), 64, dtype="float32", load_in_4bit=True)
    length = len(tokenizer)
    assert tokenizer.add_tokens(["<think>", "</think>", "<think>"]) == 2
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]}) == 1
    assert len(tokenizer) == length + 3 == 264
    new = tokenizer.convert_tokens_to_ids("<|tool|>")
    assert new == 263 and tokenizer("a<think>b").input_ids[1] == 261
    # The table has room for 264 tokens; one more needs a row.
    tokenizer.add_tokens("<more>")
    run = {"train_dataset": [{"text": "what<more>is<think>it"}] * 4}
    args = SFTConfig(output_dir=str(tmp_path / "out"), max_steps=2, save_strategy="no", disable_tqdm=True)
    with pytest.raises(DataError, match=r"id 264 is outside .* model\.resize_token_embeddings\(len\(tokenizer\)\)"):
        SFTTrainer(FastLanguageModel.get_peft_model(load(untied), r=2), args, tokenizer=tokenizer, **run).train()
    described = model.resize_token_embeddings(len(tokenizer))
    assert described.shape == (265, 64) and not described.requires_grad
    assert model.vocab_size == model.config.vocab_size == 265 and "265" in str(model.config)
    model = FastLanguageModel.get_peft_model(model, r=4, modules_to_save=TABLES)
    row = values(model)[EMBED][264]
    np.testing.assert_allclose(row, values(model)[EMBED][:264].mean(0), atol=1e-5)
    SFTTrainer(model, args, tokenizer=tokenizer, **run).train()
    assert np.abs(values(model)[EMBED][264] - row).max() > 1e-5
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again, reread = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), 64, dtype="float32", load_in_4bit=True)
    assert len(reread) == 265 and reread.convert_tokens_to_ids("<more>") == 264 and again.vocab_size == 265
    ids = reread("what<more>is").input_ids
    np.testing.assert_array_equal(again([ids]).logits, model([ids]).logits)


def test_a_resized_vocabulary_is_saved_without_being_trained(tied: Path, untied: Path, tmp_path: Path) -> None:
    for folder in (tied, untied):
        model = load(folder)
        model.resize_token_embeddings(tiny.VOCAB + 1, pad_to_multiple_of=8)
        assert model.vocab_size == 272
        model = FastLanguageModel.get_peft_model(model, r=4)
        trainer(model, tmp_path, max_steps=1).train()
        model.save_pretrained(tmp_path / "adapter")
        with pytest.warns(UserWarning, match="knows 272 tokens, its base 264, and there is no tokenizer"):
            again = load(tmp_path / "adapter")
        np.testing.assert_array_equal(again([[5, 271]]).logits, model([[5, 271]]).logits)
        assert again.vocab_size == 272 and again.num_parameters(only_trainable=True) == 7_424
        again.tokenizer.save_pretrained(tmp_path / "once more")
        again.save_pretrained(tmp_path / "once more")
        assert load(tmp_path / "once more").vocab_size == 272


def test_sizes_follow_transformers(untied: Path, tmp_path: Path) -> None:
    model = load(untied)
    base = model(IDS).logits
    assert model.resize_token_embeddings().shape == (264, 64) and model.resize_token_embeddings(264).shape == (264, 64)
    np.testing.assert_array_equal(model(IDS).logits, base)
    with pytest.warns(UserWarning, match="mean_resizing=False"):
        model.resize_token_embeddings(300, mean_resizing=False)
    grown = model(IDS).logits
    assert grown.shape[-1] == 300
    np.testing.assert_array_equal(grown[..., :264], base)
    # A new token's logit is the mean of the old ones': its row of the head is their mean.
    np.testing.assert_allclose(grown[..., 299], base.mean(-1), atol=1e-4)
    assert model.resize_token_embeddings(pad_to_multiple_of=64).shape == (320, 64)
    assert model.resize_token_embeddings(260).shape == (260, 64)
    np.testing.assert_array_equal(model(IDS).logits, base[..., :260])
    with pytest.raises(DataError, match="id 261 is outside"):
        _ = model([[261]]).logits
    resized = load(untied, resize_model_vocab=280)
    assert resized.vocab_size == 280 and resized(IDS).logits.shape[-1] == 280
    full = load(untied, full_finetuning=True, load_in_4bit=None)
    assert full.resize_token_embeddings(270).requires_grad
    full.save_pretrained(tmp_path / "full")
    full.tokenizer.save_pretrained(tmp_path / "full")
    assert load(tmp_path / "full").vocab_size == 270
    for arguments in ({"new_num_tokens": 0}, {"pad_to_multiple_of": 0}, {"new_num_tokens": "many"}):
        with pytest.raises(ConfigError, match=next(iter(arguments))):
            model.resize_token_embeddings(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["mean", "interpolation"])
def test_new_tokens_start_where_unsloth_means_them_to(untied: Path, method: str) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(untied), 64, dtype="float32", load_in_4bit=False)
    with pytest.warns(UserWarning, match=r"<\|end\|>, x: in the vocabulary already"):
        add_new_tokens(model, tokenizer, ["cat", "<|end|>", "dog", "cat", "x", "cow"], method, 0.25)
    # `x` is a byte of the vocabulary, so three were new; the table had room for them.
    assert len(tokenizer) == 264 == model.vocab_size and tokenizer("dog").input_ids == [262]
    with pytest.warns(UserWarning, match="trained too, since tokens were added"):
        model = FastLanguageModel.get_peft_model(model, r=2)
    before = tiny.weights(json.loads((untied / "config.json").read_text()), 0)
    for name in (EMBED, HEAD):
        old = before[name]
        mean, pieces = old.mean(0), old[list(b"dog")].mean(0)
        want = mean if method == "mean" else 0.75 * mean + 0.25 * pieces
        np.testing.assert_allclose(values(model)[name][262], want, atol=1e-5)
        np.testing.assert_array_equal(values(model)[name][:261], old[:261])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"new_tokens": []}, "new_tokens = "),
        ({"new_tokens": "abc"}, "expected a list of texts"),
        ({"new_tokens": ["a", 3]}, "expected a list of texts"),
        ({"new_tokens": ["abc"], "method": "median"}, "method = 'median'"),
        ({"new_tokens": ["abc"], "interpolation": 1.5}, "interpolation = 1.5"),
        ({"new_tokens": ["abc"], "interpolation": "half"}, "interpolation = 'half'"),
    ],
)
def test_tokens_that_cannot_be_added_are_named(untied: Path, arguments: dict[str, Any], message: str) -> None:
    model = load(untied)
    with pytest.raises(ConfigError, match=message):
        add_new_tokens(model, model.tokenizer, **arguments)
    assert len(model.tokenizer) == 261 and model.vocab_size == 264
    with pytest.raises(ConfigError, match="before get_peft_model"):
        add_new_tokens(FastLanguageModel.get_peft_model(model, r=2), model.tokenizer, ["abc"])


def test_damaged_tables_are_refused_and_the_model_stays(tied: Path, tmp_path: Path) -> None:
    adapted(tied, ensure_weight_tying=True).save_pretrained(tmp_path)
    _, saved = tiny.read_safetensors(tmp_path / "adapter_model.safetensors")
    embed, head = f"base_model.model.{EMBED}", f"base_model.model.{HEAD}"
    for changes, message in (
        ({embed: np.full_like(saved[embed], np.nan)}, "damaged"),
        ({embed: saved[embed][:200].copy()}, "has shape"),
        ({head: saved[head] + 1}, "differs from the embedding table"),
        ({"base_model.model.model.norm.weight": np.ones(64, np.float32)}, "not part of"),
    ):
        tiny.write_safetensors(tmp_path / "adapter_model.safetensors", {**saved, **changes})
        model = load(tied)
        with pytest.raises(WeightsError, match=message):
            model.load_adapter(tmp_path)
        assert not model.native.has_adapter and model.native.is_tied and model.vocab_size == tiny.VOCAB
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": [3]}))
    with pytest.raises(AdapterError, match="modules_to_save"):
        load(tmp_path)


def test_the_same_adapter_may_be_asked_for_twice(untied: Path) -> None:
    model = adapted(untied)
    assert FastLanguageModel.get_peft_model(model, r=4, target_modules=LINEARS, modules_to_save=TABLES) is model
    with pytest.raises(ConfigError, match="modules_to_save"):
        FastLanguageModel.get_peft_model(model, r=4)


def test_the_estimate_counts_what_is_trained_whole(untied: Path) -> None:
    config = json.loads((untied / "config.json").read_text())
    shape = estimate.Shape.from_config(config)
    model = adapted(untied)
    assert shape.n_adapter(4) + shape.n_whole(TABLES) == model.num_parameters(only_trainable=True)
    without, whole = (
        estimate.memory(config, tokens=64, rank=4, bits=16, modules_to_save=modules)["estimate"]
        for modules in ((), TABLES)
    )
    # 4 bytes of a gradient each, 2 of AdamW's moments in 8 bits.
    added = 2 * tiny.VOCAB * 64
    assert whole["gradients"] - without["gradients"] == 4 * added
    assert 2 * added < whole["optimizer"] - without["optimizer"] < 2.1 * added
    assert estimate.flops(shape, tokens=10, length=5, again=0, head_trained=True) > estimate.flops(
        shape, tokens=10, length=5, again=0
    )
