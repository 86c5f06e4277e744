"""Training data as notebooks bring it: streams, tables, formatting functions, others' tokenizers, forks, long rows."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from strategies import CELLS, TURNS
from test_tokenizer import make_tokenizer

from rustune import (
    ConfigError,
    DataError,
    FastLanguageModel,
    Model,
    RustuneError,
    SFTConfig,
    SFTTrainer,
    Tokenizer,
    _native,
    train_on_responses_only,
)
from rustune.data import formatted, is_streamed, iter_columns

TEXTS = [f"row {i} says {i * i}" for i in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    model, _ = FastLanguageModel.from_pretrained(str(folder), 64, dtype="float32", load_in_4bit=False)
    return FastLanguageModel.get_peft_model(model, r=4)


def settings(tmp_path: Path, **changes: Any) -> SFTConfig:
    common: dict[str, Any] = {"output_dir": str(tmp_path / "out"), "save_strategy": "no", "disable_tqdm": True}
    steps = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    return SFTConfig(**{**common, **steps, **changes})


def texts_of(trainer: SFTTrainer) -> list[str]:
    assert trainer.train_dataset is not None
    return [trainer.tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in trainer.train_dataset]


def test_a_stream_is_read_as_far_as_needed_and_keeps_its_order(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    read: list[int] = []

    def endless() -> Iterator[dict[str, str]]:
        i = 0
        while True:
            read.append(i)
            yield {"text": f"row {i}"}
            i += 1

    stream = datasets.IterableDataset.from_generator(endless)
    trainer = SFTTrainer(model, settings(tmp_path, disable_tqdm=False), train_dataset=stream)
    # 3 steps of 2 x 2 rows; datasets itself looks one ahead.
    assert texts_of(trainer) == [f"row {i}" for i in range(12)]
    assert len(read) <= 13
    trainer.train()
    assert len(read) <= 13
    assert json.loads(trainer._engine_options())["train_sampling_strategy"] == "sequential"
    shown = capsys.readouterr()
    assert "streamed: 12 rows were read" in shown.out + shown.err
    with pytest.raises(ConfigError, match=r"max_steps.*no length"):
        SFTTrainer(model, settings(tmp_path, max_steps=-1), train_dataset=stream)


def test_rows_in_their_own_order_give_other_losses_than_shuffled_ones(folder: Path, tmp_path: Path) -> None:
    def losses(order: str | None) -> list[float]:
        fresh, _ = FastLanguageModel.from_pretrained(str(folder), 64, dtype="float32", load_in_4bit=False)
        fresh = FastLanguageModel.get_peft_model(fresh, r=4)
        args = settings(tmp_path, max_steps=10, learning_rate=1e-9, train_sampling_strategy=order)
        args.gradient_accumulation_steps = 1
        trainer = SFTTrainer(
            fresh, args, train_dataset=[{"text": text * (i % 5 + 1)} for i, text in enumerate(TEXTS[:20])]
        )
        trainer.train()
        one_by_one = [fresh([row["input_ids"]], labels=[row["labels"]]).loss for row in trainer.train_dataset or []]
        means = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights = [len(row["input_ids"]) - 1 for row in trainer.train_dataset or []]
        in_order = [
            sum(one_by_one[k] * weights[k] for k in (i, i + 1)) / sum(weights[k] for k in (i, i + 1))  # type: ignore[operator]
            for i in range(0, 20, 2)
        ]
        return [abs(a - b) for a, b in zip(means, in_order, strict=True)]

    assert max(losses("sequential")) < 1e-4  # f32 sums of other lengths; the learning rate moves nothing
    assert max(losses(None)) > 1e-3
    with pytest.raises(ConfigError, match="sequential"):
        settings(tmp_path, train_sampling_strategy="backwards")


def test_every_form_gives_the_same_rows(model: Model, tmp_path: Path) -> None:
    datasets, pandas, pyarrow = (pytest.importorskip(name) for name in ("datasets", "pandas", "pyarrow"))
    from pyarrow import dataset as arrow_dataset
    from pyarrow import parquet

    rows = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    whole = datasets.Dataset.from_list(rows)
    forms: dict[str, Any] = {
        "list": rows,
        "generator": (row for row in rows),
        "columns": {"text": TEXTS},
        "datasets": whole,
        "datasets, numpy": whole.with_format("numpy"),
        "selected": datasets.concatenate_datasets([whole, whole]).select(range(40)),
        "pandas": pandas.DataFrame(rows),
        "pyarrow table": table,
        "pyarrow batch": table.to_batches()[0],
        "pyarrow dataset": arrow_dataset.dataset(tmp_path / "rows.parquet"),
        "jsonl": tmp_path / "rows.jsonl",
        "parquet": str(tmp_path / "rows.parquet"),
    }
    for form, dataset in forms.items():
        assert texts_of(SFTTrainer(model, settings(tmp_path), train_dataset=dataset)) == TEXTS, form
        assert not is_streamed(dataset), form
    with pytest.warns(UserWarning, match="2 without text"):
        missing = pandas.DataFrame({"text": pandas.array(["a b", None, float("nan")], dtype="object")})
        assert texts_of(SFTTrainer(model, settings(tmp_path), train_dataset=missing)) == ["a b"]


def test_datasets_are_read_by_batches(model: Model, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    class Counted(datasets.Dataset):  # type: ignore[misc, name-defined]
        def __getitem__(self, key: Any) -> Any:
            raise AssertionError(f"row by row: {key}")

    whole = datasets.Dataset.from_list([{"text": text} for text in TEXTS * 60])
    whole.__class__ = Counted
    assert [len(batch["text"]) for batch in iter_columns(whole)] == [1000, 1000, 400]


@pytest.mark.parametrize(
    "function",
    [
        lambda row: "Q: " + row["q"],
        lambda row: ["Q: " + row["q"]],
        lambda batch: ["Q: " + q for q in batch["q"]],
        lambda batch: {"text": ["Q: " + q for q in batch["q"]]},
        lambda row: {"text": "Q: " + row["q"]},
    ],
)
def test_formatting_functions_of_rows_and_batches(function: Callable[[Any], Any]) -> None:
    for n_rows in (1, 2, 3, 7):
        columns = {"q": [str(i) for i in range(n_rows)]}
        assert list(formatted([columns, {"q": []}], function)) == [{"text": [f"Q: {i}" for i in range(n_rows)]}]


def test_a_formatting_function_may_make_two_rows_of_one() -> None:
    made = list(formatted([{"q": ["a", "b"]}], lambda row: [f"1 {row['q']}", f"2 {row['q']}"]))
    assert made == [{"text": ["1 a", "2 a", "1 b", "2 b"]}]
    for wrong in (lambda row: 3, lambda row: [None], lambda row: {"other": "x"}):
        with pytest.raises(DataError, match="formatting_func: expected a text"):
            list(formatted([{"q": ["a", "b"]}], wrong))
    with pytest.raises(DataError, match="expected a function"):
        list(formatted([{"q": ["a"]}], "text"))  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_tokenizer_maps_in_processes_after_a_training_step(model: Model, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from datasets.fingerprint import Hasher

    rows = [{"text": text} for text in TEXTS]
    trainer = SFTTrainer(model, settings(tmp_path, max_steps=1), train_dataset=rows)
    trainer.train()
    tokenizer = trainer.tokenizer

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        return dict(tokenizer(batch["text"], truncation=True, max_length=16))

    whole = datasets.Dataset.from_list(rows)
    alone = whole.map(encode, batched=True)
    together = whole.map(encode, batched=True, num_proc=2)
    assert alone["input_ids"] == together["input_ids"] == tokenizer(TEXTS, truncation=True, max_length=16).input_ids
    # The hash `datasets` caches by is that of the contents, and using the tokenizer does not change it.
    before = Hasher.hash(tokenizer)
    tokenizer("more text")
    assert before == Hasher.hash(tokenizer) == Hasher.hash(pickle.loads(pickle.dumps(tokenizer)))
    assert Hasher.hash(encode) == Hasher.hash(encode)


class TheirTokenizer:
    """What transformers' tokenizers offer of which we make use."""

    def __init__(self, own: Tokenizer) -> None:
        self.own = own

    def __getattr__(self, name: str) -> Any:
        if name in ("native", "content_hash"):
            raise AttributeError(name)
        return getattr(self.own, name)

    def save_pretrained(self, folder: str) -> None:
        self.own.save_pretrained(folder)


