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
    """The clipped policy gradient of answers, as `align.own_answers` gives them.

    At each of their tokens are an "advantage" [b t], its log-probability "old" when it was drawn,
    and the mean "reward" of all answers then. Weights are such that those of an answer sum to 1:
    means over tokens, then over answers.

    Args:
      reference: where `how.kl` is above 0.
      options: those of `llama.forward`: dtype, saved, attention.
    Returns:
      The sum to minimise, and the sums "loss", "accuracy" (tokens whose probability moved the
      right way), "reward", "ratio", "clipped", with a reference "kl", and "weight", the number of
      answers.
    """
    del rng  # nothing is drawn
    weights, advantage = batch["weights"], batch["advantage"]
    policy = log_probabilities(model, batch, **options)
    ratio = jnp.exp(policy - batch["old"])
    kept = jnp.clip(ratio, 1 - how.clip, 1 + how.clip)
    found = {
        "loss": -jnp.minimum(ratio * advantage, kept * advantage),
        "accuracy": ((ratio - 1) * advantage > 0).astype(jnp.float32),
        "reward": batch["reward"],
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
