"""Text that appears while it is generated: printed, or read from another thread."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any, Final

from rustune._native import ConfigError
from rustune.batches import plain_array


class TextStreamer:
    """Prints a text as `generate` makes it, word by word.

    Args:
        tokenizer: Ours or one of transformers.
        skip_prompt: Whether to leave out the prompt.
        **decode_kwargs: For `tokenizer.decode`, usually `skip_special_tokens`.

    Example:
        >>> model.generate(**prompt, streamer=TextStreamer(tokenizer, skip_prompt=True))  # doctest: +SKIP
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self.next_tokens_are_prompt = True
        self._ids: list[int] = []
        self._shown = 0

    def put(self, value: Any) -> None:
        """Takes the prompt, then each new token.

        Args:
            value: Ids, `[seq]` or `[1, seq]`.

        Raises:
            ConfigError: If there is more than one row.
        """
        array = plain_array(value)
        if getattr(array, "ndim", 1) > 1:
            if len(array) > 1:
                raise ConfigError(f"streamer: expected one sequence, got {len(array)}")
            array = array[0]
        prompt, self.next_tokens_are_prompt = self.next_tokens_are_prompt, False
        if prompt and self.skip_prompt:
            return
        self._ids.extend(int(id_) for id_ in array)
        text = self._text()
        # A word is shown when the next one begins: later tokens may still change how its end is spelt. Signs of
        # scripts without spaces are shown at once, except one that is still incomplete.
        if text.endswith("\n"):
            ready, self._ids, after = text[self._shown :], [], 0
        elif text and _is_ideograph(text[-1]):
            ready, after = text[self._shown :], len(text)
        else:
            after = max(self._shown, text.rfind(" ") + 1)
            ready = text[self._shown : after]
        self._shown = after
        if ready:
            self.on_finalized_text(ready)

    def end(self) -> None:
        """Shows what is left, and gets ready for another text."""
        rest = self._text()[self._shown :]
        self._ids, self._shown, self.next_tokens_are_prompt = [], 0, True
        self.on_finalized_text(rest, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints a piece; override it to do something else.

        Args:
            text: The piece.
            stream_end: Whether it is the last one.
        """
        print(text, flush=True, end="\n" if stream_end else "")

    def _text(self) -> str:
        return str(self.tokenizer.decode(self._ids, **self.decode_kwargs)) if self._ids else ""


class TextIteratorStreamer(TextStreamer):
    """Gives a text piece by piece to a loop while `generate` runs in another thread.

    Args:
        tokenizer: Ours or one of transformers.
        skip_prompt: Whether to leave out the prompt.
        timeout: Seconds to wait for the next piece before `queue.Empty` is raised; None waits as long as it takes.
        **decode_kwargs: For `tokenizer.decode`.

    Example:
        >>> streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)  # doctest: +SKIP
        >>> Thread(target=model.generate, kwargs={**prompt, "streamer": streamer}).start()  # doctest: +SKIP
        >>> for piece in streamer:  # doctest: +SKIP
        ...     print(piece, end="")
    """

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self.text_queue: queue.Queue[str | None] = queue.Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hands a piece to the loop.

        Args:
            text: The piece.
            stream_end: Whether it is the last one.
        """
        self.text_queue.put(text)
        if stream_end:
            self.text_queue.put(None)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = self.text_queue.get(timeout=self.timeout)
        if piece is None:
            raise StopIteration
        return piece


# Unified ideographs and their extensions; https://www.unicode.org/charts/, "East Asian Scripts".
_IDEOGRAPHS: Final = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3134F))


def _is_ideograph(sign: str) -> bool:
    """Whether a sign is a word of its own."""
    return any(first <= ord(sign) <= last for first, last in _IDEOGRAPHS)
