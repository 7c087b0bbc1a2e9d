"""What a stage minimises: functions of (model, batch, rng) that return sums over its targets.

The step divides them by the sum of weights, when those of all microbatches have come together.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from l32jax.model.decoder import Decoder
from l32jax.model.llama import Batch, Llama, forward_batch
from l32jax.train.chunks import over_places

Metrics = dict[str, Array]


def cross_entropy(logits: Float[Array, "b t v"], targets: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """Negative log-likelihood; selects by comparison, so the vocabulary may be sharded."""
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(logits * is_target, axis=-1)


def next_token(
    model: Llama, batch: Batch, rng: Key[Array, ""], *, z_loss: float = 0.0, **options: Any
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy of the weighted targets, and how many of them score highest.

    Args:
      z_loss: the weight of the squared logarithm of the softmax's denominator (PaLM, section 5).
      options: those of `llama.forward`: dtype, saved, attention.
    Returns:
      The sum to minimise, and the sums "loss", "accuracy" and "weight"; with a z-loss, "z_loss".
    """
    del rng  # nothing is drawn
    states, targets = forward_batch(model, batch, **options).states, batch["targets"]
    table = model.decoder.scoring_table()  # fetched once: its gradient adds up in float32 as well
    score = partial(_score, model.decoder, bool(z_loss), table)
    found = over_places(score, (states, targets), model.decoder.config.decoder.vocab_size)
    sums = {name: jnp.sum(each * batch["weights"]) for name, each in found.items()}
    sums["weight"] = jnp.sum(batch["weights"])
    return sums["loss"] + z_loss * sums.get("z_loss", 0.0), sums


def _score(
    decoder: Decoder,
    with_z_loss: bool,
    table: Float[Array, "v d"],
    states: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
) -> dict[str, Float[Array, "b t"]]:
    logits = decoder.logits(states, table)
    found = {
        "loss": cross_entropy(logits, targets),
        "accuracy": (logits.argmax(axis=-1) == targets).astype(jnp.float32),
    }
    if with_z_loss:
        found["z_loss"] = jax.nn.logsumexp(logits, axis=-1) ** 2
    return found
