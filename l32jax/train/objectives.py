"""What a stage minimises: functions of (model, batch, rng) that return sums over its targets.

The step divides them by the sum of weights, when those of all microbatches have come together.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from l32jax.model.decoder import Decoder
from l32jax.model.llama import Batch, Llama, forward_batch
from l32jax.sharding import activation_spec

Metrics = dict[str, Array]

MAX_LOGITS = 2**28  # of one device at a time: 1 GiB, and as much again for their gradient


def cross_entropy(logits: Float[Array, "b t v"], targets: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """Negative log-likelihood; selects by comparison, so the vocabulary may be sharded."""
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(logits * is_target, axis=-1)


def next_token(
    model: Llama, batch: Batch, rng: Key[Array, ""], *, z_loss: float = 0.0, **options: Any
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy of the weighted targets, and how many of them score highest.

    Logits are computed by the chunk, and again for their gradient, where there would be more of
    them than `MAX_LOGITS`.

    Args:
      z_loss: the weight of the squared logarithm of the softmax's denominator (PaLM, section 5).
      options: those of `llama.forward`: dtype, saved, attention.
    Returns:
      The sum to minimise, and the sums "loss", "accuracy" and "weight"; with a z-loss, "z_loss".
    """
    del rng  # nothing is drawn
    states = forward_batch(model, batch, **options).states
    inputs = states, batch["targets"], batch["weights"]
    table = model.decoder.scoring_table()  # fetched once: its gradient adds up in float32 as well
    score = partial(_score, model.decoder, bool(z_loss), table)
    size = _chunk_size(states, model.decoder.config.decoder.vocab_size)
    if size is None:
        sums = score(*inputs)
    else:
        chunks = jax.tree.map(partial(_chunked, size=size), inputs)
        again = jax.checkpoint(lambda chunk: score(*chunk), prevent_cse=False)  # it is in a loop
        sums = jax.lax.map(again, chunks)
        sums = jax.tree.map(lambda parts: parts.sum(axis=0), sums)
    return sums["loss"] + z_loss * sums.get("z_loss", 0.0), sums


def _score(
    decoder: Decoder,
    with_z_loss: bool,
    table: Float[Array, "v d"],
    states: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
) -> Metrics:
    logits = decoder.logits(states, table)
    sums = {
        "loss": jnp.sum(cross_entropy(logits, targets) * weights),
        "accuracy": jnp.sum((logits.argmax(axis=-1) == targets) * weights),
        "weight": jnp.sum(weights),
    }
    if with_z_loss:
        sums["z_loss"] = jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2 * weights)
    return sums


def _chunk_size(states: Float[Array, "b t d"], vocab_size: int) -> int | None:
    """Positions of each device that are scored at a time; None if it is all of them."""
    logits = NamedSharding(jax.sharding.get_abstract_mesh(), activation_spec("btv"))
    shape = logits.shard_shape((*states.shape[:2], vocab_size))
    if math.prod(shape) <= MAX_LOGITS:
        return None
    num_chunks = min(math.ceil(math.prod(shape) / MAX_LOGITS), shape[1])
    return math.ceil(shape[1] / num_chunks)


def _chunked(x: Float[Array, "b t *rest"] | Int[Array, "b t"], size: int) -> Array:
    """[chunk b t *rest]: each with the next positions of every device, which weigh 0 past the last.

    Nothing moves between devices.
    """
    rows, context, *_ = activation_spec("bt")
    shards = jax.sharding.get_abstract_mesh().shape[context]
    batch, time, *rest = x.shape
    local = time // shards
    number = -(-local // size)
    spec = PartitionSpec(rows, context)
    x = x.reshape(batch, shards, local, *rest, out_sharding=spec)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, number * size - local), *[(0, 0)] * len(rest)])
    x = x.reshape(batch, shards, number, size, *rest, out_sharding=spec)
    x = jnp.moveaxis(x, 2, 0)
    return x.reshape(number, batch, -1, *rest, out_sharding=PartitionSpec(None, *spec))
