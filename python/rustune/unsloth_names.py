"""Unsloth's names that are not in a file of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
    model: Model, tokenizer: Any, new_tokens: Iterable[str] = (), method: str = "mean", interpolation: float = 0.5
) -> None:
    """Checks that tokens are in the vocabulary; adding rows to the embedding table is not there yet.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        new_tokens: The tokens.
        method: Makes no difference.
        interpolation: Makes no difference.

    Raises:
        ConfigError: If a token is not in the vocabulary.
    """
    known = tokenizer.get_vocab()
    missing = [token for token in new_tokens if token not in known]
    if missing:
        raise ConfigError(
            f"add_new_tokens: {', '.join(missing)}: adding tokens is not there yet; use tokens the vocabulary has"
        )
