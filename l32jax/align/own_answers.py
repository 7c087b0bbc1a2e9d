"""What a policy learns from its own answers: drawn, verified, and laid out in rows (GRPO)."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
from jax.sharding import Mesh

from l32jax.align.prompts import Prompt, prompt_of
from l32jax.align.sampling import Answer, answers, fault
from l32jax.align.verifiers import unverifiable, verdict, verifier
from l32jax.config import SamplingConfig
from l32jax.data.batches import own_rows, place
from l32jax.data.packing import in_order
from l32jax.data.records import Bad
from l32jax.data.rows import Batch, make_row, stack
from l32jax.data.samples import Document, Sample
from l32jax.data.sources.mixture import row_shape
from l32jax.data.sources.open import open_records
from l32jax.data.streams import damaged_state
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from l32jax.generate.model import Model
from l32jax.model.llama import bind
from l32jax.model.parameters import Params
from l32jax.objective_config import Grpo
from l32jax.run_config import TrainConfig
from l32jax.train.answers import log_probabilities

ROWS = 128  # answers that are drawn at a time
FRUITLESS = 50  # times in a row that no prompt's answers differ in their rewards
SMALL = 1e-4  # beside the spread of rewards (arXiv 2402.03300 divides by the spread alone)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Answers to a prompt with what is learned of them, as much as one row holds."""

    prompt: int
    documents: tuple[Document, ...]


