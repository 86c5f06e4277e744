"""Names of preference optimisation, so that a cell that imports them runs; the training itself comes later."""

from __future__ import annotations

from typing import Any

from rustune._native import ConfigError


class _Later:
    """A name that can be imported, so that a cell of imports runs, and that says so when it is used."""

    def __init__(self, *_: Any, **__: Any) -> None:
        name = type(self).__name__
        raise ConfigError(f"{name}: not there yet; supervised fine-tuning is: SFTTrainer and SFTConfig")


class DPOTrainer(_Later):
    """Preference optimisation; comes later."""


class DPOConfig(_Later):
    """Settings of `DPOTrainer`; comes later."""


class ORPOTrainer(_Later):
    """Preference optimisation; comes later."""


class ORPOConfig(_Later):
    """Settings of `ORPOTrainer`; comes later."""
