"""What a stage minimises: functions of (model, batch, rng) that return a loss and its metrics."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from l32jax.model.llama import Batch, Llama, batch_logits

Metrics = dict[str, Array]


def cross_entropy(logits: Float[Array, "b t v"], targets: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """Negative log-likelihood; selects by comparison, so the vocabulary may be sharded."""
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(logits * is_target, axis=-1)


def next_token(
    model: Llama, batch: Batch, rng: Key[Array, ""], **options: Any
) -> tuple[Float[Array, ""], Metrics]:
    """Mean cross-entropy of the weighted targets, and the share of them that score highest.

    `options` are those of `llama.forward`: dtype, saved, attention.
    """
    del rng  # nothing is drawn
    logits = batch_logits(model, batch, **options)
    weights, targets = batch["weights"], batch["targets"]
    total = jnp.maximum(weights.sum(), 1e-6)
    loss = jnp.sum(cross_entropy(logits, targets) * weights) / total
    right = jnp.sum((logits.argmax(axis=-1) == targets) * weights) / total
    return loss, {"loss": loss, "accuracy": right}
