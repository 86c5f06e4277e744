"""Unsloth's names that are not in a file of their own."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from rustune import checks
from rustune._native import ConfigError
from rustune.config import SFTConfig
from rustune.model import Model
from rustune.trainer import SFTTrainer

UnslothTrainer = SFTTrainer
UnslothTrainingArguments = SFTConfig


def unsloth_train(trainer: SFTTrainer, *arguments: Any, **options: Any) -> Any:
    """Trains; Unsloth's name for `trainer.train()`, whose accumulation is right here anyway.

    Args:
        trainer: The trainer.
        *arguments: As of `SFTTrainer.train`.
        **options: As of `SFTTrainer.train`.

    Returns:
        What `SFTTrainer.train` returns.
    """
    return trainer.train(*arguments, **options)


def add_new_tokens(
    model: Model,
    tokenizer: Any,
    new_tokens: Iterable[str] = (),
    method: str = "mean",
    interpolation: float = 0.5,
) -> None:
    """Adds tokens to a tokenizer, and their rows to a model; `get_peft_model` then trains embedding table and head.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        new_tokens: The tokens; those the vocabulary has are left as they are, with a warning.
        method: `mean` starts every new row as the mean of all trained ones; `interpolation` goes from there to the mean
            of the rows that spelled the token before.
        interpolation: How far, from 0 to 1.

    Raises:
        ConfigError: For no tokens, another method, a number out of range, or a model that has an adapter.

    Example:
        >>> add_new_tokens(model, tokenizer, ["<think>", "</think>"], method="interpolation")  # doctest: +SKIP
    """
    listed = [] if isinstance(new_tokens, (str, bytes)) else list(new_tokens)
    if isinstance(new_tokens, (str, bytes)) or not all(isinstance(token, str) and token for token in listed):
        raise ConfigError(f"new_tokens = {new_tokens!r}: expected a list of texts")
    if not listed:
        raise ConfigError("new_tokens = []: expected at least one token")
    if method not in ("mean", "interpolation"):
        raise ConfigError(f"method = {method!r}: expected mean or interpolation")
    if not checks.NUMBER.fits(interpolation) or not 0 <= interpolation <= 1:
        raise ConfigError(f"interpolation = {interpolation!r}: expected a number from 0 to 1")
    if model.native.has_adapter:
        raise ConfigError("add_new_tokens: the model has an adapter already; add tokens before get_peft_model")
    known = tokenizer.get_vocab()
    present = [token for token in listed if token in known]
    if present:
        warnings.warn(
            f"add_new_tokens: {', '.join(present)}: in the vocabulary already; left as they are", stacklevel=2
        )
    tokens = list(dict.fromkeys(token for token in listed if token not in known))
    if not tokens:
        return
    # What spells a token has to be asked before it is one.
    pieces = [list(tokenizer(token, add_special_tokens=False)["input_ids"]) for token in tokens]
    if max(map(max, pieces)) >= model.vocab_size:
        raise ConfigError(
            f"add_new_tokens: the tokenizer has {len(tokenizer)} tokens, the model {model.vocab_size}; "
            "call model.resize_token_embeddings(len(tokenizer)) first"
        )
    tokenizer.add_tokens(tokens)
    ids = [int(id_) for id_ in tokenizer.convert_tokens_to_ids(tokens)]
    share = float(interpolation) if method == "interpolation" else 0.0
    model.native.add_tokens(len(tokenizer), list(zip(ids, pieces, strict=True)), share)
    model.has_new_tokens = True
    model._take_vocabulary()