def test_a_tokenizer_of_transformers_is_taken(model: Model, tmp_path: Path) -> None:
    own = model.tokenizer
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}] * 4
    theirs = SFTTrainer(model, settings(tmp_path), tokenizer=TheirTokenizer(own), train_dataset=rows).train_dataset
    ours = SFTTrainer(model, settings(tmp_path), train_dataset=rows).train_dataset
    assert theirs is not None and ours is not None and theirs[0] == ours[0]
    with pytest.raises(ConfigError, match="tokenizer = int"):
        SFTTrainer(model, settings(tmp_path), tokenizer=3, train_dataset=rows)


def test_wrong_calls_are_named(model: Model, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}] * 4
    trainer = SFTTrainer(model, settings(tmp_path), train_dataset=rows)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"instruction_prt": "x"}, "instruction_prt.*did you mean instruction_part"),
        ({"return_function": True}, "return_function"),
        ({"instruction_part": "<|user|>"}, "both"),
        ({"instruction_part": "<|user|>", "response_part": ""}, "response_part"),
        ({"instruction_part": "<|user|>", "response_part": "<|asistant|>"}, r"asistant.*nearest.*<\|assistant\|>"),
    ]
    for arguments, message in wrong:
        with pytest.raises((ConfigError, DataError), match=message):
            train_on_responses_only(trainer, **arguments)
    with pytest.raises(ConfigError, match="trainer = Model"):
        train_on_responses_only(model)  # type: ignore[arg-type]
    for dataset, message in (
        (3, "expected a list of dicts.*got int"),
        ([], "no rows"),
        (["text"], "row 0"),
        ([{"txt": "x"}], "did you mean"),
        ([{"messages": "x"}], "expected a list of messages, got a text"),
        ([{"messages": [{"role": "wizard", "content": "x"}]}], "wizard"),
        ([{"prompt": "x", "completion": ["y"]}], "two texts or two lists"),
        ([{"input_ids": [1, 2], "labels": [1]}], "expected 2 numbers"),
        ({"train": type("Split", (), {"column_names": []})()}, "has the splits train"),
        (tmp_path / "rows.csv", "No such dataset file"),
    ):
        with pytest.raises((DataError, FileNotFoundError), match=message):
            SFTTrainer(model, settings(tmp_path), train_dataset=dataset)
    with pytest.raises(ConfigError, match="assistant_only_loss"):
        SFTTrainer(model, settings(tmp_path, assistant_only_loss=True), train_dataset=[{"text": "x y"}])
    with pytest.raises(ConfigError, match="completion_only_loss"):
        SFTTrainer(model, settings(tmp_path, completion_only_loss=True), train_dataset=rows)


