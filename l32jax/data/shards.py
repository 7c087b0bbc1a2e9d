"""Prepared data: a folder of ArrayRecord shards whose records are samples, and an index of them.

    shard-00000-of-00008.arrayrecord ...
    index.json   how many records each shard has, whose tokens they are, and statistics

A sample has a digest of its own, and `shard_file` finds records in damaged files: a flipped bit
anywhere in a shard costs one sample at most.
"""

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from l32jax.data.beside_packed import LogKind, packed, unpacked
from l32jax.data.records import Bad
from l32jax.data.samples import Document, Pair, Sample
from l32jax.data.shard_file import Shard
from l32jax.data.tokenizer import Tokenizer
from l32jax.data.vocabulary import IMAGE
from l32jax.errors import InputError, one_line

INDEX = "index.json"
FORMAT = "l32jax prepared data 1"
MAX_INDEX_BYTES = 64 << 20
MAX_SHARDS = 100_000
MAX_SAMPLE_BYTES = 1 << 30
DIGEST_BYTES = 8


def encode_sample(sample: Sample, *, logs: LogKind = "float32") -> bytes:
    """A sample, whose images are encoded files, as msgpack with a digest after it.

    logs: in which a teacher's log-probabilities are kept.
    """
    content = {
        "documents": [_encode_document(document, logs) for document in sample.documents],
        "images": [_encoded_file(image) for image in sample.images],
        "place": sample.place,
        "pairs": [list(pair) for pair in sample.pairs],
    }
    packed = bytes(msgpack.packb(content) or b"")
    if len(packed) > MAX_SAMPLE_BYTES:
        raise InputError(
            f"sample of {len(packed)} bytes: at most {MAX_SAMPLE_BYTES} fit; split the document"
        )
    return packed + _digest(packed)


def decode_sample(data: bytes) -> Sample:
    """What `encode_sample` wrote; InputError if a bit of it has changed."""
    if not is_whole(data):
        raise InputError("prepared sample: damaged; prepare the data again, or go on without it")
    try:
        content = msgpack.unpackb(data[:-DIGEST_BYTES])
        documents = tuple(_decode_document(*parts) for parts in content["documents"])
        images = tuple(map(_encoded_file, content["images"]))
        pairs = tuple(Pair(*pair) for pair in content.get("pairs", ()))
        return Sample(documents, images, str(content["place"]), pairs)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  (its digest is right, but who wrote it?)
        raise InputError(f"prepared sample: not one ({one_line(error)})") from None


def is_whole(data: bytes) -> bool:
    """Whether every bit is as `encode_sample` wrote it."""
    return data[-DIGEST_BYTES:] == _digest(data[:-DIGEST_BYTES])


def shard_name(number: int, count: int) -> str:
    return f"shard-{number:05}-of-{count:05}.arrayrecord"


def write_index(folder: Path, *, tokenizer: str, records: Sequence[int], about: Any) -> None:
    """Makes a folder of finished shards whole, at once.

    Args:
      tokenizer: `tokenizer_digest` of the one whose tokens they are.
      records: how many each shard has.
      about: whatever else there is to say, made of JSON's types.
    """
    content = {
        "format": FORMAT,
        "tokenizer": tokenizer,
        "shards": {shard_name(i, len(records)): count for i, count in enumerate(records)},
        **about,
    }
    text = json.dumps({"sha256": _checksum(content), "content": content}, indent=2)
    unfinished = folder / f"{INDEX}.unfinished"
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(folder / INDEX)


def require_same(found: dict[str, Any], about: dict[str, Any], output: Path) -> dict[str, Any]:
    """What was found in an output, if it says of itself what `about` says."""
    if any(found.get(name) != value for name, value in about.items()):
        raise InputError(
            f"output {str(output)!r}: it is of other sources, models or settings; remove it, or "
            "choose another"
        )
    return found


