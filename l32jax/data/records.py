"""Records of any source, before they are tokens."""

import dataclasses
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from l32jax.data.chat import Image, Message, encode_document, encode_for_training
from l32jax.data.images import FORMATS, MAX_BYTES, MAX_PIXELS, ImageSource
from l32jax.data.samples import Document, Pair, Sample
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError, one_line

MAX_IMAGES = 1000  # of one record
JUDGED_RECORDS = 1000  # of fewer records too, as many may be bad as of this many


@dataclasses.dataclass(frozen=True)
class Record:
    """One item of a source as it was read: a document without roles, or a conversation.

    place: where it stands, for messages: "train.jsonl line 12", "shard-003.tar 000123".
    parts: plain text, an image and its caption, or text and images as they alternate.
    messages: turns of a conversation, each with any number of images; of a mere prompt the
      assistant has none.
    answers: to the conversation, from the best to the worst, where they are to be compared.
    scores: of these; of two with the same neither is better. Empty if the order is all there is.
    check: how answers to it can be verified, as verifiers of `align` read it.

    The `source` of an image is the encoded file as bytes, or a path on this machine.
    """

    place: str
    parts: tuple[str | Image, ...] = ()
    messages: tuple[Message, ...] = ()
    answers: tuple[Message, ...] = ()
    scores: tuple[float, ...] = ()
    check: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self):
        assert bool(self.parts) != bool(self.messages), self.place
        assert len(self.scores) in (0, len(self.answers)), self.place

    @property
    def images(self) -> list[Any]:
        """The sources of all images, in order."""
        contents = [message.content for message in self.messages]
        mixed = [self.parts, *(content for content in contents if not isinstance(content, str))]
        return [part.source for parts in mixed for part in parts if isinstance(part, Image)]


@dataclasses.dataclass(frozen=True)
class Bad:
    """An item that cannot be used: counted, logged, skipped."""

    place: str
    why: str


def too_many_bad(bad: int, seen: int, max_bad: float) -> bool:
    """Whether more of the records are unusable than the share that may be."""
    return bad > max_bad * max(seen, JUDGED_RECORDS)


def to_sample(record: Record, tokenizer: Tokenizer, *, with_images: bool) -> Sample | Bad:
    """What a model learns of a record.

    A document is learned as in pretraining: every word of it, and where it ends. Of a conversation
    what the assistant says is learned; of answers to compare, each is a document over the same
    images, in which the answer alone is. Of images the headers are looked at; they are decoded when
    their row is made, and what is wrong behind the header is an InputError then.
    """
    images = record.images
    if images and not with_images:
        return Bad(record.place, "it has images; set max_images in the data")
    if record.messages and not record.answers and not _answers_itself(record.messages):
        return Bad(record.place, "the assistant says nothing in it")
    try:
        for image in images:
            image_size(image)
        if record.answers:
            return _comparison(record, tokenizer)
        if record.messages:
            tokens, weights = encode_for_training(tokenizer, record.messages)
        else:
            tokens, weights = encode_document(tokenizer, record.parts)
    except InputError as error:
        return Bad(record.place, one_line(error))
    sample = Sample.single(tokens, weights, images)
    return dataclasses.replace(sample, place=record.place)


def _answers_itself(messages: Sequence[Message]) -> bool:
    return any(message.role == "assistant" for message in messages)


def _comparison(record: Record, tokenizer: Tokenizer) -> Sample:
    images = record.images
    seen = tuple(range(len(images)))
    special = np.array(sorted({*tokenizer.specials.values(), *tokenizer.stop_ids}))
    documents = []
    for answer in record.answers:
        tokens, weights = encode_for_training(tokenizer, (*record.messages, answer))
        is_format = np.isin(tokens, special).astype(np.float32)
        documents.append(Document(tokens, _last_run(weights), seen, {"format": is_format}))
    return Sample(tuple(documents), tuple(images), record.place, _pairs(record))


def _pairs(record: Record) -> tuple[Pair, ...]:
    """Each answer with every worse one."""
    scores = record.scores
    pairs = (
        Pair(i, j, scores[i] - scores[j] if scores else 0.0)
        for i, j in itertools.combinations(range(len(record.answers)), 2)
    )
    found = tuple(pair for pair in pairs if not scores or pair.margin > 0)
    if not found:
        raise InputError("answers to compare: none is better than another; leave the record out")
    return found


def _last_run(weights: Sequence[float]) -> list[float]:
    """Of a dialog's weights, those of its last answer alone."""
    end = max((i + 1 for i, weight in enumerate(weights) if weight), default=0)
    begin = next((i for i in range(end, 0, -1) if not weights[i - 1]), 0)
    return [weight if begin <= i < end else 0.0 for i, weight in enumerate(weights)]


@dataclasses.dataclass(frozen=True)
class SamplesOf(Sequence[Sample | Bad]):
    """Records as samples, each made when it is looked at."""

    records: Sequence[Record | Bad]
    tokenizer: Tokenizer
    with_images: bool

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):
        record = self.records[index]
        if isinstance(record, Bad):
            return record
        return to_sample(record, self.tokenizer, with_images=self.with_images)


def image_size(source: ImageSource) -> tuple[int, int]:
    """Height and width, of an encoded image as its header tells them; nothing is decoded.

    InputError for what is no image, or one larger than is decoded here.
    """
    if isinstance(source, Pillow.Image):
        return source.height, source.width
    if isinstance(source, np.ndarray):
        return source.shape[0], source.shape[1]
    if isinstance(source, bytes):
        where, file, size = f"{len(source)} bytes", io.BytesIO(source), len(source)
    else:
        where, file, size = f"{str(source)!r}", Path(source), _file_size(Path(source))
    if size > MAX_BYTES:
        raise InputError(f"image in {where}: more than {MAX_BYTES} bytes; make the file smaller")
    try:
        with Pillow.open(file, formats=FORMATS) as image:
            width, height = image.size
    except Pillow.DecompressionBombError:
        width, height = MAX_PIXELS, 2
    except Exception as error:  # noqa: BLE001  (headers of broken files raise almost anything)
        why = "empty" if not size else f"not an image that can be read ({one_line(error)})"
        raise InputError(f"image in {where}: {why}; replace it") from None
    if not 0 < width * height <= MAX_PIXELS:
        raise InputError(f"image in {where}: none or more than {MAX_PIXELS} pixels; replace it")
    return height, width


def _file_size(path: Path) -> int:
    try:
        if path.is_file():  # not a pipe or device, which might never end
            return path.stat().st_size
    except OSError as error:
        raise InputError(f"image in {str(path)!r}: {one_line(error)}; check the path") from None
    raise InputError(f"image in {str(path)!r}: no such file; check the path")