def test_bos_is_never_there_twice(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "made", bos_token="<s>", eos_token="</s>")
    rows = _native.Rows.read(tokenizer.native, "{}", [{"text": ["<s>abc", "abc", "<s><s>abc"]}])
    starts = [[i == tokenizer.bos_token_id for i in rows[k]["input_ids"][:3]] for k in range(3)]
    assert starts == [[True, False, False], [True, False, False], [True, True, False]]  # the third is as written


def test_rows_that_are_cut_are_told_with_their_share(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "x" * (20 if i % 4 else 3)} for i in range(8)]
    args = settings(tmp_path, max_steps=1, disable_tqdm=False)
    trainer = SFTTrainer(model, args, train_dataset=rows, max_seq_length=10)
    assert trainer.train_dataset is not None and trainer.train_dataset.report["cut"] == 6
    trainer.train()
    shown = capsys.readouterr()
    assert "75.0 %" in shown.out + shown.err


def test_longer_rows_than_the_model_was_made_for(folder: Path, tmp_path: Path) -> None:
    def load(path: Path, length: int) -> tuple[Model, list[str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded, _ = FastLanguageModel.from_pretrained(str(path), length, dtype="float32", load_in_4bit=False)
        return loaded, [str(w.message) for w in caught if "max_seq_length" in str(w.message)]

    plain, told = load(folder, 256)
    assert told == []
    longer, told = load(folder, 1024)
    assert len(told) == 1 and "made for 256 tokens" in told[0] and "divided by 4" in told[0]
    assert longer.native.max_position_embeddings == 1024
    # The same as a config that asks for linear scaling itself.
    scaling = {"type": "linear", "factor": 4.0}
    scaled, told = load(tiny.write_model(tmp_path / "scaled", rope_scaling=scaling, max_position_embeddings=1024), 1024)
    assert told == []
    ids = [[65, 66, 67, 68, 69]]
    assert (longer(ids).logits == scaled(ids).logits).all()
    assert not (longer(ids).logits == plain(ids).logits).all()
    assert longer.config.rope_scaling["factor"] == 4.0


COLUMNS = st.sampled_from(
    ["text", "input_ids", "labels", "attention_mask", "messages", "prompt", "completion", "instruction", "output", "x"]
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "text_field": st.sampled_from(["text", "x", ""]),
        "max_length": st.integers(0, 5) | st.none(),
        "max_rows": st.integers(0, 3) | st.none(),
        "completion_only_loss": st.booleans() | st.none(),
        "assistant_only_loss": st.booleans(),
    },
)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("kept"), eos_token="<|im_end|>", bos_token="<s>")


