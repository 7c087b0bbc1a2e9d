"""What rows have beside tokens and images: comparisons of answers, and what models say of targets.

document, pairs, margin      the number of each token's document in its row, the better and the
                             worse document of each comparison, and by how much; -1 for none
format                       1 where the target is a special token, such as the end of a turn
reference                    its log-probability by the model that a policy is held against
teacher_words, teacher_logs  a teacher's likeliest words there, and their log-probabilities
advantage, old               of an answer, and the target's log-probability when it was given
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from l32jax.data.samples import Sample
from l32jax.errors import InputError
from l32jax.objective_config import Distill, Dpo, Grpo, NextToken, Objective, Reward

DTYPES = {
    "format": np.float32,
    "reference": np.float32,
    "teacher_words": np.int32,
    "teacher_logs": np.float32,
    "advantage": np.float32,
    "reward": np.float32,
    "old": np.float32,
}
Fields = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside:
    """How many comparisons a row holds, and what is beside each target: (name, its shape there)."""

    pairs: int = 0
    targets: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @classmethod
    def of(cls, objective: Objective, max_pairs: int) -> "Beside":
        """What an objective learns from."""
        match objective:
            case Dpo(reference="data"):
                return cls(pairs=max_pairs, targets=(("format", ()), ("reference", ())))
            case Dpo():
                return cls(pairs=max_pairs, targets=(("format", ()),))
            case Reward():
                return cls(pairs=max_pairs)
            case Distill(top_k=int(words)) if words:
                return cls(targets=(("teacher_words", (words,)), ("teacher_logs", (words,))))
            case Grpo():
                return cls(targets=(("advantage", ()), ("reward", ()), ("old", ())))
            case NextToken() | Distill():
                return cls()

    def fields_of(self, samples: Sequence[Sample], length: int) -> Fields:
        """Those of a row of so many tokens; InputError if samples lack what there should be."""
        for sample in samples:
            self.require_learnable(sample)
        sizes = [len(document.tokens) for sample in samples for document in sample.documents]
        offsets = list(itertools.accumulate(sizes, initial=0))
        fields = _comparisons(samples, offsets, length, self.pairs) if self.pairs else {}
        return fields | {
            name: _beside(samples, offsets, name, (length, *shape)) for name, shape in self.targets
        }

    def require_learnable(self, sample: Sample) -> None:
        """InputError unless answers are compared in the sample if, and only if, they are to be."""
        if sample.pairs and not self.pairs:
            raise InputError(
                "comparison in the data: the stage learns from texts; give it a source of these, "
                "or the objective dpo or reward"
            )
        if self.pairs and not sample.pairs:
            raise InputError(
                "text in the data: the stage learns from comparisons of answers; give it a source "
                "of these"
            )


def _comparisons(
    samples: Sequence[Sample], offsets: Sequence[int], length: int, room: int
) -> Fields:
    document = np.full(length, -1, np.int32)
    for number, (begin, end) in enumerate(itertools.pairwise(offsets)):
        document[begin:end] = number
    pairs, margin = np.full((room, 2), -1, np.int32), np.zeros(room, np.float32)
    firsts = itertools.accumulate((len(sample.documents) for sample in samples), initial=0)
    found = [
        (first + better, first + worse, by)
        for first, sample in zip(firsts, samples, strict=False)
        for better, worse, by in sample.pairs
    ]
    if len(found) > room:
        raise InputError(f"{len(found)} comparisons in a row: it holds {room}; raise max_pairs")
    for number, (better, worse, by) in enumerate(found):
        pairs[number], margin[number] = (better, worse), by
    return {"document": document, "pairs": pairs, "margin": margin}


def _beside(
    samples: Sequence[Sample], offsets: Sequence[int], name: str, shape: tuple[int, ...]
) -> np.ndarray:
    """What documents have for each target, at the place that predicts it."""
    row = np.zeros(shape, DTYPES[name])
    documents = [document for sample in samples for document in sample.documents]
    for document, offset in zip(documents, offsets, strict=False):
        found = document.beside.get(name)
        if found is None or found.shape[1:] != shape[1:]:
            raise InputError(
                f"{name} in a sample: the stage learns from {list(shape[1:]) or 'one'} for each "
                f"token, and there is {'none' if found is None else list(found.shape[1:])}; take "
                "data that has it"
            )
        row[offset : offset + max(len(found) - 1, 0)] = found[1:]
    return row
