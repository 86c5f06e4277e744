"""The shipped model's tokenizer: every word of the small world is one token, anything else falls apart into characters.

It is written as a `tokenizer.json` of the Hugging Face tokenizers library (a Unigram model whose best path has the
fewest pieces), so that nothing special is needed to read it; `encode` is the same in Python for text that the world
itself made.
"""

from __future__ import annotations

import re
import string
from typing import Any

from rustune.quickstart import instruct, world

PAD, BOS, EOS, USER, ASSISTANT, SYSTEM, UNKNOWN = (
    "<|pad|>",
    "<|begin|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|unknown|>",
)
_SPECIAL = (PAD, BOS, EOS, USER, ASSISTANT, SYSTEM, UNKNOWN)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_SPACE = "\u2581"  # how the library writes a space inside a token
_PIECE = re.compile(r"\u2581[A-Za-z]+|.", re.DOTALL)


def vocabulary() -> list[str]:
    """Lists all tokens, special ones first; a token's place is its id.

    Returns:
        The words of the world and of the questions about it, characters and bytes; filled up with tokens that are never
        used to a multiple of 64.
    """
    letters = list(string.printable[:95])  # printable ASCII
    names = [start + end for start in world.NAME_STARTS for end in world.NAME_ENDS]
    questions = [question for asked in instruct.QUESTIONS.values() for question in asked]
    told = [sentence for sentences in world.RELATIONS.values() for sentence in sentences]
    lists = (names, world.TOWNS, world.JOBS, world.PETS, world.FOODS, world.WORDS, [w.upper() for w in world.WORDS])
    words = {_SPACE + word for words in lists for word in words}
    for text in (*told, *world.TELLINGS.values(), *questions):
        words |= {_SPACE + word for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", "", text))}
    tokens = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), _SPACE, *letters, *sorted(words)]
    return tokens + [f"<|unused {n}|>" for n in range(-len(tokens) % 64)]


def encode(text: str, ids: dict[str, int]) -> list[int]:
    """Encodes text of the small world, without special tokens.

    Args:
        text: Printable ASCII.
        ids: The place of each token of `vocabulary`.

    Returns:
        The ids that the library gives as well (a test compares the two).
    """
    found: list[int] = []
    for piece in _PIECE.findall(_SPACE + text.replace(" ", _SPACE)):
        found.extend([ids[piece]] if piece in ids else [ids[character] for character in piece])
    return found


def tokenizer_json(tokens: list[str]) -> dict[str, Any]:
    """Returns the contents of `tokenizer.json` for the tokens of `vocabulary`."""
    special = [
        {"id": tokens.index(token), "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for token in _SPECIAL
    ]
    spaces = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "always", "split": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": spaces,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [tokens.index(BOS)], "tokens": [BOS]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, spaces]},
        # Every piece costs the same, so the cheapest path is the one with the fewest pieces: a known word stays whole.
        "model": {
            "type": "Unigram",
            "unk_id": tokens.index(UNKNOWN),
            "vocab": [[token, -10.0] for token in tokens],
            "byte_fallback": True,
        },
    }


def tokenizer_config() -> dict[str, Any]:
    """Returns the contents of `tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }
