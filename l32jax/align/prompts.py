"""What models are asked: dialogs that end where the assistant is to speak, and what is right."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l32jax.data.chat import Image, Message
from l32jax.data.features import image_key
from l32jax.data.images import ImageSource
from l32jax.data.records import Bad, Record


@dataclasses.dataclass(frozen=True)
class Truth:
    """What a verifier holds an answer against.

    answer: the reference, if there is one. check: the record's own, such as {"tests": "…"}.
    """

    answer: str | None = None
    check: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A dialog up to the answer that is asked for; `place` is where it was read, for messages."""

    messages: tuple[Message, ...]
    truth: Truth = Truth()
    place: str = ""

    @functools.cached_property
    def key(self) -> str:
        """A digest of the dialog, its images and the truth: what answers are drawn and kept by."""
        said = [(message.role, _described(message)) for message in self.messages]
        whole = [said, self.truth.answer, self.truth.check]
        text = json.dumps(whole, sort_keys=True, default=repr)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def images(self) -> list[ImageSource]:
        """In the order of their places."""
        parts = [part for message in self.messages for part in message.content]
        return [part.source for part in parts if isinstance(part, Image)]


# A prompt, and the numbers of its answers that are missing.
Wanted = tuple[Prompt, frozenset[int]]


def prompt_of(record: Record) -> Prompt | Bad:
    """The dialog without its last answer, which is the truth; or all of it, if there is none."""
    if not record.messages:
        return Bad(record.place, "it is a document, not a conversation")
    *before, last = record.messages
    if last.role != "assistant":
        return Prompt(record.messages, Truth(None, record.check), record.place)
    if not before:
        return Bad(record.place, "nothing is asked in it")
    return Prompt(tuple(before), Truth(_text(last), record.check), record.place)


def _text(message: Message) -> str:
    return "".join(part for part in message.content if isinstance(part, str))


def _described(message: Message) -> list[Any]:
    parts = [message.content] if isinstance(message.content, str) else message.content
    return [
        part if isinstance(part, str) else {"image": image_key(part.source).hex()} for part in parts
    ]


def encoded(image: Any) -> bytes:
    """The bytes of an image that a record holds or names."""
    return image if isinstance(image, bytes) else Path(image).read_bytes()
