"""Every kind of wrong call that notebooks make, in one table: what is called, and what its error says."""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny

import rustune
from rustune import (
    ConfigError,
    DataError,
    EarlyStoppingCallback,
    FastLanguageModel,
    GenerationConfig,
    LoraConfig,
    Model,
    SFTConfig,
    SFTTrainer,
    TokenizerError,
    Trainer,
    TrainingArguments,
)

TEXT = [{"text": "one two"}]
TALK = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]


class Bench(NamedTuple):
    """What the calls are made with."""

    folder: str
    model: Model
    plain: Model
    tokenizer: Any
    trainer: SFTTrainer


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = str(tiny.write_model(tmp_path_factory.mktemp("llama"), llama_3=True))
    plain, tokenizer = FastLanguageModel.from_pretrained(folder, 64)
    model = FastLanguageModel.get_peft_model(FastLanguageModel.from_pretrained(folder, 64)[0], r=4)
    args = SFTConfig(output_dir=str(tmp_path_factory.mktemp("out")), disable_tqdm=True, save_strategy="no")
    return Bench(folder, model, plain, tokenizer, SFTTrainer(model, args, train_dataset=[{"messages": TALK}]))


def load(b: Bench, **arguments: Any) -> Any:
    return FastLanguageModel.from_pretrained(b.folder, **arguments)


def adapt(b: Bench, **arguments: Any) -> Any:
    return FastLanguageModel.get_peft_model(b.plain, **arguments)


def train(b: Bench, **arguments: Any) -> Any:
    return SFTTrainer(**{"model": b.model, "args": SFTConfig(max_steps=1), **arguments})


def only_answers(b: Bench, **arguments: Any) -> Any:
    return rustune.train_on_responses_only(b.trainer, **arguments)


def stream() -> Any:
    class Stream:
        column_names = ("text",)

        def take(self, n: int) -> list[dict[str, str]]:
            return TEXT[:n]

        def __iter__(self) -> Any:
            return iter(TEXT)

    return Stream()


