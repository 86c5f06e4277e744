"""`rustune train`: fine-tunes by a file of settings, flags, or both."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from rustune.settings_file import value

_EPILOG: Final = """\
A file of settings has four sections: `model` takes the arguments of FastLanguageModel.from_pretrained, `lora` those of
get_peft_model, `training` every field of SFTConfig. In YAML (needs PyYAML: pip install rustune[cli]):

    model: {model_name: unsloth/Llama-3.2-1B-Instruct, max_seq_length: 2048}
    lora: {r: 16, lora_alpha: 16}
    data:
      train: train.jsonl           # or .json, .parquet; rows of text, messages, conversations, prompt and completion...
      eval: eval.jsonl
      chat_template: llama-3.1     # if the model has none, or another
      responses_only: true
    training: {output_dir: outputs, learning_rate: 2e-4, max_steps: 60, per_device_train_batch_size: 2}

TOML and JSON do as well. Flags win over the file. Every field of SFTConfig is a flag too, and --set reaches the rest:

    rustune train --config run.yaml --max-steps 10 --lr-scheduler-type cosine --set lora.use_rslora=true
    rustune train --model my-llama --data rows.jsonl --responses-only --r 8 --max-steps 60

The adapter goes into output_dir, beside settings.json: the settings as they ran, which --config takes again.
Ctrl-C stops after writing nothing; --resume goes on from the newest checkpoint (training.save_steps)."""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps the long list of fields, and leaves the rest as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("each takes a value"):
            return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
        return super()._fill_text(text, width, indent)


# Flag to section and name, beside the fields of SFTConfig.
_FLAGS: Final = {
    "model": ("model", "model_name", "a folder or a hub name"),
    "max-seq-length": ("model", "max_seq_length", "longest row in tokens (2048)"),
    "load-in-4bit": ("model", "load_in_4bit", "true or false (true)"),
    "load-in-8bit": ("model", "load_in_8bit", "true or false (false)"),
    "dtype": ("model", "dtype", "float32, bfloat16 or int16"),
    "data": ("data", "train", "a .jsonl, .json or .parquet file"),
    "eval-data": ("data", "eval", "the same, for evaluation"),
    "chat-template": ("data", "chat_template", "a name, such as llama-3.1 or chatml"),
    "r": ("lora", "r", "rank of the adapter (16)"),
    "lora-alpha": ("lora", "lora_alpha", "(16)"),
    "lora-dropout": ("lora", "lora_dropout", "(0)"),
    "target-modules": ("lora", "target_modules", 'a JSON list, such as ["q_proj","v_proj"], or all-linear'),
    "modules-to-save": ("lora", "modules_to_save", 'trained whole: a JSON list, such as ["embed_tokens","lm_head"]'),
}


def add(commands: Any) -> None:
    """Describes the command.

    Args:
        commands: The parser's subcommands.
    """
    parser = commands.add_parser(
        "train",
        help="fine-tune by a file of settings or by flags",
        description="Fine-tunes a model with LoRA and saves the adapter.",
        epilog=_EPILOG,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings: .yaml, .toml or .json")
    for flag, (section, name, said) in _FLAGS.items():
        parser.add_argument(f"--{flag}", dest=f"{section}.{name}", metavar="X", help=said)
    parser.add_argument("--responses-only", action="store_true", help="train on the answers only")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=X", help="any other setting")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and print the settings")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the loss curve (needs matplotlib)")
    names = [name for name in _fields() if name not in {taken for _, taken, _ in _FLAGS.values()}]
    group = parser.add_argument_group(
        "fields of SFTConfig",
        "each takes a value, such as --learning-rate 2e-4 or --bf16 true; _ instead of - will do: "
        + " ".join(f"--{name.replace('_', '-')}" for name in names),
    )
    for name in names:
        spellings = dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"])
        group.add_argument(*spellings, dest=f"training.{name}", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Runs the command.

    Args:
        options: What was written.

    Returns:
        The exit status.
    """
    import rustune
    from rustune import ConfigError, FastLanguageModel, SFTConfig, SFTTrainer, banner

    settings = collected(options)
    model_settings, data = settings["model"], settings["data"]
    for section, name, flag in (("model", "model_name", "--model"), ("data", "train", "--data")):
        if not settings[section].get(name):
            raise ConfigError(f"{section}.{name}: not given; write it in the file or as {flag}")
    args = SFTConfig(**settings["training"])
    model, tokenizer = FastLanguageModel.from_pretrained(**model_settings)
    if not model.native.is_fully_trained and not model.native.has_adapter:
        model = FastLanguageModel.get_peft_model(model, **settings["lora"])
    if data.get("chat_template"):
        tokenizer = rustune.get_chat_template(
            tokenizer, data["chat_template"], system_message=data.get("system_message")
        )
    trainer = SFTTrainer(
        model,
        args,
        tokenizer=tokenizer,
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        dataset_text_field=data.get("text_field"),
    )
    if data.get("responses_only"):
        rustune.train_on_responses_only(trainer, data.get("instruction_part"), data.get("response_part"))
    resolved = {**settings, "training": _written(args)}
    if options.dry_run:
        text, _ = banner.texts(trainer, args.plan(len(trainer.train_dataset or ())))
        print(f"{text}\n{json.dumps(resolved, indent=2, default=str)}")
        return 0
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(resolved, indent=2, default=str) + "\n", encoding="utf-8")
    done = trainer.train(resume_from_checkpoint=True if options.resume else None)
    trainer.save_model(str(folder))
    trainer.save_state()
    if options.plot:
        trainer.plot_loss(options.plot)
    print(f"{done.global_step} steps, mean loss {done.training_loss:.4f}; the adapter is in {folder}", file=sys.stderr)
    return 0


def collected(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Puts the file and the flags together; flags win.

    Args:
        options: What was written.

    Returns:
        All four sections.

    Raises:
        ConfigError: If a name is unknown.
    """
    from rustune import ConfigError, settings_file

    made: dict[str, dict[str, Any]] = {"model": {}, "lora": {}, "data": {}, "training": {}}
    if options.config is not None:
        made |= settings_file.read(options.config)
    written: dict[str, dict[str, Any]] = {}
    for flag, text in vars(options).items():
        section, dot, name = flag.partition(".")
        if dot and text is not None:
            written.setdefault(section, {})[name] = value(text)
    for text in options.set:
        name, equals, said = text.partition("=")
        section, dot, name = name.partition(".")
        if not (equals and dot):
            raise ConfigError(f"--set {text}: expected SECTION.NAME=VALUE, such as lora.use_rslora=true")
        written.setdefault(section, {})[name] = value(said)
    if options.responses_only:
        written.setdefault("data", {})["responses_only"] = True
    for section, names in settings_file.checked(written, "flags").items():
        made[section] = {**made[section], **names}
    return made


def _fields() -> list[str]:
    from rustune.config import SFTConfig

    return [entry.name for entry in fields(SFTConfig)]


def _written(args: Any) -> dict[str, Any]:
    """The settings as they run, without those that are not set; a token is never written."""
    # Left out because the steps or epochs say it, or because the flag is for this one run.
    passing = ("resume_from_checkpoint", "hub_token", "warmup_ratio" if args.warmup_steps else "warmup_steps")
    return {name: what for name, what in args.to_dict().items() if what is not None and name not in passing}
