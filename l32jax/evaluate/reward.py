"""How often a reward model prefers the better answers, and whether it knows how sure it may be."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from rich.progress import track

from l32jax.align.judging import Judge
from l32jax.data.records import Bad
from l32jax.data.samples import Sample
from l32jax.data.sources.open import open_source
from l32jax.errors import InputError
from l32jax.generate.model import Model

BINS = 10


@dataclasses.dataclass(frozen=True)
class Preferences:
    """Of comparisons that a reward model was asked about.

    accuracy: share of them in which the better answer has the higher reward; half of a draw.
    calibration: expected calibration error (Guo et al., arXiv 1706.04599) of sigmoid(difference) as
      the probability that the preferred answer is the better one, in ten bins.
    loss: mean of -log sigmoid(better - worse), in nats.
    bad: records that could not be read, and count for nothing.
    """

    pairs: int
    accuracy: float
    calibration: float
    loss: float
    bad: int = 0


def preferences(model: Model, source: str) -> Preferences:
    """Of all comparisons in a source.

    InputError if the model has no reward head, or the source no comparisons.
    """
    judge = Judge(model)
    seeing = model.config.vision is not None
    samples = open_source(source, model.require_tokenizer(), with_images=seeing)
    gaps: list[float] = []
    bad: list[Bad] = []
    for number in track(range(len(samples)), "judging"):
        sample = samples[number]
        if isinstance(sample, Bad):
            bad.append(sample)
        else:
            gaps += _gaps(judge, sample)
    if not gaps:
        why = f" ({bad[0].place}: {bad[0].why})" if bad else ""
        raise InputError(f"source {source!r}: it has no answers to compare{why}; give comparisons")
    return dataclasses.replace(measured(gaps), bad=len(bad))


def _gaps(judge: Judge, sample: Sample) -> list[float]:
    if not sample.pairs:
        return []
    found = judge.documents(sample)
    return [found[pair.better] - found[pair.worse] for pair in sample.pairs]


def measured(gaps: Sequence[float]) -> Preferences:
    """From the differences of rewards, better less worse."""
    gap = np.asarray(gaps, float)
    right = np.where(gap == 0, 0.5, gap > 0)
    sure = 1 / (1 + np.exp(-np.abs(gap)))  # of the answer that it prefers
    bins = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    errors = [
        abs(right[bins == each].mean() - sure[bins == each].mean()) * (bins == each).mean()
        for each in np.unique(bins)
    ]
    return Preferences(
        pairs=len(gap),
        accuracy=float(right.mean()),
        calibration=float(sum(errors)),
        loss=float(np.logaddexp(0, -gap).mean()),
    )