Call = Callable[[Bench], Any]
LATER = "come in a later version|comes in a later version"
WRONG: list[tuple[str, Call, type[Exception], str]] = [
    # Loading.
    ("unknown argument", lambda b: load(b, load_in_4bits=True), ConfigError, "did you mean load_in_4bit"),
    ("no such folder or name", lambda b: FastLanguageModel.from_pretrained("./gone"), OSError, "gone"),
    ("no length", lambda b: load(b, max_seq_length=0), ConfigError, "max_seq_length = 0"),
    (
        "length as text",
        lambda b: load(b, max_seq_length="2048"),
        ConfigError,
        "max_seq_length = '2048': expected a whole number",
    ),
    ("dtype", lambda b: load(b, dtype="int4"), ConfigError, "dtype = int4: expected None"),
    ("two widths", lambda b: load(b, load_in_4bit=True, load_in_16bit=True), ConfigError, "load_in_4bit"),
    ("switch as text", lambda b: load(b, load_in_4bit="yes"), ConfigError, "load_in_4bit = 'yes': expected True or"),
    ("checkpointing", lambda b: load(b, use_gradient_checkpointing="all"), ConfigError, 'expected "unsloth", True or'),
    (
        "rope type",
        lambda b: load(b, rope_scaling={"type": "yarn", "factor": 2}),
        ConfigError,
        '"yarn" is not supported',
    ),
    ("rope key", lambda b: load(b, rope_scaling={"kind": "linear"}), ConfigError, 'unknown key "kind"'),
    ("rope factor", lambda b: load(b, rope_scaling={"type": "linear"}), ConfigError, 'lacks the number "factor"'),
    # Adapters.
    ("rank 0", lambda b: adapt(b, r=0), ConfigError, "r = 0: expected a whole number from 1"),
    ("rank below 0", lambda b: adapt(b, r=-4), ConfigError, "r = -4"),
    ("rank as fraction", lambda b: adapt(b, r=8.5), ConfigError, "r = 8.5"),
    ("rank as text", lambda b: adapt(b, r="16"), ConfigError, "r = '16'"),
    ("unknown target", lambda b: adapt(b, target_modules=["q_porj"]), ConfigError, "q_porj"),
    ("dropout", lambda b: adapt(b, lora_dropout=1.5), ConfigError, "lora_dropout = 1.5"),
    ("bias", lambda b: adapt(b, bias="all"), ConfigError, "bias = all"),
    ("layer", lambda b: adapt(b, layers_to_transform=[7]), ConfigError, "layers_to_transform"),
    ("pattern", lambda b: adapt(b, layers_pattern="blocks"), ConfigError, "layers_pattern = blocks"),
    ("initialisation", lambda b: adapt(b, init_lora_weights="zeros"), ConfigError, "init_lora_weights"),
    ("unknown setting", lambda b: adapt(b, lora_alfa=16), ConfigError, "did you mean lora_alpha"),
    (
        "other settings than the adapter's",
        lambda b: FastLanguageModel.get_peft_model(b.model, r=8),
        ConfigError,
        "r = 8: the model has an adapter with r = 4 already",
    ),
    ("no model", lambda b: FastLanguageModel.get_peft_model("llama"), ConfigError, "model = str"),
    ("LoraConfig", lambda b: LoraConfig(rank=8), ConfigError, "rank: LoraConfig has no such argument"),
    # Calling and generating.
    ("model(...)", lambda b: b.model([[1]], attention_masks=[[1]]), ConfigError, "did you mean attention_mask"),
    ("ids beyond the vocabulary", lambda b: b.model([[999]]).logits, DataError, "999"),
    ("ids that are none", lambda b: b.model([["a"]]), DataError, "input_ids: expected whole numbers"),
    ("no ids", lambda b: b.model.generate(), DataError, "input_ids: not given"),
    ("labels of another shape", lambda b: b.model([[1, 2]], labels=[[1]]), DataError, r"labels: expected the shape"),
    ("no label", lambda b: b.model([[1, 2]], labels=[[-100, -100]]), DataError, "labels: no token counts"),
    ("generate", lambda b: b.model.generate([[1]], max_tokens=3), ConfigError, "did you mean max_new_tokens"),
    ("no new token", lambda b: b.model.generate([[1]], max_new_tokens=0), ConfigError, "max_new_tokens = 0"),
    ("beams", lambda b: b.model.generate([[1]], num_beams=4), ConfigError, "num_beams = 4: not there yet"),
    ("temperature", lambda b: b.model.generate([[1]], temperature=-1), ConfigError, "temperature = -1"),
    ("top_p", lambda b: b.model.generate([[1]], top_p=2), ConfigError, "top_p = 2"),
    (
        "no streamer",
        lambda b: b.model.generate([[1]], streamer=1),
        ConfigError,
        "streamer = 1: expected an object with",
    ),
    (
        "one streamer for two",
        lambda b: b.model.generate([[1], [2]], streamer=rustune.TextStreamer(b.tokenizer)),
        ConfigError,
        "streamer: expected one sequence, got 2",
    ),
    ("criteria", lambda b: b.model.generate([[1]], stopping_criteria=3), ConfigError, "stopping_criteria = 3"),
    ("GenerationConfig", lambda b: GenerationConfig(temperatures=1), ConfigError, "did you mean temperature"),
    # Tokenizers and templates.
    ("tokenizer(...)", lambda b: b.tokenizer("a", max_len=3), ConfigError, "did you mean max_length"),
    ("no text", lambda b: b.tokenizer(None), DataError, "tokenizer: expected a text"),
    (
        "half a surrogate pair",
        lambda b: b.tokenizer(["a", "\ud800"]),
        DataError,
        "item 1 holds half of a surrogate pair",
    ),
    ("half a name", lambda b: FastLanguageModel.from_pretrained("\ud800"), ConfigError, "model_name = "),
    ("half a folder", lambda b: SFTConfig(output_dir="\ud800"), ConfigError, "output_dir = .*half of a surrogate pair"),
    (
        "half a message",
        lambda b: b.tokenizer.apply_chat_template([{"role": "\ud800"}]),
        DataError,
        "messages: a text with",
    ),
    ("numbers for texts", lambda b: b.tokenizer([1, 2]), DataError, "item 0 is int"),
    ("tensors", lambda b: b.tokenizer("a", return_tensors="tf"), ConfigError, "return_tensors = 'tf'"),
    ("ragged", lambda b: b.tokenizer(["a", "bc"], return_tensors="np"), DataError, "use padding=True"),
    ("side", lambda b: b.tokenizer(["a"], padding=True, padding_side="top"), ConfigError, "padding_side = 'top'"),
    ("decode", lambda b: b.tokenizer.decode("ab"), DataError, "decode: expected ids"),
    ("no conversation", lambda b: b.tokenizer.apply_chat_template("hi"), DataError, "conversation: expected a list of"),
    ("no message", lambda b: b.tokenizer.apply_chat_template([TALK[0], 3]), DataError, "message 1: expected a dict"),
    (
        "bad Jinja",
        lambda b: b.tokenizer.apply_chat_template(TALK, chat_template="{% if %}"),
        TokenizerError,
        "template",
    ),
    (
        "template's name",
        lambda b: rustune.get_chat_template(b.tokenizer, "lama-3"),
        ConfigError,
        "did you mean 'llama-3'",
    ),
    ("mapping", lambda b: rustune.get_chat_template(b.tokenizer, mapping=[1]), ConfigError, r"mapping = \[1\]"),
    (
        "unknown role",
        lambda b: rustune.standardize_sharegpt([{"conversations": [{"from": "wizard", "value": "x"}]}]),
        DataError,
        "wizard",
    ),
    ("no conversations", lambda b: rustune.standardize_sharegpt(TEXT), DataError, "conversations"),
    ("no column", lambda b: rustune.to_sharegpt(TEXT, merged_prompt="{question}"), DataError, "question"),
    ("brackets", lambda b: rustune.to_sharegpt(TEXT, merged_prompt="[[{text}"), ConfigError, "merged_prompt"),
    ("extension", lambda b: rustune.to_sharegpt(TEXT, conversation_extension=0), ConfigError, "conversation_extension"),
    # The trainer, its data and its settings.
    ("unknown argument", lambda b: train(b, train_datset=TEXT), ConfigError, "did you mean train_dataset"),
    ("no model", lambda b: train(b, model=None), ConfigError, "model = NoneType"),
    ("Trainer", lambda b: Trainer(b.model, train_datset=TEXT), ConfigError, "did you mean train_dataset"),
    ("unknown column", lambda b: train(b, train_dataset=[{"texts": "x"}]), DataError, 'did you mean "texts"'),
    ("not a dataset", lambda b: train(b, train_dataset=3), DataError, "dataset: expected a list of dicts"),
    ("no such file", lambda b: train(b, train_dataset="gone.jsonl"), FileNotFoundError, "gone.jsonl"),
    ("rows that are none", lambda b: train(b, train_dataset=[1]), DataError, "row 0: expected a dict of columns"),
    ("a number as text", lambda b: train(b, train_dataset=[{"text": 3}]), DataError, "row 0"),
    ("no rows", lambda b: train(b, train_dataset=[]), DataError, "no rows"),
    ("nothing but blanks", lambda b: train(b, train_dataset=[{"text": " "}]), DataError, "1 are empty"),
    ("a stream without an end", lambda b: train(b, args=SFTConfig(), train_dataset=stream()), ConfigError, "max_steps"),
    ("formatting_func", lambda b: train(b, train_dataset=TEXT, formatting_func=3), DataError, "formatting_func = 3"),
    (
        "what formatting_func gives",
        lambda b: train(b, train_dataset=TEXT, formatting_func=lambda row: 5),
        DataError,
        "formatting_func: expected a text for each row, got int",
    ),
    ("collator", lambda b: train(b, data_collator=queue.Queue), ConfigError, "data_collator = Queue"),
    ("callback", lambda b: train(b, callbacks=[3]), ConfigError, r"callbacks: int has no method on_"),
    ("metrics", lambda b: train(b, compute_metrics=3), ConfigError, "compute_metrics = 3: expected a function"),
    ("loss", lambda b: train(b, compute_loss_func=max), ConfigError, "compute_loss_func: not there yet"),
    ("optimizers", lambda b: train(b, optimizers=(1, None)), ConfigError, "optimizers: not there yet"),
    ("nothing to train on", lambda b: train(b).train(), DataError, "train_dataset: not given"),
    ("nothing to evaluate on", lambda b: train(b, train_dataset=TEXT).evaluate(), DataError, "eval_dataset: not given"),
    ("nothing to train", lambda b: train(b, model=b.plain, train_dataset=TEXT).train(), ConfigError, "get_peft_model"),
    ("no checkpoint", lambda b: train(b, train_dataset=TEXT).train("gone"), Exception, "gone"),
    ("search", lambda b: b.trainer.hyperparameter_search(), ConfigError, "model_init="),
    ("markers", lambda b: only_answers(b, instruction_part="<|user|>"), ConfigError, "response_part"),
    (
        "a marker that is nowhere",
        lambda b: only_answers(b, instruction_part="<|user|>", response_part="<|asistant|>"),
        DataError,
        r"(?s)<\|asistant\|>.*<\|assistant\|>",
    ),
    ("patience", lambda b: EarlyStoppingCallback(0), ConfigError, "early_stopping_patience = 0"),
    *[
        (f"{kind.__name__}({', '.join(settings)})", lambda b, k=kind, s=settings: k(**s), ConfigError, message)
        for kind in (SFTConfig, TrainingArguments)
        for settings, message in (
            ({"learning_rat": 1}, "did you mean learning_rate"),
            ({"learning_rate": "2e-4"}, "learning_rate = '2e-4': expected a number"),
            ({"learning_rate": -1}, "learning_rate = -1"),
            ({"per_device_train_batch_size": 0}, "per_device_train_batch_size = 0"),
            ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps = 1.5"),
            ({"num_train_epochs": 0}, "num_train_epochs = 0"),
            ({"warmup_ratio": 2}, "warmup_ratio = 2"),
            ({"weight_decay": float("nan")}, "weight_decay = nan"),
            ({"adam_beta1": 1.0}, "adam_beta1 = 1"),
            ({"lr_scheduler_type": "cosin"}, "did you mean cosine"),
            ({"optim": "adamw_8bits"}, "did you mean adamw_8bit"),
            ({"report_to": "wandbb"}, "did you mean wandb"),
            ({"save_strategy": "sometimes"}, "save_strategy = sometimes"),
            ({"eval_strategy": "sometimes"}, "eval_strategy = sometimes"),
            ({"load_best_model_at_end": True}, "needs evaluations"),
            ({"fp16": True, "bf16": True}, "fp16 = True: contradicts bf16"),
            ({"seed": -1}, "seed"),
            ({"packing": "yes"}, "packing = 'yes': expected True or False"),
            ({"hub_strategy": "often"}, "hub_strategy = 'often'"),
            ({"label_smoothing_factor": 0.1}, "label_smoothing_factor = 0.1: not there yet"),
        )
    ],
    # Saving.
    ("nothing to save", lambda b: b.plain.save_pretrained("x"), ConfigError, "nothing to save"),
    ("save_pretrained", lambda b: b.model.save_pretrained("x", save_dir=1), ConfigError, "did you mean save_directory"),
    *[
        (
            f"save_method = {method}",
            lambda b, m=method: b.model.save_pretrained_merged("x", save_method=m),
            ConfigError,
            LATER,
        )
        for method in ("merged_16bit", "merged_4bit", "merged_4bit_forced", "MERGED_16BIT")
    ],
    ("merged, no method named", lambda b: b.model.save_pretrained_merged("x", b.tokenizer), ConfigError, LATER),
    (
        "save_method",
        lambda b: b.model.save_pretrained_merged("x", save_method="mergd"),
        ConfigError,
        "save_method = 'mergd'",
    ),
    ("hub, merged", lambda b: b.model.push_to_hub_merged("me/x", b.tokenizer), ConfigError, LATER),
    ("GGUF", lambda b: b.model.save_pretrained_gguf("x", b.tokenizer, "q4_k_m"), ConfigError, LATER),
    ("hub, GGUF", lambda b: b.model.push_to_hub_gguf("me/x", b.tokenizer), ConfigError, LATER),
    ("merging", lambda b: b.model.merge_and_unload(), ConfigError, LATER),
    *[
        (name, lambda b, n=name: getattr(rustune, n)(b.model), ConfigError, f"{name}: not there yet")
        for name in ("DPOTrainer", "DPOConfig", "ORPOTrainer", "ORPOConfig")
    ],
]


@pytest.mark.parametrize(("call", "kind", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_wrong_call_has_a_clear_error(
    bench: Bench, call: Call, kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(kind, match=message) as caught:
        call(bench)
    text = str(caught.value)
    # One line that can be read, and nothing half-done left behind.
    assert "\n" not in text.strip() or "nearest" in text, text
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_as_it_was_after_all_that(bench: Bench) -> None:
    assert bench.model.peft_config["default"]["r"] == 4 and bench.plain.adapter is None
    assert np.isfinite(bench.model([[1, 2, 3]]).logits).all()
