"""A conversation in the terminal."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from l32jax.api import Model
from l32jax.data.chat import Image, Message
from l32jax.data.images import load_image
from l32jax.errors import InputError


class Conversation:
    """What was said so far, and the pictures that go with the next message.

    `sampling` are keyword arguments of Model.stream.
    """

    def __init__(self, model: Model, sampling: dict[str, Any]):
        self._model, self._sampling = model, sampling
        self._messages: list[Message] = []
        self._images: list[Image] = []

    def take(self, line: str) -> None:
        """Answers a message, or does what a command says. After an InputError nothing was said."""
        command, _, rest = line.partition(" ")
        if command == "/image":
            self._images.append(Image(load_image(rest.strip())))
        elif command == "/reset":
            self._messages, self._images = [], []
        elif command.startswith("/"):
            raise InputError(f"command {command!r} in the chat: use /image FILE, /reset or /exit")
        elif line:
            self._answer(line)

    def _answer(self, line: str) -> None:
        content, self._images = (*self._images, line), []
        messages = [*self._messages, Message("user", content)]
        text = tell(self._model.stream(messages, **self._sampling), may_stop=True)
        self._messages = [*messages, Message("assistant", text)]


def tell(pieces: Iterable[str], *, may_stop: bool = False) -> str:
    """Prints pieces as they come, and returns them all; with `may_stop` Ctrl-C ends them early."""
    told = []
    with contextlib.suppress(*[KeyboardInterrupt] * may_stop):
        for piece in pieces:
            told.append(piece)
            print(piece, end="", flush=True)
    print(flush=True)
    return "".join(told)


def lines() -> Iterator[str]:
    """What is typed or piped, without the spaces around it; Ctrl-C drops a line half typed."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (editing and history for input())
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            print()
        except EOFError:
            return
