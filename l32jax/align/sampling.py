"""Answers by our own engine: many to each prompt, each drawn with a key of its own."""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Generator, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt32

from l32jax.align.prompts import Prompt, Wanted
from l32jax.config import SamplingConfig
from l32jax.data.images import ImageSource, load_image
from l32jax.errors import InputError, one_line
from l32jax.generate.decode import bucket
from l32jax.generate.model import Model
from l32jax.model.parameters import Params, flatten

Encoded = tuple[list[int], list[ImageSource]]


@dataclasses.dataclass(frozen=True)
class Answer:
    """One of the answers to a prompt.

    number: which of them, from 0 on. text: without what ends it.
    num_tokens: that were drawn, the one that ends it included; tokens: they, if they are known.
    finished: it ended by itself, before it reached `max_new_tokens`.
    """

    prompt: Prompt
    number: int
    text: str
    num_tokens: int
    finished: bool
    tokens: Sequence[int] = ()


def answers(
    model: Model, prompts: Sequence[Prompt], *, number: int, sampling: SamplingConfig, rows: int
) -> Iterator[list[Answer]]:
    """All answers to one prompt after the other, in batches of prompts of about one length.

    What an answer is drawn with follows from the seed, its prompt and its number alone, so neither
    what stands beside it nor `rows` changes it, but for rounding where shapes differ. New
    parameters of the same shapes compile nothing new.

    Args:
      number: of answers to each prompt.
      rows: answers at a time; with more than this of a prompt, those of one prompt.
    Raises:
      InputError: a prompt cannot be asked: see `fault`.
    """
    width = max(rows // number, 1)
    asked = [(prompt, model.encode(prompt.messages)) for prompt in prompts]
    for alike in _of_one_shape(asked):
        for first in range(0, len(alike), width):
            part = alike[first : first + width]
            yield from _batch(model, part, width, number, sampling)


@dataclasses.dataclass(frozen=True)
class Engine:
    """A model in this process, as `run` asks it; the fields are those of `answers`."""

    model: Model
    sampling: SamplingConfig
    number: int
    rows: int

    def fault(self, prompt: Prompt) -> str | None:
        return fault(self.model, prompt, self.sampling)

    def answers(self, wanted: Sequence[Wanted]) -> Generator[list[Answer], None, None]:
        missing = {prompt.key: numbers for prompt, numbers in wanted}
        prompts = [prompt for prompt, _ in wanted]
        how = {"number": self.number, "sampling": self.sampling, "rows": self.rows}
        for told in answers(self.model, prompts, **how):
            yield [answer for answer in told if answer.number in missing[answer.prompt.key]]


def fault(model: Model, prompt: Prompt, sampling: SamplingConfig) -> str | None:
    """Why a model cannot be asked this, if so."""
    try:
        tokens, images = model.encode(prompt.messages)
        for image in images:
            load_image(image)
    except InputError as error:
        return one_line(error)
    if images and model.config.vision is None:
        return "it has images, and the model reads text only"
    limit = model.config.decoder.max_context
    if len(tokens) + sampling.max_new_tokens > limit:
        return f"its {len(tokens)} tokens and {sampling.max_new_tokens} new ones are above {limit}"
    return None


def fingerprint(params: Params) -> str:
    """Of all bits of the parameters: sums of them, which are the same however they are sharded."""
    found = hashlib.sha256()
    for path, leaf in sorted(flatten(params).items()):
        found.update(f"{path} {leaf.dtype} {leaf.shape} {_sum_of_bits(leaf)}".encode())
    return found.hexdigest()[:32]


@jax.jit
def _sum_of_bits(array: Array) -> UInt32[Array, ""]:
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)


def _of_one_shape(asked: Sequence[tuple[Prompt, Encoded]]) -> list[list[tuple[Prompt, Encoded]]]:
    """Longest first: what does not fit into memory fails at once."""
    groups = collections.defaultdict(list)
    for prompt, (tokens, images) in asked:
        groups[len(images), bucket(len(tokens))].append((prompt, (tokens, images)))
    return [groups[shape] for shape in sorted(groups, reverse=True)]


def _batch(
    model: Model,
    part: list[tuple[Prompt, Encoded]],
    width: int,
    number: int,
    sampling: SamplingConfig,
) -> Iterator[list[Answer]]:
    filled = part + part[-1:] * (width - len(part))  # one shape, one compilation
    drawn_by = _digests([prompt for prompt, _ in filled])
    keys = _keys(jax.random.key(sampling.seed), drawn_by, number)
    told = model.generate_tokens(
        [encoded for _, encoded in filled],
        keys=keys,
        copies=number,
        **dataclasses.asdict(sampling),
    )
    for index, (prompt, _) in enumerate(part):
        own = told[index * number : (index + 1) * number]
        yield [_answer(model, prompt, *numbered) for numbered in enumerate(own)]


def _answer(model: Model, prompt: Prompt, number: int, tokens: list[int]) -> Answer:
    tokenizer = model.require_tokenizer()
    finished = tokens[-1] in tokenizer.stop_ids
    text = tokenizer.decode(tokens[: len(tokens) - finished])
    return Answer(prompt, number, text, len(tokens), finished, tokens)


def _digests(prompts: Sequence[Prompt]) -> UInt32[np.ndarray, "prompts 2"]:
    """64 bits of each prompt's digest."""
    heads = [bytes.fromhex(prompt.key[:16]) for prompt in prompts]
    return np.frombuffer(b"".join(heads), ">u4").reshape(-1, 2).astype(np.uint32)


@functools.partial(jax.jit, static_argnames="number")
def _keys(seed: Key[Array, ""], prompts: UInt32[Array, "prompts 2"], number: int):
    """One for each answer, those of a prompt one after the other."""

    def key(prompt, answer):
        return functools.reduce(jax.random.fold_in, (*prompt, answer), seed)

    of_prompt = jax.vmap(key, in_axes=(None, 0))
    return jax.vmap(of_prompt, in_axes=(0, None))(prompts, np.arange(number)).reshape(-1)
