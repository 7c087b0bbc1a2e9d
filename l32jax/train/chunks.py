"""What is computed from a model's scores of all words, without ever having all scores at once."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from l32jax.sharding import activation_spec

MAX_LOGITS = 2**28  # of one device at a time: 1 GiB, and as much again for their gradient


def over_places(score: Callable[..., Any], inputs: Any, num_words: int) -> Any:
    """score(*inputs) of all places of rows: trees of [b t ...] to a tree of [b t ...].

    A chunk of places at a time, and again for the gradient, where there would be more than
    `MAX_LOGITS` scores of so many words.
    """
    batch, time = jax.tree.leaves(inputs)[0].shape[:2]
    size = _chunk_size((batch, time), num_words)
    if size is None:
        return score(*inputs)
    chunks = jax.tree.map(partial(_chunked, size=size), inputs)
    again = jax.checkpoint(lambda chunk: score(*chunk), prevent_cse=False)  # it is in a loop
    return jax.tree.map(partial(_joined, time=time), jax.lax.map(again, chunks))


def _chunk_size(places: tuple[int, int], num_words: int) -> int | None:
    """Positions of each device that are scored at a time; None if it is all of them."""
    logits = NamedSharding(jax.sharding.get_abstract_mesh(), activation_spec("btv"))
    shape = logits.shard_shape((*places, num_words))
    if math.prod(shape) <= MAX_LOGITS:
        return None
    num_chunks = min(math.ceil(math.prod(shape) / MAX_LOGITS), shape[1])
    return math.ceil(shape[1] / num_chunks)


def _chunked(x: Float[Array, "b t *rest"] | Int[Array, "b t *rest"], size: int) -> Array:
    """[chunk b t *rest]: each with the next positions of every device, zeros past the last.

    Nothing moves between devices.
    """
    spec, shards = _places()
    batch, time, *rest = x.shape
    local = time // shards
    number = -(-local // size)
    x = x.reshape(batch, shards, local, *rest, out_sharding=spec)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, number * size - local), *[(0, 0)] * len(rest)])
    x = x.reshape(batch, shards, number, size, *rest, out_sharding=spec)
    x = jnp.moveaxis(x, 2, 0)
    return x.reshape(number, batch, -1, *rest, out_sharding=PartitionSpec(None, *spec))


def _joined(x: Float[Array, "chunk b part *rest"], time: int) -> Float[Array, "b t *rest"]:
    """The inverse of `_chunked`."""
    spec, shards = _places()
    number, batch, part, *rest = x.shape
    dealt = PartitionSpec(None, *spec)
    x = x.reshape(number, batch, shards, part // shards, *rest, out_sharding=dealt)
    x = jnp.moveaxis(x, 0, 2).reshape(batch, shards, -1, *rest, out_sharding=spec)
    return x[:, :, : time // shards].reshape(batch, time, *rest, out_sharding=spec)


def _places() -> tuple[PartitionSpec, int]:
    """How rows and their positions are sharded, and the devices that share a row."""
    rows, context, *_ = activation_spec("bt")
    return PartitionSpec(rows, context), jax.sharding.get_abstract_mesh().shape[context]
