"""What `generate` and `chat` share: loading a model, sampling settings, and text that appears as it is made."""

from __future__ import annotations

import argparse
import sys
from typing import Any, TextIO

from rustune.streamers import TextStreamer


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds the model and the sampling settings to a parser.

    Args:
        parser: Of a subcommand.
    """
    parser.add_argument("model", help="a folder, the folder of an adapter, or a hub name")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token (0)")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens of this total probability")
    parser.add_argument("--top-k", type=int, help="sample from so many of the likeliest tokens")
    parser.add_argument("--min-p", type=float, help="leave out tokens less likely than this share of the likeliest")
    parser.add_argument("--repetition-penalty", type=float, help="above 1 makes repetitions less likely")
    parser.add_argument("--seed", type=int, help="the same answer again")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--max-seq-length", type=int, help="longest conversation in tokens")
    parser.add_argument("--16bit", dest="sixteen", action="store_true", help="do not load it in 4 bits")
    parser.add_argument(
        "--int8", action="store_true", help="round activations and the LM head to 8 bits: faster, hardly different"
    )


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Loads the model.

    Args:
        options: What was written.

    Returns:
        The model and its tokenizer.

    Raises:
        TokenizerError: If it has no tokenizer.
    """
    from rustune import FastLanguageModel, TokenizerError

    model, tokenizer = FastLanguageModel.from_pretrained(
        options.model, options.max_seq_length, load_in_4bit=not options.sixteen, load_in_16bit=options.sixteen
    )
    if tokenizer is None:
        raise TokenizerError(f"{options.model}: has no tokenizer files, so no text can be made")
    bits = 8 if options.int8 else None
    return FastLanguageModel.for_inference(model, lm_head_bits=bits, activation_bits=bits), tokenizer


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Collects the sampling settings.

    Args:
        options: What was written.

    Returns:
        Arguments of `generate`.
    """
    names = ("max_new_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    chosen = {name: value for name in names if (value := getattr(options, name)) is not None}
    sampled = options.temperature > 0
    return chosen | ({"do_sample": True, "temperature": options.temperature} if sampled else {"do_sample": False})


class Typewriter(TextStreamer):
    """Writes an answer word by word as it is made, and remembers it.

    Args:
        tokenizer: To decode with.
        stream: Where to; standard output if not given.

    Attributes:
        text: What was written.
    """

    def __init__(self, tokenizer: Any, stream: TextIO | None = None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stream = sys.stdout if stream is None else stream
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Writes a piece.

        Args:
            text: The piece.
            stream_end: Whether it is the last one.
        """
        self.text += text
        self._stream.write(text)
        self._stream.flush()