def read_index(folder: Path) -> dict[str, Any]:
    """The content of a folder's index; InputError if it is missing or not as it was written."""
    path = folder / INDEX
    try:
        with path.open("rb") as file:
            read = json.loads(file.read(MAX_INDEX_BYTES))
        content, checksum = read["content"], read["sha256"]
    except FileNotFoundError:
        raise InputError(f"prepared data {str(folder)!r}: no {INDEX} there; prepare it") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"index {str(path)!r}: damaged; prepare the data again") from None
    if checksum != _checksum(content) or not _is_index(content):
        raise InputError(f"index {str(path)!r}: damaged; prepare the data again")
    return content


def open_shards(folder: Path, tokenizer: Tokenizer | None = None) -> Sequence[Sample | Bad]:
    """The samples of a prepared folder, read when looked at; damaged ones are Bad.

    Args:
      tokenizer: of the model that will read them; InputError if they were made with another.
    """
    index = read_index(folder)
    if tokenizer is not None and index["tokenizer"] != tokenizer_digest(tokenizer):
        raise InputError(
            f"prepared data {str(folder)!r}: made with another tokenizer than the model's; "
            "prepare it again with that"
        )
    for name in index["shards"]:
        if not (folder / name).is_file():
            raise InputError(f"shard {name} in {str(folder)!r}: missing; prepare the data again")
    return Shards([folder / name for name in index["shards"]], list(index["shards"].values()))


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that make the same tokens of the same records, whatever their files.

    An image token that was added to a text model's makes no difference: text never becomes it.
    """
    vocabulary = tokenizer.vocabulary
    pieces = hashlib.sha256()
    for piece in vocabulary.pieces:
        pieces.update(len(piece).to_bytes(4, "little") + piece)
    specials = dict(tokenizer.specials)
    if tokenizer.image_id is not None and not tokenizer.is_llama3:
        del specials[IMAGE]
    names = sorted(specials.items())
    rest = (vocabulary.ids, vocabulary.pattern, names, tokenizer.bos_id, tokenizer.chat_template)
    return hashlib.sha256(pieces.digest() + repr(rest).encode()).hexdigest()


class Shards(Sequence[Sample | Bad]):
    """The shards end to end."""

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]):
        self._shards = [Shard(path) for path in paths]
        self._ends = list(itertools.accumulate(counts, initial=0))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index) - 1
        shard, record = self._shards[number], index - self._ends[number]
        place = f"{shard.path.name} record {record}"
        try:
            return decode_sample(shard.read(record))
        except InputError as error:
            return Bad(place, str(error))
        except OSError as error:
            return Bad(place, f"cannot be read ({one_line(error)})")


def _digest(packed: bytes) -> bytes:
    return hashlib.blake2b(packed, digest_size=DIGEST_BYTES).digest()


def _encode_weights(weights: Sequence[int | float]) -> bytes:
    """A byte each where they are 0 or 1, as nearly always, else four."""
    array = np.asarray(weights, "<f4")
    return array.astype("u1" if np.isin(array, (0, 1)).all() else "<f4").tobytes()


def _encode_document(document: Document, logs: LogKind) -> list[Any]:
    beside = packed(document, logs)
    return [
        np.asarray(document.tokens, "<i4").tobytes(),
        _encode_weights(document.weights),
        list(document.images),
        *([beside] if beside else []),
    ]


def _decode_document(
    tokens: bytes, weights: bytes, images: list[int], beside: dict[str, Any] | None = None
) -> Document:
    ids = np.frombuffer(tokens, "<i4").tolist()
    kind = "u1" if len(weights) == len(ids) else "<f4"
    weighed = np.frombuffer(weights, kind).astype(np.float32)
    found = unpacked(beside or {}, weighed)
    return Document(ids, weighed.astype(float).tolist(), tuple(images), found)


def _encoded_file(image: Any) -> bytes:
    if not isinstance(image, bytes):
        raise TypeError(f"image of a prepared sample: {type(image).__name__} instead of bytes")
    return image


def _is_index(content: Any) -> bool:
    """Whether it names the shards that it should, and no other files."""
    shards = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not 1 <= len(shards) <= MAX_SHARDS:
        return False
    names = [shard_name(number, len(shards)) for number in range(len(shards))]
    counts = shards.values()
    return (
        content.get("format") == FORMAT
        and isinstance(content.get("tokenizer"), str)
        and list(shards) == names
        and all(type(count) is int and 0 <= count < 1 << 48 for count in counts)
    )


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
