"""`rustune estimate`: memory, time and tokens/s of a run, before anything but `config.json` is downloaded."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(commands: Any) -> None:
    """Describes the command.

    Args:
        commands: The parser's subcommands.
    """
    parser = commands.add_parser(
        "estimate",
        help="say what a run would need on this machine, before downloading a model",
        description="Reads a model's config.json and nothing else, computes the memory that training needs, and times "
        "one layer of its shape on this machine.",
        epilog="example: rustune estimate unsloth/Llama-3.2-1B-Instruct --rank 16 --batch 2 --length 512",
    )
    parser.add_argument("model", help="a folder or a hub name")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--rank", "-r", type=_positive, default=16, help="of the adapter (16)")
    parser.add_argument(
        "--modules-to-save",
        nargs="+",
        choices=("embed_tokens", "lm_head"),
        default=(),
        metavar="MODULE",
        help="embed_tokens, lm_head or both: trained whole beside the adapter",
    )
    parser.add_argument("--batch", "-b", type=_positive, default=2, help="rows of a micro-batch (2)")
    parser.add_argument("--accumulation", "-a", type=_positive, default=4, help="micro-batches of a step (4)")
    parser.add_argument("--length", "-l", type=_positive, default=2048, help="tokens of the longest rows (2048)")
    parser.add_argument("--mean-length", type=_positive, help="tokens of a row on average; the length if not given")
    parser.add_argument("--steps", "-s", type=_positive, default=60, help="optimizer steps of the run (60)")
    parser.add_argument("--optim", default="adamw_8bit", help="the optimizer (adamw_8bit)")
    parser.add_argument("--8bit", dest="bits", action="store_const", const=8, default=4, help="with load_in_8bit=True")
    parser.add_argument("--16bit", dest="bits", action="store_const", const=16, help="with load_in_4bit=False")
    parser.add_argument(
        "--checkpointing",
        choices=("unsloth", "true", "false"),
        default="unsloth",
        help="keep of each layer what there is memory for, nothing (slower), or everything (unsloth)",
    )
    parser.add_argument("--no-measure", action="store_true", help="memory only; takes no time")
    parser.add_argument("--json", action="store_true", help="as JSON, in bytes and seconds")


def run(options: argparse.Namespace) -> int:
    """Runs the command.

    Args:
        options: What was written.

    Returns:
        The exit status: 0 if the run fits into memory, 1 if it does not.
    """
    import rustune
    from rustune import banner, estimate
    from rustune.progress import duration

    config = estimate.read_config(options.model, options.revision)
    shape = estimate.Shape.from_config(config)
    bits = _stored_bits(config) or options.bits
    tokens = options.batch * options.length
    whole = tuple(dict.fromkeys(options.modules_to_save))
    n_trained = shape.n_adapter(options.rank) + shape.n_whole(whole)
    wanted = {"tokens": tokens, "rank": options.rank, "bits": bits, "optim": options.optim}
    wanted["modules_to_save"] = whole
    forecast = estimate.memory(config, checkpointing=options.checkpointing, **wanted)
    fits = forecast["fits"] is not False
    said: dict[str, Any] = {
        "model": options.model,
        "parameters": shape.n_parameters,
        "trained": n_trained,
        "memory": forecast,
        "least_memory": estimate.memory(config, checkpointing="true", **wanted),
    }
    if not options.no_measure:
        mean = min(options.mean_length or options.length, options.length)
        of_step = options.batch * options.accumulation * mean
        rate = estimate.measure(shape, tokens=tokens, rank=options.rank, bits=bits)
        _, in_part, again = forecast["estimate"]["layers"]
        work = estimate.flops(
            shape, tokens=of_step, length=mean, again=again + in_part / 2, head_trained="lm_head" in whole
        )
        said |= {
            "flops_per_second": rate,
            "seconds_per_step": work / rate,
            "tokens_per_second": of_step * rate / work,
            "seconds": options.steps * work / rate,
        }
    if options.json:
        print(json.dumps(said, indent=2))
        return 0 if fits else 1
    facts = rustune.info()
    print(f"{options.model}: {shape.n_parameters:,} parameters in {bits} bits, {shape.layers} layers, "
          f"vocabulary {shape.vocab:,}")  # fmt: skip
    share = 100 * n_trained / (shape.n_parameters + n_trained)
    beside = f", with {' and '.join(whole)} trained whole" if whole else ""
    print(
        f"adapter of rank {options.rank} on all linear layers{beside}: {n_trained:,} trained parameters ({share:.2f} %)"
    )
    print(f"\nmemory for a batch of {options.batch} x {options.length:,} tokens")
    for name, text in banner.memory_lines(forecast):
        print(f"  {name:<8}{text}")
    print(f"  {'least':<8}{banner.gib(said['least_memory']['peak'] or 0)} with --checkpointing true, which is slower")
    if not options.no_measure:
        print(f"\ntime on this machine ({facts['isa']}, {facts['threads']} threads), from one layer tried out")
        speed, step = said["tokens_per_second"], said["seconds_per_step"]
        print(f"  {speed:,.0f} tokens/s, {step:.1f} s a step of {of_step:,} tokens")
        print(f"  {options.steps} steps: {duration(said['seconds'])}")
        if options.mean_length is None:
            print("  rows are shorter as a rule, and none is padded: --mean-length tells how short")
    return 0 if fits else 1


def _stored_bits(config: dict[str, Any]) -> int | None:
    """The bits of a checkpoint that bitsandbytes has quantized, which is kept as it is."""
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    return 8 if isinstance(quantization, dict) and quantization.get("load_in_8bit") else 4


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return value
