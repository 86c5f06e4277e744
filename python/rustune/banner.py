"""What is said before a run: how much there is to do, what it needs, and one sample with its trained tokens marked."""

from __future__ import annotations

import html
import json
from typing import Any, Final

from rustune import _native, marking

# Longest stretch of a sample that is shown whole, in characters.
_LONG_UNTRAINED: Final = 300
_LONG_TRAINED: Final = 600
# Pieces, where a conversation goes on and on.
_LONGEST_SAMPLE: Final = 20

_GREEN: Final = "background:#c8f0cf;color:#0b3d16;border-radius:3px"


def gib(n_bytes: float) -> str:
    """Writes an amount of memory.

    Args:
        n_bytes: Bytes.

    Returns:
        `1.9 GiB`, or `12 MiB` below a quarter of one.
    """
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**28 else f"{n_bytes / 2**20:.0f} MiB"


def texts(trainer: Any, plan: dict[str, int]) -> tuple[str, str]:
    """Says what a trainer is about to do.

    Args:
        trainer: An `SFTTrainer` with a training dataset.
        plan: `total_steps` and `epochs`.

    Returns:
        Lines of text, and the same as HTML.
    """
    facts = _facts(trainer, plan)
    width = max(len(name) for name, _ in facts)
    lines = [f"  {name:<{width}}  {said}" for name, said in facts]
    sample = sample_pieces(trainer)
    machine = json.loads(_native.info())
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    title = f"rustune {machine['version']}: {machine['isa']}, {threads}"
    text = "\n".join([title, *lines])
    rows = "".join(
        f"<tr><td style='text-align:left;color:#667;padding:1px 12px 1px 0'>{html.escape(name)}</td>"
        f"<td style='text-align:left;padding:1px 0'>{html.escape(said)}</td></tr>"
        for name, said in facts
    )
    page = f"<div><b>{html.escape(title)}</b></div><table style='border-collapse:collapse;margin:4px 0'>{rows}</table>"
    if sample:
        marked = "".join(f"«{piece}»" if trained else piece for piece, trained in sample)
        text += f"\n  a sample, what is trained on between « and »:\n{_indented(marked)}"
        coloured = "".join(
            f"<span style='{_GREEN}'>{html.escape(piece)}</span>" if trained else html.escape(piece)
            for piece, trained in sample
        )
        page += (
            f"<details open><summary>a sample, <span style='{_GREEN}'>what is trained on</span> in green</summary>"
            "<pre style='white-space:pre-wrap;overflow-wrap:anywhere;max-height:16em;overflow-y:auto;margin:4px 0'>"
            f"{coloured}</pre></details>"
        )
    return text, page


def sample_pieces(trainer: Any) -> list[tuple[str, bool]]:
    """Renders the first row that can be shown.

    Args:
        trainer: An `SFTTrainer`.

    Returns:
        Pieces of its text, and whether they are trained on; empty if there is no tokenizer.
    """
    tokenizer, dataset = trainer.processing_class, trainer.train_dataset
    if tokenizer is None or not len(dataset):
        return []
    row = dataset[0]
    pieces = [
        (_shortened(part.text, _LONG_TRAINED if part.trained else _LONG_UNTRAINED), part.trained)
        for part in marking.parts_of(tokenizer, row["input_ids"], row["labels"])
    ]
    if len(pieces) > _LONGEST_SAMPLE:
        pieces = [*pieces[:_LONGEST_SAMPLE], (" … ", False)]
    return pieces


def memory(trainer: Any) -> dict[str, Any]:
    """Estimates the memory of a trainer's run.

    Args:
        trainer: An `SFTTrainer` with a training dataset.

    Returns:
        `peak`, `available` and `fits`, and in `estimate` the bytes by what they are for.
    """
    made: dict[str, Any] = json.loads(
        trainer.model.native.training_memory(
            trainer.train_dataset.rows, trainer._engine_options(), trainer._checkpointing()
        )
    )
    return made


def memory_lines(forecast: dict[str, Any]) -> list[tuple[str, str]]:
    """Says what a run takes of the memory there is.

    Args:
        forecast: What `memory` returns.

    Returns:
        Names and what is to be said of them.
    """
    parts = forecast["estimate"]
    kept, in_part, again = parts["layers"]
    total = sum(parts[name] for name in ("model", "optimizer", "gradients", "kept", "workspace"))
    said = f"about {gib(forecast['peak'] or total)} at most"
    if forecast["available"] is not None:
        said += f", {gib(forecast['available'])} are free"
    if forecast["fits"] is False:
        said += ": NOT ENOUGH; take smaller batches or shorter rows"
    of_what = (
        f"model {gib(parts['model'])}, optimizer and gradients {gib(parts['optimizer'] + parts['gradients'])},"
        f" activations {gib(parts['kept'] + parts['workspace'])} for {parts['n_tokens']:,} tokens"
    )
    layers = f"{kept} of {kept + in_part + again} layers kept for the backward, {in_part} in part, {again} recomputed"
    return [("memory", said), ("", of_what), ("", layers)]


def _facts(trainer: Any, plan: dict[str, int]) -> list[tuple[str, str]]:
    """Names and what is to be said of them."""
    model, args, dataset = trainer.model, trainer.args, trainer.train_dataset
    trained, total = model.get_nb_trainable_parameters()
    batch, accumulation = args.train_batch_size, int(args.gradient_accumulation_steps)
    rows = dataset.rows
    epochs = f"{plan['epochs']:,} epoch{'s' if plan['epochs'] != 1 else ''}"
    cut, read = dataset.report.get("cut", 0), max(dataset.report.get("rows", 0), 1)
    length = f"longest row {rows.longest:,} tokens"
    if cut:
        length += (
            f"; {100 * cut / read:.1f} % of the rows are cut after {trainer.max_seq_length:,} tokens,"
            f" {dataset.report.get('tokens_lost', 0):,} tokens lost"
        )
    else:
        length += f", none cut (limit {trainer.max_seq_length:,})"
    packed = f", packed to {rows.n_packed(trainer.max_seq_length):,} rows" if args.packing else ""
    streamed = ""
    if getattr(trainer, "_keeps_order", False):
        streamed = (
            f"streamed: {dataset.report.get('rows', 0):,} rows were read when the trainer was made, as many as all"
            " steps need; they are trained in their own order"
        )
    return [
        ("examples", f"{len(dataset):,}{packed}: {rows.n_tokens:,} tokens, {rows.n_trained:,} of them trained on"),
        *([("", streamed)] if streamed else []),
        ("lengths", length),
        (
            "steps",
            f"{plan['total_steps']:,}, {epochs}: batch {batch} x {accumulation} accumulation"
            f" = {batch * accumulation} rows a step",
        ),
        ("parameters", f"{trained:,} of {total:,} trained ({100 * trained / max(total, 1):.2f} %)"),
        ("optimizer", f"{args.optim}, learning rate {args.learning_rate:g}, {args.lr_scheduler_type}"),
        *memory_lines(memory(trainer)),
    ]


def _shortened(text: str, limit: int) -> str:
    """A long text without its middle."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
