"""The life of a run: schedules, optimizers, the best checkpoint, metrics, predictions, the model between steps."""

from __future__ import annotations

import json
import math
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
    EarlyStoppingCallback,
    FastLanguageModel,
    HubError,
    Model,
    RustuneError,
    SFTConfig,
    SFTTrainer,
    TrainerCallback,
    TrainingArguments,
    evaluation,
)

Make = Callable[..., SFTTrainer]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> Make:
    """Makes a trainer; arguments of the settings are told from those of the trainer by name."""

    def made(full: bool = False, eight_bits: bool = False, **arguments: Any) -> SFTTrainer:
        own = {"eval_dataset", "callbacks", "compute_metrics", "preprocess_logits_for_metrics", "neftune_noise_alpha"}
        settings = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 3,
            "gradient_accumulation_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            **{name: value for name, value in arguments.items() if name not in own},
        }
        model, _ = FastLanguageModel.from_pretrained(
            str(folder), 64, dtype="float32", load_in_4bit=False, load_in_8bit=eight_bits, full_finetuning=full
        )
        if not full:
            model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.1)
        given = {name: value for name, value in arguments.items() if name in own}
        dataset = {"train_dataset": tiny.rows(), "eval_dataset": tiny.rows(count=8, seed=2)}
        return SFTTrainer(model, SFTConfig(**settings), **{**dataset, **given})

    return made


def weights(model: Model) -> dict[str, Any]:
    return model.native.parameters()


def rates(trainer: SFTTrainer) -> list[float]:
    trainer.train()
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_schedules_take_their_arguments(make: Make) -> None:
    polynomial = rates(make(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power": 2, "lr_end": 1e-3}))
    assert polynomial == pytest.approx([9e-3 * (1 - done / 4) ** 2 + 1e-3 for done in range(4)], rel=1e-12)
    text = '{"num_cycles": 2}'
    restarts = rates(make(lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs=text))
    assert restarts == pytest.approx([1e-2, 5e-3, 1e-2, 5e-3], rel=1e-12)
    inverse = rates(make(lr_scheduler_type="inverse_sqrt", warmup_steps=2))
    assert inverse == pytest.approx([0.0, 5e-3, 1e-2, 1e-2 / math.sqrt(1.5)], rel=1e-12)


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("adafactor", None),
        ("sgd", "momentum=0.9, nesterov=True"),
        ("lion_8bit", None),
        ("paged_lion_32bit", None),
        ("paged_adamw_32bit", None),
        ("rmsprop", "alpha=0.9"),
        ("adagrad", None),
    ],
)
def test_every_optimizer_learns_and_resumes_to_the_bit(make: Make, optim: str, optim_args: str | None) -> None:
    lr = {"sgd": 0.1, "lion_8bit": 1e-3, "paged_lion_32bit": 1e-3}.get(optim, 1e-2)
    settings = {"optim": optim, "optim_args": optim_args, "learning_rate": lr, "save_strategy": "steps"}
    settings |= {"save_steps": 10, "max_steps": 20, "neftune_noise_alpha": 0.5}
    whole = make(**settings)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < before
    again = make(**settings)
    again.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-10"))
    for name, array in weights(whole.model).items():
        np.testing.assert_array_equal(array, weights(again.model)[name])


