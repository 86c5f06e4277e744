"""`rustune generate`: an answer to one prompt."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rustune.commands import speech


def add(commands: Any) -> None:
    """Describes the command.

    Args:
        commands: The parser's subcommands.
    """
    parser = commands.add_parser(
        "generate",
        help="answer a prompt",
        description="Answers one prompt; the text appears as it is made.",
        epilog="example: rustune generate my-adapter 'Where does Mara live?' --max-new-tokens 32",
    )
    speech.add_settings(parser)
    parser.add_argument("prompt", help="the text; - reads it from standard input")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")


def run(options: argparse.Namespace) -> int:
    """Runs the command.

    Args:
        options: What was written.

    Returns:
        The exit status.
    """
    from rustune import ConfigError

    prompt = sys.stdin.read().rstrip("\n") if options.prompt == "-" else options.prompt
    if not prompt:
        raise ConfigError("prompt: expected some text")
    model, tokenizer = speech.load(options)
    if options.raw or not tokenizer.chat_template:
        ids = tokenizer([prompt], return_tensors="np")["input_ids"]
    else:
        system = [{"role": "system", "content": options.system}] if options.system else []
        ids = tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="np"
        )
    model.generate(input_ids=ids, streamer=speech.Typewriter(tokenizer), **speech.settings(options))
    print()
    return 0
