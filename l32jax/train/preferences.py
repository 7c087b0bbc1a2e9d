"""Learning which of two answers is better: preferences of a policy (DPO), and rewards.

Batches have "document" [b t], the number of each token's document in its row, "pairs" [b q 2], the
better and the worse document of each comparison, -1 for none, and its "margin" [b q].
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from l32jax.model.llama import Batch, Llama, forward_batch
from l32jax.objective_config import Dpo, Reward
from l32jax.train.answers import by_document, log_probabilities, of_pairs
from l32jax.train.objectives import Metrics


def dpo(
    model: Llama,
    batch: Batch,
    rng: Key[Array, ""],
    *,
    how: Dpo,
    reference: Llama | None = None,
    **options: Any,
) -> tuple[Float[Array, ""], Metrics]:
    """How much more a policy prefers the better answers than its reference does.

    Args:
      reference: None where the batch has its log-probabilities, "reference" [b t].
      options: those of `llama.forward`: dtype, saved, attention.
    Returns:
      The sum to minimise, and sums over comparisons: "loss", "accuracy" (the better answer gained
      more), "margin" and "better_gain" (in nats), "nll" of the better answers, and "weight".
    """
    del rng  # nothing is drawn
    pairs, weights = batch["pairs"], batch["weights"]
    number = 2 * pairs.shape[1]
    policy = log_probabilities(model, batch, **options)
    if reference is None:
        held = batch["reference"]
    else:
        held = jax.lax.stop_gradient(log_probabilities(reference, batch, **options))
    counted = weights * (1 - batch["format"]) if how.mask_format else weights
    gains = by_document((policy - held) * counted, batch["document"], number)
    if how.length_normalised:
        gains /= jnp.maximum(by_document(counted, batch["document"], number), 1)
    better, worse = of_pairs(gains, pairs)
    losses = {
        "sigmoid": -jax.nn.log_sigmoid(how.beta * (better - worse)),
        "ipo": (better - worse - 1 / (2 * how.beta)) ** 2,
    }[how.loss]
    tokens = jnp.maximum(by_document(weights, batch["document"], number), 1)
    nll, _ = of_pairs(by_document(-policy * weights, batch["document"], number) / tokens, pairs)
    found = {
        "loss": losses + how.nll * nll,
        "accuracy": (better > worse).astype(jnp.float32),
        "margin": better - worse,
        "better_gain": better,
        "nll": nll,
    }
    return _summed(found, pairs[..., 0] >= 0)


def reward(
    model: Llama, batch: Batch, rng: Key[Array, ""], *, how: Reward, **options: Any
) -> tuple[Float[Array, ""], Metrics]:
    """How sure a reward model is of the better answers.

    Returns:
      The sum to minimise, and sums over comparisons: "loss", "accuracy", "margin", "squared"
      rewards (half of both), and "weight".
    """
    del rng  # nothing is drawn
    pairs = batch["pairs"]
    better, worse = of_pairs(rewards(model, batch, 2 * pairs.shape[1], **options), pairs)
    squared = (better**2 + worse**2) / 2
    ranking = -jax.nn.log_sigmoid(better - worse - how.margin * batch["margin"])
    found = {
        "loss": ranking + how.l2 * squared,
        "accuracy": (better > worse).astype(jnp.float32),
        "margin": better - worse,
        "squared": squared,
    }
    return _summed(found, pairs[..., 0] >= 0)


def rewards(model: Llama, batch: Batch, number: int, **options: Any) -> Float[Array, "b u"]:
    """Of the first `number` documents of each row, in whose last token they are read."""
    states = forward_batch(model, batch, **options).states
    everywhere = model.decoder.rewards(states)
    document, stop = batch["document"], batch["stop"]
    is_of = document[..., None] == jnp.arange(number)
    ends = jnp.max(jnp.where(is_of, stop[..., None], 0), axis=1)  # [b u]
    is_last = jnp.any(is_of & (stop[..., None] == ends[:, None]), axis=-1)
    return by_document(everywhere * is_last, document, number)


def _summed(
    found: dict[str, Float[Array, "b q"]], is_there: Bool[Array, "b q"]
) -> tuple[Float[Array, ""], Metrics]:
    sums = {name: jnp.sum(jnp.where(is_there, each, 0)) for name, each in found.items()}
    return sums["loss"], sums | {"weight": jnp.sum(is_there.astype(jnp.float32))}
