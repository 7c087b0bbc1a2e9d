"""The texts and images of a record, of whatever kind it is."""

import dataclasses
from collections.abc import Iterator, Sequence

from l32jax.data.chat import Image, Message
from l32jax.data.records import Record


@dataclasses.dataclass(frozen=True)
class Removed:
    """Why a record was left out: the name that statistics have for it."""

    why: str


def text_of(record: Record) -> str:
    return "\n".join(part for part in _parts(record) if isinstance(part, str))


def with_images(record: Record, images: Sequence[bytes]) -> Record:
    """The record with other images, encoded, in the places of its own."""
    rest = map(Image, images)

    def replaced(parts: tuple[str | Image, ...]) -> tuple[str | Image, ...]:
        return tuple(next(rest) if isinstance(part, Image) else part for part in parts)

    def message(old: Message) -> Message:
        if isinstance(old.content, str):
            return old
        return dataclasses.replace(old, content=replaced(old.content))

    parts, messages = replaced(record.parts), tuple(map(message, record.messages))
    return dataclasses.replace(record, parts=parts, messages=messages)


def _parts(record: Record) -> Iterator[str | Image]:
    yield from record.parts
    for message in record.messages:
        content = message.content
        yield from (content,) if isinstance(content, str) else content
