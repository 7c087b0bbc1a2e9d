"""WebDataset's tar files: the members 000123.jpg and 000123.txt are the record 000123.

An image is the field `image`, several are `images` in the order of the file; a .txt is `text`; the
fields of a .json come beside them. If the .json names images, they are those of its own record.
"""

import dataclasses
import functools
import posixpath
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from l32jax.data.files import File
from l32jax.data.images import MAX_BYTES
from l32jax.data.records import Bad, Record
from l32jax.data.sources.fields import make_record
from l32jax.data.sources.jsonl import MAX_LINE_BYTES, parse_json
from l32jax.data.sources.tar_members import Member, members
from l32jax.errors import InputError, one_line

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
FIELD_OF = {".txt": "text", ".json": "json"} | dict.fromkeys(IMAGES, "images")


class TarRecords:
    """The records of a file. Where their members lie is found once, by reading all headers."""

    def __init__(self, file: File):
        self._file = file
        self._index = _indexed(members(file))
        if not len(self):
            raise InputError(
                f"source {file.where}: no images, texts or JSON in it; is it a whole tar file?"
            )

    def __len__(self) -> int:
        return len(self._index.damaged)

    def read(self, number: int) -> Record | Bad:
        found = self._index.members(number)
        place = _printable(f"{self._file.name} {_split(found[0].name)[0]}")
        if self._index.damaged[number]:
            return Bad(place, "damaged: a member beside it cannot be found")
        try:
            find = functools.partial(self._image, found)
            return make_record(self._fields(found), place, find)
        except InputError as error:
            return Bad(place, one_line(error))

    def _fields(self, found: Sequence[Member]) -> dict[str, Any]:
        text, json, images = (
            [self._read(member) for member in found if _field(member.name) == field]
            for field in ("text", "json", "images")
        )
        if len(text) > 1 or len(json) > 1:
            raise InputError(f"{len(text)} .txt and {len(json)} .json; at most one each belongs")
        fields = parse_json(json[0]) if json else {}
        if not isinstance(fields, dict):
            raise InputError("its .json is not an object")
        if text:
            fields["text"] = _decoded(text[0])
        if images and not _names_images(fields):
            fields |= {"image": images[0]} if len(images) == 1 else {"images": images}
        return fields

    def _image(self, found: Sequence[Member], name: str) -> bytes:
        for member in found:
            is_named = posixpath.basename(member.name) == posixpath.basename(name)
            if is_named and _field(member.name) == "images":
                return self._read(member)
        raise InputError(f"image {name!r} of its .json is not beside it")

    def _read(self, member: Member) -> bytes:
        at_most = MAX_BYTES if _field(member.name) == "images" else MAX_LINE_BYTES
        if member.size > at_most:
            raise InputError(f"its {_split(member.name)[1]} has more than {at_most} bytes")
        return self._file.read(member.offset, member.size)


@dataclasses.dataclass(frozen=True)
class _Index:
    """Members in the order of their records, as arrays: a file may have millions.

    firsts: the first member of each record. places: offset and size. names: end to end.
    """

    firsts: np.ndarray
    damaged: np.ndarray
    places: np.ndarray
    names: bytes
    name_ends: np.ndarray

    def members(self, record: int) -> list[Member]:
        first, stop = self.firsts[record : record + 2].tolist()
        return [self._member(number) for number in range(first, stop)]

    def _member(self, number: int) -> Member:
        begin, end = self.name_ends[number : number + 2].tolist()
        name = self.names[begin:end].decode("utf-8", "surrogateescape")
        return Member(name, *self.places[number].tolist())


def _indexed(found: Iterable[Member | None]) -> _Index:
    records: dict[str, list[Member]] = {}
    damaged: set[str] = set()  # records on both sides of a gap
    last, after_gap = None, False
    for member in found:
        if member is None:
            after_gap = True
            damaged |= {last} if last is not None else set()
            continue
        last = _split(member.name)[0]
        if _field(member.name):
            records.setdefault(last, []).append(member)
        damaged |= {last} if after_gap else set()
        after_gap = False
    ordered = [member for group in records.values() for member in group]
    names = [member.name.encode("utf-8", "surrogateescape") for member in ordered]
    return _Index(
        firsts=np.cumsum([0, *map(len, records.values())]),
        damaged=np.array([key in damaged for key in records], bool),
        places=np.array([(m.offset, m.size) for m in ordered], np.int64).reshape(-1, 2),
        names=b"".join(names),
        name_ends=np.cumsum([0, *map(len, names)]),
    )


def _split(name: str) -> tuple[str, str]:
    """The key, up to the first dot of the last step, and the rest."""
    folder, base = posixpath.split(name)
    stem, dot, rest = base.partition(".")
    return posixpath.join(folder, stem), dot + rest


def _field(name: str) -> str | None:
    suffix = _split(name)[1].lower()
    return FIELD_OF.get(suffix[suffix.rfind(".") :])


def _names_images(fields: dict[str, Any]) -> bool:
    if any(fields.get(name) is not None for name in ("image", "images", "parts")):
        return True
    contents = [turn.get("content") for turn in _objects(fields.get("messages"))]
    return any(item.get("image") is not None for content in contents for item in _objects(content))


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _decoded(text: bytes) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"its .txt is not UTF-8 ({one_line(error)})") from None


def _printable(name: str) -> str:
    """Whoever made the file chose it."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)
