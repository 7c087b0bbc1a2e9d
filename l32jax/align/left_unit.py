"""A unit of what models leave beside tokens: some records, cut, laid out in rows and scored."""

import dataclasses
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from l32jax.data.batches import own_rows, place
from l32jax.data.images import ImageSource, load_image
from l32jax.data.packing import RowShape, fit, in_order
from l32jax.data.records import Bad, too_many_bad
from l32jax.data.rows import make_row, stack
from l32jax.data.samples import Document, Sample
from l32jax.errors import InputError
from l32jax.generate.model import Model
from l32jax.model.llama import bind
from l32jax.model.parameters import Params
from l32jax.objective_config import Distill
from l32jax.train.distillation import Left, leave

MAX_BAD = 0.01
Numbered = tuple[Sequence[Sample | Bad], int]  # a source, and the number of a record of it
Scored = Callable[[dict[str, np.ndarray]], Left]


def scorer(models: Sequence[Model], how: Distill, top_k: int) -> Scored:
    """What models say of the rows of a batch, compiled once.

    Args:
      how: its teachers are these models.
    """
    params, mesh = [model.params for model in models], models[0].mesh

    @jax.jit
    def run(params: Sequence[Params], batch: dict[str, jax.Array]) -> Left:
        pairs = zip(how.teachers, params, strict=True)
        teachers = [bind(teacher.model, each) for teacher, each in pairs]
        return leave(teachers, batch, how=how, top_k=top_k)

    def score(batch: dict[str, np.ndarray]) -> Left:
        with jax.set_mesh(mesh):
            return Left(*map(own_rows, run(params, place(batch, mesh))))

    return score


def scored_samples(
    records: Sequence[Numbered], shape: RowShape, rows: int, score: Scored
) -> list[Sample]:
    """Pieces of the records that fit a row, with what is said of their tokens beside them.

    InputError if more than a hundredth of them is unusable.

    Args:
      rows: that are scored at a time.
    """
    pieces, bad = _pieces(records, shape)
    if too_many_bad(len(bad), len(records), MAX_BAD):
        raise InputError(
            f"{len(bad)} of {len(records)} records are unusable, such as {bad[0].place} "
            f"({bad[0].why}); mend them"
        )
    laid = in_order(pieces, shape)
    parts = (
        _scored(laid[first : first + rows], shape, rows, score)
        for first in range(0, len(laid), rows)
    )
    return [sample for part in parts for sample in part]


def _scored(
    rows: Sequence[list[Sample]], shape: RowShape, size: int, score: Scored
) -> Iterator[Sample]:
    full = [*rows, *[[]] * (size - len(rows))]
    made = [make_row(each, length=shape.length, vision=shape.vision) for each in full]
    left = score(stack(made))
    for row, samples in enumerate(rows):
        offset = 0
        for sample in samples:
            documents = []
            for document in sample.documents:
                documents.append(_with_targets(document, left, row, offset))
                offset += len(document.tokens)
            images = tuple(map(_encoded, sample.images))
            yield dataclasses.replace(sample, documents=tuple(documents), images=images)


def _encoded(image: ImageSource) -> bytes:
    """An image as a file; what is none yet becomes one that loses nothing."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    load_image(image).save(file := io.BytesIO(), "png")
    return file.getvalue()


def _pieces(records: Sequence[Numbered], shape: RowShape) -> tuple[list[Sample], list[Bad]]:
    """Samples that fit a row each; what is drawn of those with too much is the same every time."""
    pieces, bad = [], []
    for source, number in records:
        sample = source[number]
        try:
            if not isinstance(sample, Bad):
                pieces += fit(sample, shape, np.random.default_rng(number))
                continue
        except InputError as error:
            sample = Bad(sample.place, str(error))
        bad.append(sample)
    return pieces, bad


def _with_targets(document: Document, left: Left, row: int, offset: int) -> Document:
    """What is said at a place is of the token after it; nothing is of the first."""
    span = slice(offset, offset + len(document.tokens) - 1)
    names = {"reference": left.reference}
    if left.words.shape[-1]:
        names |= {"teacher_words": left.words, "teacher_logs": left.logs}
    found = {
        name: np.concatenate([np.zeros_like(array[row, :1]), array[row, span]])
        for name, array in names.items()
    }
    return dataclasses.replace(document, beside={**document.beside, **found})


def summary(samples: Sequence[Sample]) -> dict[str, float]:
    """Learned tokens, and the sums of their log-probabilities and of what the likeliest have."""
    documents = [document for sample in samples for document in sample.documents]
    sums = {"tokens": 0.0, "log_probability": 0.0, "mass": 0.0}
    for document in documents:
        learned = np.asarray(document.weights[1:]) > 0
        sums["tokens"] += float(learned.sum())
        sums["log_probability"] += float(document.beside["reference"][1:][learned].sum())
        if "teacher_logs" in document.beside:
            sums["mass"] += float(np.exp(document.beside["teacher_logs"][1:][learned]).sum())
    return sums