class OwnAnswers(Iterator[Batch]):
    """Batches for a stage of GRPO, which depend on the policy: its parameters are set before each.

    The policy answers some prompts, and learns from all of these answers before it is asked again.
    The order of prompts, and what answers are drawn with, follow from the seed.

    Args:
      config: whose model is the stage's.
    """

    def __init__(self, config: TrainConfig, number: int, tokenizer: Tokenizer, mesh: Mesh):
        if jax.process_count() > 1:
            raise InputError(
                f"stage {config.stages[number].name!r} of {jax.process_count()} processes: own "
                "answers are drawn by one; start one process with all devices"
            )
        self._config, self._stage = config, config.stages[number]
        self._tokenizer, self._mesh = tokenizer, mesh
        self._seed = config.seed + number
        self._verify = verifier(self._how.verifier)
        self._asked = self._given = 0  # times that prompts were asked; batches since then
        self._drawn: list[Drawn] = []
        self.policy: Params = None

    def __next__(self) -> Batch:
        if self._given == self._how.epochs * len(self._rows()):
            self._ask()
        rows = self._rows()
        batch = self._batch(rows[self._given % len(rows)])
        self._given += 1
        return batch

    def get_state(self) -> bytes:
        content = [[each.prompt, [_packed(d) for d in each.documents]] for each in self._drawn]
        return bytes(msgpack.packb([self._asked, self._given, content]) or b"")

    def set_state(self, states: Sequence[bytes]) -> None:
        try:
            (state,) = states
            self._asked, self._given, content = msgpack.unpackb(state)
            self._drawn = [Drawn(n, tuple(map(_unpacked, documents))) for n, documents in content]
        except (ValueError, TypeError):
            raise damaged_state() from None

    def close(self) -> None:
        pass

    @property
    def _how(self) -> Grpo:
        assert isinstance(self._stage.objective, Grpo)
        return self._stage.objective

    @cached_property
    def _shape(self) -> Any:
        return row_shape(self._stage.data, self._config.model, self._stage.objective)

    @cached_property
    def _prompts(self) -> list[Prompt]:
        """All that can be asked, of all sources; of the others as many as the data allows."""
        records = [record for name, _ in self._stage.data.mixture for record in open_records(name)]
        found = [record if isinstance(record, Bad) else prompt_of(record) for record in records]
        model = Model(self._config.model, None, self._tokenizer, self._mesh)
        faults = [each.why if isinstance(each, Bad) else self._fault(model, each) for each in found]
        bad = [why for why in faults if why is not None]
        if len(bad) > self._stage.data.max_bad * len(found) or len(bad) == len(found):
            raise InputError(
                f"prompts of stage {self._stage.name!r}: {len(bad)} of {len(found)} cannot be "
                f"asked ({bad[0]}); mend them, or raise max_bad={self._stage.data.max_bad}"
            )
        return [
            p for p, why in zip(found, faults, strict=True) if isinstance(p, Prompt) and not why
        ]

    def _fault(self, model: Model, prompt: Prompt) -> str | None:
        why = fault(model, prompt, self._sampling())
        return why or unverifiable(self._verify, prompt.truth)

    def _sampling(self) -> SamplingConfig:
        how = self._how
        return SamplingConfig(
            max_new_tokens=how.max_new_tokens,
            temperature=how.temperature,
            seed=self._seed + 1_000_003 * self._asked,
        )

    def _ask(self) -> None:
        """Answers to the next prompts, until some teach something."""
        for _ in range(FRUITLESS):
            self._drawn, self._given = self._answered(), 0
            self._asked += 1
            if self._drawn:
                self._remember_probabilities()
                return
        raise InputError(
            f"prompts of stage {self._stage.name!r}: {FRUITLESS} times none of "
            f"{self._how.prompts} had answers of different rewards; give easier or harder ones"
        )

    def _answered(self) -> list[Drawn]:
        chosen = self._next_prompts()
        by_key = {self._prompts[index].key: index for index in chosen}
        model = Model(self._config.model, self.policy, self._tokenizer, self._mesh)
        told = answers(
            model,
            [self._prompts[index] for index in by_key.values()],
            number=self._how.answers,
            sampling=self._sampling(),
            rows=ROWS,
        )
        groups = {by_key[group[0].prompt.key]: group for group in told}
        rewards = {index: self._rewards(group) for index, group in groups.items()}
        mean = float(np.mean(list(rewards.values())))
        drawn: list[Drawn] = []
        for index in sorted(groups):
            if np.ptp(rewards[index]) > 0:
                drawn += self._learnable(model, index, groups[index], rewards[index], mean)
        return drawn

    def _next_prompts(self) -> list[int]:
        """Each prompt once before any comes again."""
        count, wanted = len(self._prompts), self._how.prompts
        places = range(self._asked * wanted, (self._asked + 1) * wanted)
        return [self._order(place // count)[place % count] for place in places]

    def _order(self, time: int) -> list[int]:
        random = np.random.default_rng([self._seed, time])
        return random.permutation(len(self._prompts)).tolist()

    def _rewards(self, group: Sequence[Answer]) -> np.ndarray:
        return np.array([verdict(self._verify, a.text, a.prompt.truth)[0] for a in group])

    def _learnable(
        self, model: Model, index: int, group: Sequence[Answer], rewards: np.ndarray, mean: float
    ) -> Iterator[Drawn]:
        advantages = (rewards - rewards.mean()) / (rewards.std() + SMALL)
        prompt, images = model.encode(self._prompts[index].messages)
        documents: list[Document] = []
        for answer, advantage in zip(group, advantages.tolist(), strict=True):
            document = _document(prompt, len(images), answer.tokens, advantage, mean)
            size = len(document.tokens)
            if size > self._shape.length:
                raise InputError(
                    f"answer of {size} tokens with its prompt: a row of stage "
                    f"{self._stage.name!r} holds {self._shape.length}; lengthen rows"
                )
            if sum(len(each.tokens) for each in documents) + size > self._shape.length:
                yield Drawn(index, tuple(documents))
                documents = []
            documents.append(document)
        yield Drawn(index, tuple(documents))

    def _rows(self) -> list[list[list[Sample]]]:
        """Batches of rows of samples; the last rows may be empty."""
        samples = [Sample(d.documents, tuple(self._prompts[d.prompt].images)) for d in self._drawn]
        rows, size = in_order(samples, self._shape), self._stage.data.batch_size
        rows += [[]] * (-len(rows) % size)
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    def _batch(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        shape = self._shape
        return stack(
            [
                make_row(row, length=shape.length, vision=shape.vision, beside=shape.beside)
                for row in rows
            ]
        )

    def _remember_probabilities(self) -> None:
        """Puts beside the tokens how likely the policy, as it is now, finds them."""
        found = []
        for rows in self._rows():
            with jax.set_mesh(self._mesh):
                logs = own_rows(
                    self._probabilities(self.policy, place(self._batch(rows), self._mesh))
                )
            for row, samples in enumerate(rows):
                offset = 0
                for document in (d for sample in samples for d in sample.documents):
                    end = offset + len(document.tokens)
                    found.append(np.concatenate([[0], logs[row, offset : end - 1]]))
                    offset = end
        remembered = iter(found)
        self._drawn = [
            Drawn(each.prompt, tuple(_with_old(d, next(remembered)) for d in each.documents))
            for each in self._drawn
        ]

    @cached_property
    def _probabilities(self) -> Any:
        config = self._config
        options = {
            "dtype": jnp.dtype(config.dtype),
            "attention": config.attention,
        }
        return jax.jit(lambda p, batch: log_probabilities(bind(config.model, p), batch, **options))


def _document(
    prompt: Sequence[int], images: int, answer: Sequence[int], advantage: float, mean: float
) -> Document:
    unlearned, size = len(prompt), len(answer)
    weights = np.repeat([0.0, 1 / size], [unlearned, size])
    is_learned = (weights > 0).astype(np.float32)
    beside = {
        "advantage": advantage * is_learned,
        "reward": mean * is_learned,
        "old": np.zeros(unlearned + size, np.float32),
    }
    return Document([*prompt, *answer], weights.tolist(), tuple(range(images)), beside)


def _with_old(document: Document, logs: np.ndarray) -> Document:
    beside = {**document.beside, "old": logs.astype(np.float32)}
    return dataclasses.replace(document, beside=beside)


def _packed(document: Document) -> list[Any]:
    beside = {n: np.asarray(each, "<f4").tobytes() for n, each in document.beside.items()}
    return [list(document.tokens), list(document.weights), list(document.images), beside]


def _unpacked(content: list[Any]) -> Document:
    tokens, weights, images, beside = content
    found = {name: np.frombuffer(data, "<f4") for name, data in beside.items()}
    return Document(tokens, weights, tuple(images), found)
