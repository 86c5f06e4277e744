"""`pipeline`: a function from text to text, by transformers' name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from rustune import checks
from rustune._native import ConfigError, DataError
from rustune.auto import AutoModelForCausalLM, AutoTokenizer
from rustune.model import Model


def pipeline(
    task: str | None = None, model: Any = None, tokenizer: Any = None, config: Any = None, **options: Any
) -> Callable[..., Any]:
    """Makes a function from text to text.

    Args:
        task: `text-generation`.
        model: From one of the loaders, or what one takes.
        tokenizer: The one the model was loaded with if not given.
        config: Makes no difference.
        **options: Settings of `generate` for every call; what a loader takes if `model` is a name; `device` and the
            like, which mean nothing here.

    Returns:
        A function of a prompt, a conversation, or a list of either, and of settings of `generate`. It gives
        `[{"generated_text": ...}]` for each: the text with the prompt (without it if `return_full_text=False`), or the
        conversation with the answer.

    Raises:
        ConfigError: For another task.
    """
    if not checks.is_one_of(task, (None, "text-generation")):
        raise ConfigError(f"pipeline: task = {task}: expected text-generation")
    for name in ("device", "device_map", "framework", "use_fast", "trust_remote_code", "batch_size"):
        options.pop(name, None)
    loading = {name: options.pop(name) for name in ("torch_dtype", "dtype", "token", "revision") if name in options}
    loading |= options.pop("model_kwargs", None) or {}
    if not isinstance(model, Model):
        if not isinstance(model, (str, os.PathLike)):
            raise ConfigError(f"pipeline: model = {type(model).__name__}: expected a model of rustune, or a name")
        model = AutoModelForCausalLM.from_pretrained(model, **loading)
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    return TextGeneration(model, model.tokenizer if tokenizer is None else tokenizer, options)


class TextGeneration:
    """What `pipeline` makes.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        settings: For every call.
    """

    task = "text-generation"

    def __init__(self, model: Model, tokenizer: Any, settings: Mapping[str, Any]) -> None:
        if tokenizer is None:
            raise ConfigError("pipeline: the model has no tokenizer; pass tokenizer=")
        self.model = model
        self.tokenizer = tokenizer
        self.settings = dict(settings)

    def __call__(self, text_inputs: Any, **settings: Any) -> Any:
        """Continues a prompt or a conversation, or each of several.

        Args:
            text_inputs: A text, a list of messages, or a list of either.
            **settings: Of `generate`, and `return_full_text`.

        Returns:
            A list of dicts with `generated_text`; a list of such lists for a list.
        """
        settings = {**self.settings, **settings}
        checks.check({"return_full_text": checks.BOOL}, settings)
        full = settings.pop("return_full_text", True)
        for name in ("batch_size", "clean_up_tokenization_spaces", "truncation", "padding"):
            settings.pop(name, None)
        kinds = {type(one) for one in text_inputs} if isinstance(text_inputs, (list, tuple)) else {type(text_inputs)}
        if not all(issubclass(kind, (str, list, tuple, Mapping)) for kind in kinds) or isinstance(text_inputs, Mapping):
            raise DataError(
                f"pipeline: expected a text, a list of messages, or a list of either, got {type(text_inputs).__name__}"
            )
        is_one = isinstance(text_inputs, str) or (bool(text_inputs) and isinstance(text_inputs[0], Mapping))
        made = [self._continue(one, full, settings) for one in ([text_inputs] if is_one else text_inputs)]
        return made[0] if is_one else made

    def _continue(self, prompt: Any, full: bool, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        is_text = isinstance(prompt, str)
        if is_text:
            ids = self.tokenizer(prompt, return_tensors="np")["input_ids"]
        else:
            ids = self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_tensors="np", return_dict=True
            )["input_ids"]
        rows = self.model.generate(ids, tokenizer=self.tokenizer, **settings)
        answers = [self.tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in rows]
        if not full:
            return [{"generated_text": answer} for answer in answers]
        if is_text:
            return [{"generated_text": prompt + answer} for answer in answers]
        return [{"generated_text": [*prompt, {"role": "assistant", "content": answer}]} for answer in answers]