def test_a_model_in_eight_bits_learns_and_resumes_to_the_bit(make: Make) -> None:
    settings: dict[str, Any] = {"eight_bits": True, "save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    whole = make(**settings)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < before
    again = make(**settings)
    again.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-4"))
    for name, array in weights(whole.model).items():
        np.testing.assert_array_equal(array, weights(again.model)[name])


class Scores:
    """A compute_metrics whose answers are written down."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def __call__(self, prediction: Any) -> dict[str, float]:
        return {"score": self.scores.pop(0)}


BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
}


def test_the_best_model_is_there_at_the_end(make: Make) -> None:
    trainer = make(compute_metrics=Scores(0.1, 0.5, 0.4, 0.3), save_total_limit=2, **BEST)
    assert trainer.args.greater_is_better is True
    trainer.train()
    out = Path(trainer.args.output_dir)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    state = trainer.state
    assert (state.best_metric, state.best_global_step) == (0.5, 2)
    assert state.best_model_checkpoint == str(out / "checkpoint-2")
    _, saved = tiny.read_safetensors(out / "checkpoint-2" / "adapter_model.safetensors")
    for name, array in weights(trainer.model).items():
        np.testing.assert_array_equal(array, saved[f"base_model.model.{name}"])
    assert [entry["eval_score"] for entry in state.log_history if "eval_score" in entry] == [0.1, 0.5, 0.4, 0.3]
    assert all("eval_loss" in entry for entry in state.log_history if "eval_score" in entry)
    written = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
    assert (written["best_metric"], written["best_global_step"]) == (0.5, 2)
    assert written["log_history"][-1]["eval_score"] == 0.3


def test_only_better_evaluations_are_saved_with_the_strategy_best(make: Make) -> None:
    settings = {**BEST, "save_strategy": "best", "load_best_model_at_end": False, "greater_is_better": False}
    trainer = make(compute_metrics=Scores(0.4, 0.5, 0.3, 0.35), **settings)
    trainer.train()
    assert sorted(path.name for path in Path(trainer.args.output_dir).iterdir()) == ["checkpoint-1", "checkpoint-3"]


def test_early_stopping_goes_on_counting_in_a_resumed_run(make: Make) -> None:
    scores = [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    settings = {**BEST, "max_steps": 6}
    whole = make(compute_metrics=Scores(*scores), callbacks=[EarlyStoppingCallback(3)], **settings)
    assert whole.train().global_step == 4
    again = make(compute_metrics=Scores(*scores[2:]), callbacks=[EarlyStoppingCallback(3)], **settings)
    checkpoint = str(Path(whole.args.output_dir) / "checkpoint-2")
    assert again.train(resume_from_checkpoint=checkpoint).global_step == 4
    assert again.state.best_global_step == 1


def test_a_first_evaluation_and_a_late_one(make: Make) -> None:
    trainer = make(eval_strategy="epoch", eval_on_start=True, eval_delay=1.5, num_train_epochs=2, max_steps=-1)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [0, 12]
    assert trainer.args.do_eval is True
    trainer = make(eval_strategy="steps", eval_steps=0.5)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [2, 4]
    with pytest.raises(DataError, match="eval_dataset: not given, but eval_strategy = steps"):
        make(eval_strategy="steps", eval_dataset=None).train()


def test_metrics_are_computed_from_what_the_model_predicts(make: Make) -> None:
    seen: dict[str, Any] = {}

    def compute_metrics(prediction: Any) -> dict[str, Any]:
        logits, labels = prediction
        seen["logits"], seen["labels"] = logits, labels
        chosen = np.argmax(logits[:, :-1], axis=-1)
        known = labels[:, 1:] != -100
        return {"accuracy": np.float32((chosen == labels[:, 1:])[known].mean())}

    rows = [{"input_ids": row["input_ids"][: 5 + i % 4]} for i, row in enumerate(tiny.rows(count=8, seed=2))]
    plain = make(eval_dataset=rows).evaluate()
    trainer = make(compute_metrics=compute_metrics, eval_dataset=rows)
    lazy = trainer.evaluate()
    assert lazy["eval_loss"] == plain["eval_loss"]
    logits, labels = seen["logits"], seen["labels"]
    assert isinstance(logits, evaluation.Logits) and logits.shape == (8, 8, tiny.VOCAB) == (len(labels), 8, tiny.VOCAB)
    whole = np.asarray(logits)
    expected = [trainer.model([row["input_ids"]]).logits[0] for row in rows]
    for i, want in enumerate(expected):
        # 1e-5: the same products in batches of other sizes.
        np.testing.assert_allclose(whole[i, : len(want)], want, atol=1e-5)
        assert (whole[i, len(want) :] == -100).all() and (labels[i, len(want) :] == -100).all()
        np.testing.assert_array_equal(logits[i], whole[i])
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), whole.argmax(-1))
    np.testing.assert_array_equal(logits[:, 1:-1].argmax(-1), whole[:, 1:-1].argmax(-1))
    np.testing.assert_array_equal(logits[2:5], whole[2:5])
    np.testing.assert_array_equal(np.stack(list(logits)), whole)
    with pytest.raises(ConfigError, match="axis = 0"):
        logits.argmax(0)

    batched = make(
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda logits, labels: (logits.argmax(-1), logits.max(-1)),
        eval_dataset=rows,
    )
    batched.compute_metrics = lambda p: {"accuracy": float((p.predictions[0][:, :-1] == p.label_ids[:, 1:]).sum())}
    counted = batched.evaluate()
    assert counted["eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-12)
    known = (labels[:, 1:] != -100).sum()
    assert counted["eval_accuracy"] == pytest.approx(lazy["eval_accuracy"] * known)


def test_metrics_by_batch(make: Make) -> None:
    calls: list[tuple[int, bool]] = []

    def compute_metrics(prediction: Any, compute_result: bool) -> dict[str, float]:
        calls.append((len(prediction.label_ids), compute_result))
        return {"rows": sum(count for count, _ in calls)}

    trainer = make(compute_metrics=compute_metrics, batch_eval_metrics=True)
    assert trainer.evaluate()["eval_rows"] == 8
    assert calls == [(3, False), (3, False), (2, True)]
    with pytest.raises(ConfigError, match="compute_result"):
        make(compute_metrics=lambda prediction: {}, batch_eval_metrics=True)


def test_all_logits_at_once_are_refused_where_they_are_large(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_MOST_BYTES", 1000)
    trainer = make(compute_metrics=lambda prediction: {"sum": np.asarray(prediction.predictions).sum()})
    with pytest.raises(ConfigError, match="preprocess_logits_for_metrics"):
        trainer.evaluate()


@pytest.mark.parametrize(("answer", "message"), [(3, "returned int"), ({"bleu": "high"}, "bleu = 'high'")])
def test_metrics_that_are_no_numbers(make: Make, answer: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(compute_metrics=lambda prediction: answer).evaluate()


def test_predictions_of_other_rows(make: Make) -> None:
    heard: list[dict[str, float]] = []

    class Hear(TrainerCallback):
        def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            heard.append(kwargs["metrics"])

    trainer = make(callbacks=[Hear])
    rows = tiny.rows(count=5, seed=3)
    predictions, labels, metrics = trainer.predict(rows)
    assert predictions.shape == (5, 12, tiny.VOCAB) and labels.shape == (5, 12)
    assert metrics["test_loss"] == trainer.evaluate(rows)["eval_loss"] and heard == [metrics]
    assert trainer.evaluate(rows, metric_key_prefix="held_out")["held_out_loss"] == metrics["test_loss"]


class Use(TrainerCallback):
    """Uses the model whenever it may."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def _use(self, event: str, model: Model) -> None:
        made = model.generate([[1, 2, 3]], max_new_tokens=2, do_sample=False)
        assert len(made[0]) == 5 and np.isfinite(model([[1, 2, 3]]).logits).all()
        self.events.append(event)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._use("train_begin", kwargs["model"])

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._use("substep_end", kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._use("step_end", kwargs["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._use("evaluate", kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._use("save", kwargs["model"])


def test_callbacks_use_the_model_and_change_nothing(make: Make) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2, "save_strategy": "epoch"}
    plain = make(**settings)
    plain.train()
    use = Use()
    used = make(callbacks=[use], **settings)
    used.train()
    assert set(use.events) == {"train_begin", "substep_end", "step_end", "evaluate", "save"}
    for name, array in weights(plain.model).items():
        np.testing.assert_array_equal(array, weights(used.model)[name])


def test_a_callback_must_not_change_what_is_trained(make: Make, folder: Path) -> None:
    class Add(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["model"].native.add_adapter(json.dumps({"r": 2}))

    with pytest.raises(ConfigError, match="in use"):
        make(full=True, callbacks=[Add()], optim="adamw_torch", learning_rate=1e-4).train()


def test_embeddings_have_a_learning_rate_of_their_own(make: Make) -> None:
    trainer = make(full=True, embedding_learning_rate=0.0, learning_rate=1e-3, weight_decay=0.1, optim="adamw_torch")
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in before if "embed_tokens" not in name and "lm_head" not in name}
    with pytest.raises(ConfigError, match="neither embed_tokens nor lm_head is trained"):
        make(embedding_learning_rate=1e-5).train()


def test_norms_do_not_decay(make: Make) -> None:
    trainer = make(full=True, learning_rate=1e-2, weight_decay=10.0, optim="sgd", max_grad_norm=1e-9, max_steps=1)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    for name, array in before.items():
        # With gradients clipped to nothing only decay moves a weight: by a tenth.
        expected = array if "norm" in name else array * np.float32(0.9)
        np.testing.assert_allclose(after[name], expected, atol=1e-6)


def test_noise_on_embeddings_is_for_training_alone(make: Make) -> None:
    quiet, noisy = make(), make(neftune_noise_alpha=5)
    assert quiet.evaluate()["eval_loss"] == noisy.evaluate()["eval_loss"]
    assert noisy.args.neftune_noise_alpha == 5
    losses = [make(neftune_noise_alpha=alpha).train().training_loss for alpha in (None, 5, 5.0)]
    assert losses[0] != losses[1] == losses[2]


def test_checkpoints_are_uploaded_and_a_failing_hub_ends_nothing(make: Make) -> None:
    settings = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 2}

    def with_uploads(hub_strategy: str, fail: bool = False) -> list[str]:
        trainer = make(hub_strategy=hub_strategy, **settings)
        said: list[str] = []

        def push_to_hub(commit_message: str | None = "End of training", **options: Any) -> str:
            if fail and commit_message != "End of training":
                raise HubError("unreachable")
            said.append(str(commit_message))
            return "address"

        trainer.push_to_hub = push_to_hub  # type: ignore[method-assign]
        assert trainer.train().global_step == 4
        return said

    steps = ["Training in progress, step 2", "Training in progress, step 4"]
    assert with_uploads("every_save") == [*steps, "End of training"]
    assert with_uploads("end") == ["End of training"]
    with pytest.warns(UserWarning, match=r"step [24] was not uploaded: unreachable"):
        assert with_uploads("every_save", fail=True) == ["End of training"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_scheduler_type": "polinomial"}, "did you mean polynomial"),
        ({"lr_scheduler_kwargs": "power"}, "lr_scheduler_kwargs = 'power'"),
        ({"lr_scheduler_kwargs": {"power": 2}}, "linear takes nothing"),
        ({"lr_scheduler_kwargs": 3}, "lr_scheduler_kwargs = 3: expected a dict"),
        ({"optim": "sgd", "optim_args": "momentun=1"}, "sgd takes momentum"),
        ({"optim": "adamw_8bits"}, "did you mean adamw_8bit"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end = true: needs evaluations"),
        ({**BEST, "save_steps": 3, "eval_steps": 2}, "a multiple of eval_steps"),
        ({"save_strategy": "sometimes"}, "expected steps, epoch, best or no"),
        ({"eval_strategy": "best"}, "expected steps, epoch or no"),
        ({"eval_on_start": True}, "eval_on_start = true"),
        ({"eval_delay": -1}, "eval_delay = -1"),
        ({"neftune_noise_alpha": -5}, "neftune_noise_alpha = -5"),
        ({"greater_is_better": "yes"}, "greater_is_better = 'yes': expected True or False"),
        ({"metric_for_best_model": 3}, "metric_for_best_model = 3: expected a text"),
        ({"hub_strategy": "sometimes"}, "hub_strategy = 'sometimes': expected end, every_save"),
        ({"dataset_kwargs": {"skip": True}}, "dataset_kwargs has no such argument"),
        ({"dataset_kwargs": {"add_special_tokens": 3}}, "add_special_tokens = 3: expected True or False"),
        ({"truncation_mode": "keep_end"}, "truncation_mode = 'keep_end': not there yet"),
    ],
)
def test_settings_that_cannot_be_are_named(arguments: dict[str, Any], message: str) -> None:
    for kind in (SFTConfig, TrainingArguments):
        with pytest.raises(ConfigError, match=message):
            kind(**arguments)


def test_defaults_follow_transformers() -> None:
    arguments = TrainingArguments(eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True)
    assert (arguments.metric_for_best_model, arguments.greater_is_better, arguments.do_eval) == ("loss", False, True)
    plain = TrainingArguments()
    assert (plain.metric_for_best_model, plain.greater_is_better, plain.do_eval) == (None, None, False)
    # What was filled in can be given back.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = TrainingArguments(**{name: value for name, value in arguments.to_dict().items() if value is not None})
    assert again.metric_for_best_model == "loss"


def test_several_evaluation_datasets_have_names(make: Make) -> None:
    short, long = tiny.rows(count=4, seed=2), tiny.rows(count=5, length=20, seed=3)
    settings = {**BEST, "metric_for_best_model": "long_loss", "eval_dataset": {"short": short, "long": long}}
    trainer = make(max_steps=3, **settings)
    assert trainer.args.greater_is_better is False
    before = trainer.evaluate()
    alone = {name: make(eval_dataset=rows).evaluate()["eval_loss"] for name, rows in (("short", short), ("long", long))}
    assert {name: before[f"eval_{name}_loss"] for name in alone} == alone and "eval_loss" not in before
    assert trainer.evaluate("long")["eval_loss"] == alone["long"]
    assert trainer.evaluate({"a": short}, metric_key_prefix="test")["test_a_loss"] == alone["short"]
    trainer.train()
    scores = [entry for entry in trainer.state.log_history if "eval_long_loss" in entry and entry["step"] > 0]
    assert [entry["step"] for entry in scores] == [1, 2, 3] and all("eval_short_loss" in entry for entry in scores)
    assert trainer.state.best_metric == min(entry["eval_long_loss"] for entry in scores)
    assert trainer.evaluate()["eval_long_loss"] == trainer.state.best_metric
    stopping = make(callbacks=[EarlyStoppingCallback(1, 1e9)], **settings)
    assert stopping.train().global_step == 2
    with pytest.raises(ConfigError, match="metric_for_best_model = eval_loss: the evaluation gives eval_short_loss"):
        make(**{**settings, "metric_for_best_model": None}).train()


def test_one_dataset_of_several_is_named_in_errors(make: Make) -> None:
    with pytest.raises(RustuneError, match=r"eval_dataset\['bad'\].*row 0"):
        make(eval_dataset={"good": tiny.rows(count=2), "bad": [{"input_ids": ["x"]}]})


def test_columns_are_no_names_of_datasets(make: Make) -> None:
    rows = tiny.rows(count=4, seed=2)
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
    columns["source"] = [{"page": page} for page in range(len(rows))]
    assert make(eval_dataset=columns).evaluate()["eval_loss"] == make(eval_dataset=rows).evaluate()["eval_loss"]


def test_a_last_batch_that_is_not_full_is_left_out(make: Make) -> None:
    settings = {"per_device_train_batch_size": 5, "max_steps": -1, "num_train_epochs": 1}
    assert make(**settings).train().global_step == 5
    assert make(dataloader_drop_last=True, **settings).train().global_step == 4
    with pytest.raises(DataError, match="dataloader_drop_last"):
        make(dataloader_drop_last=True, per_device_train_batch_size=25).train()


def test_checkpoints_of_the_model_alone_can_be_loaded_and_not_resumed(make: Make) -> None:
    trainer = make(save_only_model=True, save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-4"
    assert not (checkpoint / "optimizer.safetensors").exists()
    loaded, _ = FastLanguageModel.from_pretrained(str(checkpoint), 64, dtype="float32", load_in_4bit=False)
    for name, array in weights(trainer.model).items():
        np.testing.assert_array_equal(array, weights(loaded)[name])
    with pytest.raises(CheckpointError, match="save_only_model"):
        make().train(resume_from_checkpoint=True)
