"""What a model does on batches of a calibration set: scores, moments and its loss."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from l32jax.checkpoint.engine.transfer import SILENT, Progress
from l32jax.config import LlamaConfig
from l32jax.errors import InputError
from l32jax.model.activations import Place, Stream, Sum, Sums, begin, observe, products
from l32jax.model.llama import Batch, batch_logits, bind
from l32jax.model.parameters import Params


class Subject(NamedTuple):
    """A model on its way from one size to another; parameters are on the mesh."""

    config: LlamaConfig
    params: Params


class BlockScores(NamedTuple):
    """Mean squares over tokens at each place of a slot (`model.activations`), by group."""

    attention_norm: Float[np.ndarray, "l d"]
    heads: Float[np.ndarray, "l n h"]
    mlp_norm: Float[np.ndarray, "l d"]
    neurons: Float[np.ndarray, "l f"]
    query_norm: Float[np.ndarray, "l h"] | None
    key_norm: Float[np.ndarray, "l h"] | None


class Scores(NamedTuple):
    """Means over the calibration set of what `model.activations.Sums` has."""

    influence: Float[np.ndarray, "l"]
    blocks: tuple[BlockScores, ...]
    final_norm: Float[np.ndarray, "d"]
    vision: Float[np.ndarray, "d"] | None


class Calibration:
    """Batches on the mesh, and who hears how far each pass over them is, and for what."""

    def __init__(self, batches: Sequence[Batch], progress: Progress = SILENT, task: str = ""):
        self._batches, self._progress, self._task = batches, progress, task

    def scores(self, subject: Subject) -> Scores:
        self._begin("looking at activations", len(self._batches))
        sums = _added(self._told(partial(_observe, *subject), self._batches))
        blocks = (BlockScores(*map(_mean, block)) for block in sums.blocks)
        rest = _mean(sums.influence), tuple(blocks), _mean(sums.final_norm), _mean(sums.vision)
        return Scores(*rest)

    def moments(
        self, subject: Subject, place: Place
    ) -> Iterator[tuple[Float[np.ndarray, "a a"], ...]]:
        """By group, for each slot: the mean products of inputs at a place.

        One group's are there at a time; the stream of the whole calibration set is held on devices
        meanwhile, embed_dim values a token.
        """
        num_groups = subject.config.decoder.num_groups
        self._begin(f"correlating {place}", num_groups * len(self._batches))
        streams = [_begin(*subject, batch) for batch in self._batches]
        for group in range(num_groups):
            total = None
            for index, batch in enumerate(self._batches):
                streams[index], sums = _products(
                    *subject, batch, streams[index], jnp.int32(group), place
                )
                total = sums if total is None else jax.tree.map(jnp.add, total, sums)
                self._progress.advance(1)
            assert total is not None
            yield tuple(map(_mean, total))

    def loss(self, subject: Subject) -> float:
        """Nats a token."""
        self._begin("measuring the loss", len(self._batches))
        total, weight = _added(self._told(partial(_losses, *subject), self._batches))
        return float(total) / float(weight)

    def _begin(self, what: str, total: int) -> None:
        self._progress.begin(f"{self._task}: {what.replace('_', ' ')}", total)

    def _told(self, function: Any, batches: Iterable[Batch]) -> Iterator[Any]:
        for batch in batches:
            yield jax.block_until_ready(function(batch))
            self._progress.advance(1)


def _added(results: Iterator[Any]) -> Any:
    return reduce(partial(jax.tree.map, jnp.add), results)


def _mean(total: Sum | None) -> Any:
    if total is None:
        return None
    value, weight = np.asarray(total.value, np.float64), np.asarray(total.weight, np.float64)
    if (weight == 0).any():
        raise InputError(
            "calibration of the model: no text of it sees an image; take a source with images"
        )
    return value / weight.reshape(*weight.shape, *(1,) * (value.ndim - weight.ndim))


@partial(jax.jit, static_argnums=0)
def _observe(config: LlamaConfig, params: Params, batch: Batch) -> Sums:
    return observe(bind(config, params), batch)


@partial(jax.jit, static_argnums=0)
def _begin(config: LlamaConfig, params: Params, batch: Batch) -> Stream:
    return begin(bind(config, params), batch)


@partial(jax.jit, static_argnums=(0, 5), donate_argnums=3)
def _products(
    config: LlamaConfig,
    params: Params,
    batch: Batch,
    stream: Stream,
    group: Array,
    place: Place,
) -> tuple[Stream, tuple[Sum, ...]]:
    return products(bind(config, params), batch, stream, group, place)


@partial(jax.jit, static_argnums=0)
def _losses(config: LlamaConfig, params: Params, batch: Batch) -> tuple[Array, Array]:
    """Summed over targets, and their weight; selected by comparison, as words may be sharded."""
    logits = batch_logits(bind(config, params), batch)
    is_target = batch["targets"][..., None] == jnp.arange(logits.shape[-1])
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(logits * is_target, axis=-1)
    return jnp.sum(losses * batch["weights"]), batch["weights"].sum()
