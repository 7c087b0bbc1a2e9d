"""Log-probabilities of tokens, and what they come to in the documents of packed rows."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l32jax.model.llama import Batch, Llama, forward_batch
from l32jax.sharding import activation_spec
from l32jax.train.chunks import over_places
from l32jax.train.objectives import cross_entropy


def log_probabilities(model: Llama, batch: Batch, **options: Any) -> Float[Array, "b t"]:
    """Of every place's target, in nats; what `options` are, `llama.forward` says."""
    states = forward_batch(model, batch, **options).states
    table = model.decoder.scoring_table()

    def score(states: Array, targets: Array) -> Array:
        return -cross_entropy(model.decoder.logits(states, table), targets)

    num_words = model.decoder.config.decoder.vocab_size
    return over_places(score, (states, batch["targets"]), num_words)


def by_document(
    values: Float[Array, "b t"], document: Int[Array, "b t"], number: int
) -> Float[Array, "b u"]:
    """Sums over the first `number` documents of each row; padding is of document -1."""
    is_of = document[..., None] == jnp.arange(number)
    row = activation_spec("b")
    return jnp.einsum("bt,btu->bu", values, is_of.astype(values.dtype), out_sharding=row)


def of_pairs(
    values: Float[Array, "b u"], pairs: Int[Array, "b q 2"]
) -> tuple[Float[Array, "b q"], Float[Array, "b q"]]:
    """What the better and the worse document of each comparison have; anything where none is."""
    row = activation_spec("b")
    number = jnp.arange(values.shape[1])

    def of(which: Array) -> Array:
        is_it = which[..., None] == number
        return jnp.einsum("bu,bqu->bq", values, is_it.astype(values.dtype), out_sharding=row)

    return of(pairs[..., 0]), of(pairs[..., 1])
