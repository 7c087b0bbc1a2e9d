"""Learning from rewards of one's own answers (GRPO)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from l32jax.model.llama import Batch, Llama
from l32jax.objective_config import Grpo
from l32jax.train.answers import log_probabilities
from l32jax.train.objectives import Metrics


def grpo(
    model: Llama,
    batch: Batch,
    rng: Key[Array, ""],
    *,
    how: Grpo,
    reference: Llama | None = None,
    **options: Any,
) -> tuple[Float[Array, ""], Metrics]:
    """The clipped policy gradient of answers with an "advantage" [b t] at each of their tokens.

    Weights are such that those of an answer sum to 1: means over tokens, then over answers.

    Args:
      reference: where `how.kl` is above 0.
      options: those of `llama.forward`: dtype, saved, attention.
    Returns:
      The sum to minimise, and the sums "loss", "accuracy" (tokens whose probability moved the
      right way), "ratio", "clipped", with a reference "kl", and "weight", the number of answers.
    """
    del rng  # nothing is drawn
    weights, advantage = batch["weights"], batch["advantage"]
    policy = log_probabilities(model, batch, **options)
    # Without "old" the policy is the one that answered.
    old = batch["old"] if "old" in batch else jax.lax.stop_gradient(policy)
    ratio = jnp.exp(policy - old)
    kept = jnp.clip(ratio, 1 - how.clip, 1 + how.clip)
    found = {
        "loss": -jnp.minimum(ratio * advantage, kept * advantage),
        "accuracy": ((ratio - 1) * advantage > 0).astype(jnp.float32),
        "ratio": ratio,
        "clipped": (ratio * advantage > kept * advantage).astype(jnp.float32),
    }
    if reference is not None:
        held = jax.lax.stop_gradient(log_probabilities(reference, batch, **options))
        found["kl"] = jnp.exp(held - policy) - (held - policy) - 1
        found["loss"] += how.kl * found["kl"]
    sums = {
        name: jnp.sum(jnp.where(weights > 0, each * weights, 0)) for name, each in found.items()
    }
    return sums["loss"], sums | {"weight": jnp.sum(weights)}
