"""Training from Python: it learns, reports, resumes, is interrupted, and refuses what cannot be."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from rustune import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    FastLanguageModel,
    LoraConfig,
    Model,
    SFTConfig,
    SFTTrainer,
    TrainerCallback,
    TrainingArguments,
    is_bfloat16_supported,
)
from rustune.chat_templates import train_on_responses_only

Make = Callable[..., SFTTrainer]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("llama"))


def load(folder: Path, **adapter: Any) -> Model:
    model, _ = FastLanguageModel.from_pretrained(str(folder), 64, dtype="float32", load_in_4bit=False)
    return FastLanguageModel.get_peft_model(model, **{"r": 8, "lora_alpha": 16, **adapter})


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> Make:
    """Makes a trainer; arguments of the settings are told from those of the trainer by name."""

    def made(model: Model | None = None, **arguments: Any) -> SFTTrainer:
        own = {"train_dataset", "eval_dataset", "callbacks", "formatting_func", "max_seq_length"}
        settings = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 4,
            "learning_rate": 2e-2,
            "warmup_steps": 0,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            **{name: value for name, value in arguments.items() if name not in own},
        }
        given = {name: value for name, value in arguments.items() if name in own}
        return SFTTrainer(
            load(folder) if model is None else model, SFTConfig(**settings), **{"train_dataset": tiny.rows(), **given}
        )

    return made


def weights(trainer: SFTTrainer) -> dict[str, Any]:
    return trainer.model.native.parameters()


def test_training_lowers_the_loss_and_says_so(make: Make) -> None:
    trainer = make(max_steps=60, eval_dataset=tiny.rows(seed=1))
    before = trainer.evaluate()["eval_loss"]
    out = trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.7 * before
    assert out.global_step == 60 == trainer.state.global_step
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 60 and out.training_loss == pytest.approx(np.mean(losses))
    assert set(out.metrics) == {
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "train_tokens_per_second",
        "total_flos",
        "train_loss",
        "epoch",
    }
    # 24 rows by 4 are 6 steps an epoch.
    assert out.metrics["epoch"] == pytest.approx(10)
    assert out.metrics["train_samples_per_second"] == pytest.approx(240 / out.metrics["train_runtime"])


def test_the_model_and_the_trainer_agree_on_the_loss(make: Make) -> None:
    rows = tiny.rows(count=3)
    trainer = make(eval_dataset=rows, per_device_eval_batch_size=2)
    ids = [row["input_ids"] for row in rows]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(trainer.model(ids, labels=ids).loss or 0), abs=1e-6)


def test_the_datasets_are_there_to_be_looked_at(make: Make) -> None:
    trainer = make(max_seq_length=8)
    dataset = trainer.train_dataset
    assert dataset is not None
    assert len(dataset) == 24 and dataset[0]["input_ids"] == tiny.rows()[0]["input_ids"][:8]
    assert dataset[-1] == dataset[23] and len(dataset["labels"]) == 24 and len(dataset[:2]["labels"]) == 2
    assert dataset.report["cut"] == 24 and dataset.report["tokens_lost"] == 24 * 4
    with pytest.raises(IndexError):
        _ = dataset[24]


def test_a_banner_and_a_line_for_each_log_entry(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make(disable_tqdm=None, max_seq_length=8).train()
    shown = capsys.readouterr().err
    assert "24: 192 tokens" in shown and "batch 4 x 1 accumulation = 4 rows" in shown and "4, 1 epoch" in shown
    assert "100.0 % of the rows are cut after 8 tokens, 96 tokens lost" in shown
    assert re.search(r"memory +about [\d.]+ [MG]iB at most, [\d.]+ [MG]iB are free\n +model ", shown)
    assert "step 4/4" in shown and "tok/s" in shown and shown.count("loss") >= 4
    make().train()
    assert capsys.readouterr().err == ""


def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(folder: Path, make: Make) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make(load(folder, lora_dropout=0.1), **settings)
    whole.train()
    again = make(load(folder, lora_dropout=0.1), **settings)
    checkpoint = Path(whole.args.output_dir) / "checkpoint-3"
    out = again.train(resume_from_checkpoint=str(checkpoint))
    assert out.global_step == 6
    for name, array in weights(whole).items():
        np.testing.assert_array_equal(array, weights(again)[name])
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    losses = [[e["loss"] for e in trainer.state.log_history if "loss" in e] for trainer in (whole, again)]
    assert losses[0] == losses[1]
    # A checkpoint is an adapter folder like any other.
    model, tokenizer = FastLanguageModel.from_pretrained(str(checkpoint), 64, dtype="float32", load_in_4bit=False)
    assert model.native.has_adapter and tokenizer is not None


def test_true_takes_the_newest_complete_checkpoint(
    folder: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = make(**settings)
    assert trainer.train(resume_from_checkpoint=True).global_step == 4
    assert "starting afresh" in capsys.readouterr().out
    out = Path(trainer.args.output_dir)
    file = next((out / "checkpoint-4").glob("adapter_model.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    again = make(**settings)
    with pytest.warns(UserWarning, match="checkpoint-4"):
        again.train(resume_from_checkpoint=True)
    for name, array in weights(trainer).items():
        np.testing.assert_array_equal(array, weights(again)[name])
    with pytest.raises((CheckpointError, OSError), match="checkpoint-9"):
        make(**settings).train(resume_from_checkpoint=str(out / "checkpoint-9"))


def test_only_as_many_checkpoints_are_kept_as_asked(make: Make) -> None:
    trainer = make(max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    kept = sorted(path.name for path in Path(trainer.args.output_dir).iterdir())
    assert kept == ["checkpoint-4", "checkpoint-5"]


def test_another_thread_runs_while_rust_works(make: Make) -> None:
    rows = tiny.rows(count=64, length=64)
    trainer = make(max_steps=3, per_device_train_batch_size=64, train_dataset=rows)
    counted, done = 0, threading.Event()

    def count() -> None:
        nonlocal counted
        while not done.is_set():
            counted += 1
            time.sleep(0.001)

    seen: list[int] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(counted)

        on_step_end = on_step_begin

    trainer.add_callback(Look)
    thread = threading.Thread(target=count)
    thread.start()
    try:
        trainer.train()
    finally:
        done.set()
        thread.join()
    # Within steps, while no Python of the trainer's runs.
    assert all(end > begin for begin, end in zip(seen[::2], seen[1::2], strict=True))


def test_callbacks_use_the_model_and_cannot_change_it(make: Make) -> None:
    seen: list[tuple[float, Any]] = []
    rows = tiny.rows(count=3)
    ids = [row["input_ids"] for row in rows]

    class Sampler(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            model = given["model"]
            loss = float(model(ids, labels=ids).loss)
            assert loss == pytest.approx(given["metrics"]["eval_loss"], abs=1e-6)
            seen.append((loss, model.generate([ids[0][:4]], max_new_tokens=5).tolist()))
            with pytest.raises(ConfigError, match="in use"):
                model.native.add_adapter("{}")

    settings = {"max_steps": 12, "eval_strategy": "steps", "eval_steps": 4, "eval_dataset": rows}
    trainer = make(callbacks=[Sampler()], **settings)
    trainer.train()
    assert len(seen) == 3 and seen[2][0] < seen[0][0]
    plain = make(**settings)
    plain.train()
    for name, array in weights(plain).items():
        np.testing.assert_array_equal(array, weights(trainer)[name])


def test_another_thread_reads_the_model_while_it_is_trained(make: Make) -> None:
    trainer = make(max_steps=30)
    ids = [tiny.rows()[0]["input_ids"]]
    done, read = threading.Event(), []

    def reader() -> None:
        while not done.is_set():
            read.append(float(trainer.model(ids, labels=ids).loss or 0))

    thread = threading.Thread(target=reader)
    thread.start()
    try:
        trainer.train()
    finally:
        done.set()
        thread.join()
    assert len(read) > 2 and all(np.isfinite(read))
    plain = make(max_steps=30)
    plain.train()
    for name, array in weights(plain).items():
        np.testing.assert_array_equal(array, weights(trainer)[name])


def test_ctrl_c_stops_within_a_step_and_all_stays_usable(make: Make) -> None:
    trainer = make(max_steps=100_000, train_dataset=tiny.rows(count=32, length=48), per_device_train_batch_size=32)

    class Interrupt(TrainerCallback):
        """Sends the signal from another thread, in the middle of the third step."""

        at: int | None = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and self.at is None:
                self.at = state.global_step
                threading.Timer(0.01, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

    trainer.add_callback(Interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    stopped_at = trainer.state.global_step
    assert 2 <= stopped_at < 1000
    assert np.isfinite(trainer.model([[1, 2, 3]]).logits).all()
    trainer.pop_callback(Interrupt)
    trainer.args.max_steps = 2
    assert trainer.train().global_step == 2


def test_what_a_callback_raises_comes_out_unchanged(make: Make) -> None:
    class Mine(Exception):
        pass

    class Raise(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise Mine("here")

    trainer = make(callbacks=[Raise()])
    with pytest.raises(Mine, match="here"):
        trainer.train()
    assert np.isfinite(trainer.model([[1, 2, 3]]).logits).all()


def test_a_learning_rate_that_diverges_is_an_error_and_harms_nothing(make: Make) -> None:
    trainer = make(max_steps=50, learning_rate=1e30, max_grad_norm=0.0, optim="adamw_torch")
    with pytest.raises(DivergedError, match="learning rate") as caught:
        trainer.train()
    assert isinstance(caught.value, ArithmeticError)
    assert all(np.isfinite(array).all() for array in weights(trainer).values())


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "no rows|has no rows"),
        ([{"question": "a", "reply": "b"}], "question"),
        ([{"input_ids": [1, 2], "labels": [-100, -100]}], "no trained token"),
        ([{"text": ""}], "empty"),
        ([{"input_ids": [1, 2], "labels": [1]}], "row 0"),
        (None, "train_dataset"),
    ],
)
def test_data_that_cannot_be_used(make: Make, dataset: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(train_dataset=dataset).train()


def test_ids_outside_the_vocabulary_are_named(make: Make) -> None:
    with pytest.raises(DataError, match="9999"):
        make(train_dataset=[{"input_ids": [1, 9999, 2]}]).train()


def test_rows_left_out_are_counted(make: Make) -> None:
    rows: list[dict[str, Any]] = [*tiny.rows(), {"input_ids": [1, 2], "labels": [-100, -100]}]
    with pytest.warns(UserWarning, match="left out of 25 rows: 1 without a trained token"):
        assert len(make(train_dataset=rows).train_dataset or []) == 24


def test_text_and_conversations_are_tokenised(make: Make) -> None:
    dataset = make(train_dataset=[{"text": "ab"}]).train_dataset
    assert dataset is not None and dataset[0]["input_ids"][-3:] == [*b"ab", tiny.EOS]
    talk = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "AB"}]
    trainer = make(train_dataset=[{"messages": talk}], eval_dataset=[{"messages": talk}])
    whole = [tiny.BOS, tiny.USER, *b"Q", tiny.EOS, tiny.ASSISTANT, *b"AB", tiny.EOS]
    assert trainer.train_dataset is not None and trainer.train_dataset[0]["labels"] == whole
    assert train_on_responses_only(trainer) is trainer
    for masked in (trainer.train_dataset, trainer.eval_dataset):
        assert masked is not None and masked[0]["input_ids"] == whole
        assert masked[0]["labels"] == [-100] * 5 + [*b"AB", tiny.EOS]
    with pytest.raises(DataError, match="nothere"):
        train_on_responses_only(
            make(train_dataset=[{"messages": talk}]), instruction_part="<|user|>", response_part="nothere"
        )


@pytest.mark.parametrize("by_batch", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_formatting_function_takes_rows_or_batches(make: Make, by_batch: bool, count: int) -> None:
    def of_row(row: dict[str, Any]) -> str:
        return f"{row['q']}={row['a']}"

    def of_batch(batch: dict[str, list[Any]]) -> list[str]:
        return [f"{q}={a}" for q, a in zip(batch["q"], batch["a"], strict=True)]

    rows = [{"q": f"q{i}", "a": f"a{i}"} for i in range(count)]
    dataset = make(train_dataset=rows, formatting_func=of_batch if by_batch else of_row).train_dataset
    assert dataset is not None and len(dataset) == count
    assert bytes(dataset[count - 1]["input_ids"][-6:-1]) == f"q{count - 1}=a{count - 1}".encode()
    with pytest.raises(DataError, match="formatting_func"):
        make(train_dataset=rows, formatting_func=lambda row: 3)


def test_settings_read_back_as_they_will_run() -> None:
    config = SFTConfig()
    assert (config.learning_rate, config.per_device_train_batch_size, config.gradient_accumulation_steps) == (
        5e-5,
        4,
        2,
    )
    assert (config.optim, config.seed, config.logging_steps, config.output_dir) == ("adamw_8bit", 3407, 1, "outputs")
    assert (config.warmup_ratio, config.num_train_epochs, config.max_steps, config.weight_decay) == (0.1, 3, -1, 0.001)
    older: dict[str, Any] = {"evaluation_strategy": "epoch"}
    alias: dict[str, Any] = {"max_seq_length": 17}
    theirs = TrainingArguments("here", max_steps=60, warmup_steps=5, **older)
    assert (theirs.per_device_train_batch_size, theirs.optim, theirs.seed) == (8, "adamw_torch", 42)
    assert (theirs.output_dir, theirs.max_steps, theirs.warmup_steps, theirs.eval_strategy) == ("here", 60, 5, "epoch")
    assert (theirs.num_train_epochs, theirs.warmup_ratio, theirs.logging_steps) == (3, 0, 500)
    # What was changed later runs too.
    config.num_train_epochs = 1
    config.per_device_train_batch_size = np.int64(2)
    assert config.plan(8) == {"steps_per_epoch": 2, "total_steps": 2, "epochs": 1}
    assert SFTConfig(hub_token="hf_secret").to_dict()["hub_token"] == "<HUB_TOKEN>"
    assert "hf_secret" not in repr(SFTConfig(hub_token="hf_secret"))
    assert SFTConfig(**alias).max_length == 17 and SFTConfig(report_to=["none"]).report_to == "none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learnig_rate": 1e-4}, "did you mean learning_rate"),
        ({"learning_rate": "2e-4"}, "learning_rate = '2e-4'"),
        ({"learning_rate": float("inf")}, "learning_rate = inf"),
        ({"max_steps": 1.5}, "max_steps = 1.5"),
        ({"optim": "lion_4bit"}, "optim = lion_4bit: not there"),
        ({"report_to": "wandbb"}, "report_to = 'wandbb': .*did you mean wandb"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"hub_token": 3}, "hub_token: expected a text"),
        ({"fp16": True, "bf16": True}, "fp16"),
        ({"max_length": 3, "max_seq_length": 4}, "max_seq_length = 4"),
    ],
)
def test_settings_that_cannot_be_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SFTConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_datset": []}, "did you mean train_dataset"),
        ({"compute_metrics": 3}, "compute_metrics = 3"),
        ({"preprocess_logits_for_metrics": 3}, "preprocess_logits_for_metrics = 3"),
        ({"data_collator": dict}, "data_collator = dict"),
        ({"optimizers": (1, None)}, "optimizers"),
        ({"compute_loss_func": len}, "compute_loss_func: not there yet; the loss is the cross entropy"),
        ({"model_init": len}, "model_init: not together with model"),
        ({"model_init_kwargs": {"dtype": "float32"}}, "model_init_kwargs = .*the model is loaded already"),
        ({"args": {"eos_token": "<|none|>"}}, r"eos_token = '<\|none\|>': the vocabulary has no such token"),
        ({"callbacks": [3]}, "callbacks"),
        ({"tokenizer": 3}, "tokenizer = int"),
        ({"peft_config": 3}, "peft_config"),
        ({"args": 3}, "args = int"),
    ],
)
def test_trainers_that_cannot_be_are_named(folder: Path, arguments: dict[str, Any], message: str) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(folder))
    with pytest.raises(ConfigError, match=message):
        SFTTrainer(model, **arguments)


def test_a_model_without_an_adapter_has_nothing_to_train(folder: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(folder))
    trainer = SFTTrainer(model, SFTConfig(disable_tqdm=True), train_dataset=tiny.rows())
    with pytest.raises(ConfigError, match="get_peft_model"):
        trainer.train()


def test_arguments_of_transformers_are_taken(folder: Path, tmp_path: Path) -> None:
    class TheirArguments:
        def to_dict(self) -> dict[str, Any]:
            return {
                "output_dir": str(tmp_path),
                "learning_rate": 1e-3,
                "max_steps": 2,
                "optim": "adamw_torch_fused",
                "lr_scheduler_type": "cosine",
                "save_strategy": "no",
                "report_to": [],
                "fsdp": [],
                "accelerator_config": {"split_batches": False},
                "disable_tqdm": True,
            }

    trainer = SFTTrainer(load(folder), TheirArguments(), train_dataset=tiny.rows())
    assert trainer.args.learning_rate == 1e-3 and trainer.args.per_device_train_batch_size == 8
    assert trainer.train().global_step == 2


def test_saving_writes_adapter_tokenizer_and_state(make: Make, tmp_path: Path) -> None:
    trainer = make()
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    trainer.save_state()
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    state = json.loads((Path(trainer.args.output_dir) / "trainer_state.json").read_text())
    assert state["global_step"] == 4 and len(state["log_history"]) == 5


def test_what_trl_called_settings_of_the_trainer_goes_to_the_settings(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "<|begin|>one two"}]
    with pytest.warns(UserWarning, match="SFTTrainer: infinite, num_of_sequences mean nothing here") as caught:
        trainer = SFTTrainer(
            load(folder),
            SFTConfig(pad_token="<|user|>", eos_token="<|assistant|>"),
            train_dataset=rows,
            dataset_kwargs={"add_special_tokens": False},
            infinite=True,
            num_of_sequences=1024,
        )
    assert len(caught) == 1
    assert trainer.train_dataset[0]["input_ids"] == [tiny.BOS, *b"one two"]
    assert (trainer.tokenizer.pad_token_id, trainer.tokenizer.eos_token_id) == (tiny.USER, tiny.ASSISTANT)
    plain = SFTTrainer(load(folder), SFTConfig(), train_dataset=rows)
    assert plain.train_dataset[0]["input_ids"] == [tiny.BOS, *b"one two", tiny.EOS]
    (tmp_path / "short.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    talk = [{"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]}]
    for path in (tmp_path / "short.jinja", tmp_path / "other"):
        args = SFTConfig(chat_template_path=path)
        trainer = SFTTrainer(load(folder), args, train_dataset=talk)
        assert trainer.train_dataset[0]["input_ids"] == [*b"abc"]
        trainer.tokenizer.save_pretrained(tmp_path / "other")


def test_half_precision_is_what_the_machine_has_unless_said_otherwise() -> None:
    best = is_bfloat16_supported()
    assert (SFTConfig().fp16, SFTConfig().bf16) == (False, best)
    assert (SFTConfig(fp16=True).bf16, SFTConfig(bf16=True).bf16, SFTConfig(bf16=False).bf16) == (False, True, False)
    assert (TrainingArguments().fp16, TrainingArguments().bf16) == (False, False)


def test_a_model_may_be_named(folder: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    args = SFTConfig(model_init_kwargs={"dtype": "float32"}, max_steps=1, save_strategy="no", disable_tqdm=True)
    trainer = SFTTrainer(str(folder), args, train_dataset=tiny.rows(count=4), peft_config=config)
    assert trainer.train().global_step == 1 and trainer.model.peft_config["default"]["r"] == 2
    assert trainer.processing_class is trainer.model.tokenizer


def test_settings_that_mean_nothing_are_told_of_in_one_line() -> None:
    with pytest.warns(UserWarning) as caught:
        SFTConfig(deepspeed="zero.json", dataloader_num_workers=4, ddp_timeout=7, fsdp_config={}, use_cache=False)
    assert [str(warning.message).partition(":")[0] for warning in caught] == ["SFTConfig"]
    assert "dataloader_num_workers, ddp_timeout, deepspeed mean nothing here" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What is so anyway needs no word.
        SFTConfig(remove_unused_columns=False, padding_free=True, use_cpu=True, dataset_num_proc=2, fsdp="")
        assert SFTConfig(push_to_hub_model_id="me/mine").hub_model_id == "me/mine"