@given(rows=st.lists(st.dictionaries(COLUMNS, CELLS, max_size=4), max_size=4), options=OPTIONS)
def test_any_rows_are_read_or_refused(kept: Tokenizer, rows: list[dict[str, Any]], options: dict[str, Any]) -> None:
    try:
        made = _native.Rows.read(kept.native, json.dumps(options), iter_columns(rows, 2))
    except RustuneError:
        return
    limit = options.get("max_length")
    for i in range(len(made)):
        row = made[i]
        assert len(row["input_ids"]) == len(row["labels"]) <= (limit or 10**6)
        assert all(label in (-100, token) or "labels" in rows[0] for token, label in zip(*row.values(), strict=True))
        assert any(label != -100 for label in row["labels"][1:])


IDS = st.lists(st.integers(-1, 300), max_size=4) | CELLS
TALKS = st.lists(TURNS, max_size=4) | CELLS
FORMATS = st.one_of(
    st.fixed_dictionaries({"text": st.text(max_size=8) | CELLS}),
    st.fixed_dictionaries({"messages": TALKS}, optional={"tools": CELLS}),
    st.fixed_dictionaries({"conversations": TALKS}),
    st.fixed_dictionaries({"prompt": st.text(max_size=8) | TALKS, "completion": st.text(max_size=8) | TALKS}),
    st.fixed_dictionaries({"instruction": CELLS, "output": CELLS}, optional={"input": CELLS}),
    st.fixed_dictionaries({"input_ids": IDS}, optional={"labels": IDS, "attention_mask": IDS, "assistant_masks": IDS}),
)


@given(rows=st.lists(FORMATS, min_size=1, max_size=3), options=OPTIONS)
def test_rows_of_any_format_are_read_or_refused(
    kept: Tokenizer, rows: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    try:
        made = _native.Rows.read(kept.native, json.dumps(options), iter_columns(rows, 2))
    except RustuneError:
        return
    assert 0 < len(made) <= len(rows) and made.n_trained > 0


@given(other=CELLS)
def test_a_column_nobody_reads_may_hold_anything(kept: Tokenizer, other: Any) -> None:
    assert len(_native.Rows.read(kept.native, "{}", iter_columns([{"text": "ab", "other": other}]))) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a\ud800"}, 'row 1: column "text": a text with half of a surrogate pair'),
        ({"text": b"a"}, 'row 1: column "text": expected text, numbers, lists and dicts, got bytes'),
        ({"input_ids": [10**30, 1]}, 'row 1: column "input_ids": expected a list of whole numbers, got a number'),
        ({"input_ids": [10**400, 1]}, 'row 1: column "input_ids": a whole number that is too large'),
        ({"messages": [{"role": "user", "content": object()}]}, 'row 1: column "messages": expected text, numbers'),
    ],
)
def test_what_no_row_can_hold_is_named(kept: Tokenizer, row: dict[str, Any], message: str) -> None:
    good = {"text": "a", "input_ids": [1, 2], "messages": [{"role": "user", "content": "a"}]}
    rows = [{name: good[name] for name in row}, row]
    with pytest.raises(DataError) as caught:
        _native.Rows.read(kept.native, "{}", iter_columns(rows))
    assert message in str(caught.value)


@given(
    ids=st.recursive(st.integers(-3, 300), lambda inner: st.lists(inner, max_size=3)),
    text=st.text(max_size=10) | st.lists(st.text(max_size=5) | st.none(), max_size=3) | st.integers() | st.none(),
    padding=st.sampled_from([True, False, "longest", "max_length", "x"]),
    length=st.integers(0, 6) | st.none(),
    tensors=st.sampled_from([None, "np", "pt", "tf"]),
)
def test_any_call_of_the_tokenizer_works_or_is_refused(
    kept: Tokenizer, ids: Any, text: Any, padding: Any, length: int | None, tensors: str | None
) -> None:
    try:
        batch = kept(text, padding=padding, truncation=length is not None, max_length=length, return_tensors=tensors)
        rows = [batch.input_ids] if isinstance(text, str) and tensors is None else list(batch.input_ids)
        assert length is None or padding == "max_length" or all(len(row) <= length for row in rows)
    except RustuneError:
        pass
    try:
        assert isinstance(kept.decode(ids), (str, list))
    except DataError:
        assert isinstance(ids, list)
