"""The settings of `generate`, and the object that carries them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rustune import checks
from rustune._native import ConfigError
from rustune.config import unknown_argument

# What the engine is told.
_ENGINE: Final = (
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "num_return_sequences",
    "eos_token_id",
    "pad_token_id",
    "stop_strings",
    "seed",
    "min_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)
# Accepted, because they change nothing here; the values of the second are those that change nothing.
_IGNORED: Final = (
    "use_cache",
    "cache_implementation",
    "token_type_ids",
    "position_ids",
    "synced_gpus",
    "length_penalty",
    "early_stopping",
    "bos_token_id",
    "trust_remote_code",
    "remove_invalid_values",
    "renormalize_logits",
    "transformers_version",
    "tokenizer",
)
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "typical_p": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "return_dict_in_generate": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "penalty_alpha": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "logits_processor": (),
    "prefix_allowed_tokens_fn": (),
    "assistant_model": (),
}
_KINDS: Final = {
    "max_new_tokens": checks.WHOLE,
    "max_time": checks.NUMBER,
    "max_length": checks.WHOLE,
    "do_sample": checks.BOOL,
    "temperature": checks.NUMBER,
    "top_k": checks.WHOLE,
    "top_p": checks.NUMBER,
    "min_p": checks.NUMBER,
    "repetition_penalty": checks.NUMBER,
    "num_return_sequences": checks.WHOLE,
    "eos_token_id": checks.WHOLES,
    "pad_token_id": checks.WHOLE,
    "stop_strings": checks.TEXTS,
    "seed": checks.NATURAL,
    "min_new_tokens": checks.WHOLE,
    "min_length": checks.WHOLE,
    "no_repeat_ngram_size": checks.WHOLE,
    "bad_words_ids": checks.ID_ROWS,
    "suppress_tokens": checks.IDS,
    "begin_suppress_tokens": checks.IDS,
}
# What `Model.generate` itself looks after.
_OURS: Final = ("max_length", "max_time")
_KNOWN: Final = frozenset({*_ENGINE, *_OURS, *_IGNORED, *_NEUTRAL})


class GenerationConfig:
    """Settings of `generate` to be passed around; what is None is left to `generate`.

    Args:
        **settings: Any setting of `Model.generate`.

    Raises:
        ConfigError: For a name that `generate` does not know.

    Example:
        >>> GenerationConfig(max_new_tokens=64, temperature=0.7).max_new_tokens
        64
    """

    def __init__(self, **settings: Any) -> None:
        for name in settings:
            if name not in _KNOWN:
                raise unknown_argument("GenerationConfig", name, _KNOWN)
        self.__dict__.update(settings)

    def __getattr__(self, name: str) -> Any:
        if name in _KNOWN:
            return None
        raise AttributeError(f"GenerationConfig has no setting {name}")

    def __repr__(self) -> str:
        return f"GenerationConfig({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def to_dict(self) -> dict[str, Any]:
        """Returns what was set."""
        return dict(self.__dict__)


def merge_settings(configs: tuple[Any, ...], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Puts together what was asked of `generate`; later configs and then arguments win.

    Args:
        configs: Objects or mappings with settings; what they hold beyond settings of `generate` is passed over.
        arguments: What `generate` was called with.

    Returns:
        What the engine knows, `max_length` and `max_time`; nothing that is None.

    Raises:
        ConfigError: For an unknown argument, or a setting that is not there yet.
    """
    settings: dict[str, Any] = {}
    for config in configs:
        if config is None:
            continue
        written = _written(config)
        # 20 is what older transformers put there when nothing was written.
        settings |= {
            name: value
            for name, value in written.items()
            if name in _KNOWN and value is not None and (name, value) != ("max_length", 20)
        }
    for name in arguments:
        if name not in _KNOWN:
            raise unknown_argument("generate", name, _KNOWN)
    settings |= arguments
    for name, neutral in _NEUTRAL.items():
        value: Any = _plain(settings.get(name))
        empty = hasattr(value, "__len__") and len(value) == 0
        if value is not None and not empty and value not in neutral:
            raise ConfigError(f"{name} = {value!r}: not there yet; leave it out")
    kept = {name: _plain(settings[name]) for name in (*_ENGINE, *_OURS) if settings.get(name) is not None}
    checks.check(_KINDS, kept)
    for name in ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"):
        if name in kept and not len(kept[name]):
            del kept[name]  # how transformers writes that nothing is banned
    for name in ("eos_token_id", "pad_token_id"):
        if any(not 0 <= id_ < 2**32 for id_ in checks.listed(kept.get(name, []))):
            raise ConfigError(f"{name} = {kept[name]!r}: expected ids of tokens")
    return kept


def _written(config: Any) -> Mapping[str, Any]:
    """What a config object or a mapping holds."""
    if isinstance(config, Mapping):
        return config
    to_dict = getattr(config, "to_dict", None)
    written = to_dict() if to_dict else getattr(config, "__dict__", None)
    if not isinstance(written, Mapping):
        raise ConfigError(f"generation_config = {config!r}: expected an object or a dict of settings")
    return written


def _plain(value: Any) -> Any:
    """A number or an array of numpy or torch as Python's; other things as they are."""
    return value.tolist() if hasattr(value, "tolist") else value
