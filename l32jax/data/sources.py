"""Sources by name: what a stage's mixture is made of.

easy-vqa/train            every question about each picture, each a short chat
easy-vqa/train/captions   what each picture shows, in two words, as far as its questions tell
easy-vqa/train/reasoned   the same pictures' questions, those two words and whether they fit the
                          question before each answer: "red circle, not blue. no"
easy-vqa/test             the untouched split
PATH.jsonl                a conversation a line: {"messages": [{"role": …, "content": …}, …]}; the
                          content is text, or a list of text and {"image": path beside the file}
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l32jax.config import DataConfig, LlamaConfig
from l32jax.data.batches import Batches, Mixture, make_batches
from l32jax.data.chat import Image, Message, encode_caption, encode_for_training
from l32jax.data.easy_vqa import EasyVqa, Scene, balanced, conclusion, description
from l32jax.data.images import load_image
from l32jax.data.samples import Batch, Document, Sample, VisionShape, make_row, mirror
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError

EASY_VQA = "easy-vqa/"
EASY_VQA_KINDS = ("train", "train/captions", "train/reasoned", "test")
# Of words that only the picture tells, as targets of a model that does not see it.
GUESS_WEIGHT = 0.1


@dataclasses.dataclass(frozen=True)
class Samples(Sequence[Sample]):
    """Records of any kind, as samples, which are made when looked at."""

    records: Sequence[Any]
    to_sample: Callable[[Any], Sample]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):
        return self.to_sample(self.records[index])


def open_source(name: str, tokenizer: Tokenizer, *, with_images: bool) -> Samples:
    """The named source; without images it asks the same questions blind."""
    if name.startswith(EASY_VQA):
        return _easy_vqa(name, tokenizer, with_images)
    if name.endswith(".jsonl"):
        return _conversations(Path(name), tokenizer, with_images)
    raise InputError(
        f"source {name!r} in the mixture: unknown; "
        f"use {EASY_VQA}{', '.join(EASY_VQA_KINDS)}, or a .jsonl file"
    )


def open_batches(
    data: DataConfig,
    model: LlamaConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    process_index: int,
    process_count: int,
) -> Batches:
    """The endless shuffled batches of a training stage."""
    vision = None
    if data.max_images:
        vision = VisionShape.of(model, max_images=data.max_images, max_tiles=data.max_tiles)

    def row(sample: Sample, rng: np.random.Generator) -> Batch:
        if data.mirror_images:
            sample = mirror(sample, rng)
        return make_row([fitting(sample, data.length, rng)], length=data.length, vision=vision)

    names, weights = zip(*data.mixture, strict=True)
    opened = [open_source(name, tokenizer, with_images=vision is not None) for name in names]
    return make_batches(
        Mixture(opened, weights),
        make_row=row,
        batch_size=data.batch_size,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
    )


def fitting(sample: Sample, length: int, rng: np.random.Generator) -> Sample:
    """Of a sample with several documents, as many as fit, drawn at random."""
    if sum(len(document.tokens) for document in sample.documents) <= length:
        return sample
    chosen, used = [], 0
    for index in rng.permutation(len(sample.documents)):
        document = sample.documents[index]
        if used + len(document.tokens) <= length:
            chosen.append(document)
            used += len(document.tokens)
    if not chosen:
        raise InputError(f"sample of more than {length} tokens: a row holds no more; lengthen rows")
    return dataclasses.replace(sample, documents=tuple(chosen))


def _easy_vqa(name: str, tokenizer: Tokenizer, with_images: bool) -> Samples:
    if (kind := name.removeprefix(EASY_VQA)) not in EASY_VQA_KINDS:
        raise InputError(
            f"source {name!r} in the mixture: easy-VQA has {', '.join(EASY_VQA_KINDS)}"
        )
    split, _, kind = kind.partition("/")
    scenes = list(EasyVqa("train" if split == "train" else "test"))
    if kind:
        scenes = [scene for scene in scenes if description(scene)]
    images = (0,) if with_images else ()

    @functools.cache  # of some hundred different questions with their answers
    def asked(text: str, shown: str, told: str) -> Document:
        reply = question(text, shown + told, images)
        tokens, weights = encode_for_training(tokenizer, reply)
        if not with_images:
            begin = weights.index(1.0)
            guessed = slice(begin, begin + len(tokenizer.encode(shown)))
            weights[guessed] = [GUESS_WEIGHT] * len(weights[guessed])
        return Document(tokens, weights, images)

    def documents(scene: Scene) -> Iterator[Document]:
        shown = description(scene) or ""  # where it is told, every scene has one
        if kind == "captions":
            yield Document(*encode_caption(tokenizer, shown, images), images)
            return
        for each in balanced(scene) if kind else scene.questions:
            if kind == "reasoned":
                yield asked(each.text, shown, conclusion(shown, each))
            else:
                yield asked(each.text, "", each.answer)

    @functools.cache  # scenes come round every epoch; a picture is a few thousand bytes
    def to_sample(scene: Scene) -> Sample:
        return Sample(tuple(documents(scene)), (load_image(scene.image),) if with_images else ())

    return Samples(scenes, to_sample)


def question(text: str, answer: str | None, images: Sequence[Any]) -> list[Message]:
    """A user's question about the images before it, and the answer if it is known."""
    asked = Message("user", (*(Image(image) for image in images), text))
    return [asked] if answer is None else [asked, Message("assistant", answer)]


def _conversations(path: Path, tokenizer: Tokenizer, with_images: bool) -> Samples:
    if not path.is_file():
        raise InputError(f"source {str(path)!r} in the mixture: no such file; check the path")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would cut inside of text
    except UnicodeDecodeError as error:
        raise InputError(f"source {str(path)!r} in the mixture: not UTF-8 ({error})") from None
    numbered_lines = [(n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not numbered_lines:
        raise InputError(f"source {str(path)!r} in the mixture: it is empty; check the path")

    def to_sample(numbered: tuple[int, str]) -> Sample:
        number, line = numbered
        try:
            messages = [_message(m, path.parent) for m in json.loads(line)["messages"]]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"line {number} of {path}: not a conversation ({error})") from None
        images = [part.source for m in messages for part in m.content if isinstance(part, Image)]
        if images and not with_images:
            raise InputError(f"line {number} of {path}: it has images; set max_images in the data")
        return Sample.single(*encode_for_training(tokenizer, messages), images)

    return Samples(numbered_lines, to_sample)


def _message(record: dict[str, Any], folder: Path) -> Message:
    content = record["content"]
    if isinstance(content, list):
        content = tuple(
            p if isinstance(p, str) else Image(_beside(folder, p["image"])) for p in content
        )
    elif not isinstance(content, str):
        raise TypeError("its content is neither text nor a list")
    return Message(record["role"], content)


def _beside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"image {name!r} lies outside the folder")
    return path
