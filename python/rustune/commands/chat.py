"""`rustune chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any, Final

from rustune.commands import speech

_HELP: Final = """\
/reset         forget the conversation
/system TEXT   forget it and begin with this system message; without TEXT, with none
/help          this
/exit          end, as Ctrl-D does; Ctrl-C stops an answer"""


def add(commands: Any) -> None:
    """Describes the command.

    Args:
        commands: The parser's subcommands.
    """
    parser = commands.add_parser(
        "chat",
        help="talk with a model in the terminal",
        description="Talks with a model; answers appear as they are made.",
        epilog=f"while talking:\n{_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    speech.add_settings(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command.

    Args:
        options: What was written.

    Returns:
        The exit status.
    """
    from rustune import ConfigError, RustuneError

    model, tokenizer = speech.load(options)
    if not tokenizer.chat_template:
        raise ConfigError(f"{options.model}: has no chat template; use rustune generate --raw")
    if sys.stdin.isatty():
        # Arrow keys and history, where Python was built with them.
        if importlib.util.find_spec("readline"):
            importlib.import_module("readline")
        print(f"{options.model}: /help lists the commands", file=sys.stderr)
    talk = Talk(model, tokenizer, options.system, speech.settings(options))
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                print()
            return 0
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D ends", file=sys.stderr)
            continue
        if line in ("/exit", "/quit"):
            return 0
        if line.startswith("/"):
            print(talk.command(line), file=sys.stderr)
        elif line:
            try:
                talk.answer(line)
            except RustuneError as error:
                print(f"rustune: error: {error}", file=sys.stderr)


class Talk:
    """A conversation.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        system: The system message, if any.
        settings: Arguments of `generate`.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str | None, settings: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.messages: list[dict[str, str]] = []
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Forgets everything.

        Args:
            system: The new system message, if any.
        """
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def command(self, line: str) -> str:
        """Obeys a command.

        Args:
            line: It begins with a slash.

        Returns:
            What to say.
        """
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self.reset(self.system)
            return "forgotten"
        if name == "/system":
            self.reset(rest.strip() or None)
            return "forgotten; new system message" if self.system else "forgotten; no system message"
        return _HELP if name == "/help" else f"{name}: no such command\n{_HELP}"

    def answer(self, text: str) -> None:
        """Answers, and remembers both.

        Args:
            text: What the user said.
        """
        self.messages.append({"role": "user", "content": text})
        ids = self._prompt()
        typewriter = speech.Typewriter(self.tokenizer)
        try:
            self.model.generate(input_ids=ids, streamer=typewriter, **self.settings)
        except KeyboardInterrupt:
            typewriter.end()
            print(" [stopped]", end="")
        print()
        self.messages.append({"role": "assistant", "content": typewriter.text})

    def _prompt(self) -> Any:
        """The conversation as ids; its oldest turns are left out when it has grown too long."""
        from rustune import DataError

        room = self.model.native.max_position_embeddings - self.settings["max_new_tokens"]
        while True:
            ids = self.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, return_tensors="np")
            first = 1 if self.system else 0
            if ids.shape[1] <= max(room, 1):
                return ids
            if len(self.messages) <= first + 1:
                self.messages.pop()
                raise DataError(
                    f"this is {ids.shape[1]} tokens; {max(room, 0)} are left beside --max-new-tokens"
                    f" {self.settings['max_new_tokens']}"
                )
            del self.messages[first : first + 2]
            print("[the oldest question and answer no longer fit and are forgotten]", file=sys.stderr)
