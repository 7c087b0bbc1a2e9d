"""Choosing the next token from scores."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from l32jax.config import SamplingConfig
from l32jax.errors import InputError


def require_valid(config: SamplingConfig) -> None:
    if config.max_new_tokens < 1:
        raise InputError(f"max_new_tokens={config.max_new_tokens} must be at least 1")
    if not 0 <= config.temperature < math.inf or config.top_k < 0:
        raise InputError(
            f"temperature={config.temperature} and top_k={config.top_k} must be finite and not "
            "negative"
        )
    if not 0 < config.top_p <= 1 or not 0 <= config.min_p <= 1:
        raise InputError(f"top_p={config.top_p} and min_p={config.min_p} must lie between 0 and 1")


def truncate(
    scores: Float[Array, "b v"],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    min_p: Float[Array, ""],
) -> Float[Array, "b v"]:
    """-inf for all but the tokens that every rule keeps; the likeliest always stays.

    top_p keeps the smallest set of likeliest tokens whose probabilities reach it. Tokens that tie
    with the last one kept stay as well.
    """
    ranked = jnp.sort(scores, axis=-1, descending=True)
    probability = jax.nn.softmax(ranked, axis=-1)
    rank = jnp.arange(scores.shape[-1])
    kept = (rank < top_k) | (top_k == 0)
    kept &= (jnp.cumsum(probability, axis=-1) - probability < top_p) | (top_p >= 1)
    kept &= probability >= min_p * probability[:, :1]
    kept = kept.at[:, 0].set(True)
    lowest = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scores >= lowest, scores, -jnp.inf)


def sample(
    scores: Float[Array, "b v"],
    keys: Key[Array, "b"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    min_p: Float[Array, ""],
) -> Int[Array, "b"]:
    """One token a row, each row with its own key: its neighbours do not change its draw."""
    # The likeliest at 0, and no division by what float32 rounds to 0: tiny temperatures are greedy.
    scores = scores - scores.max(axis=-1, keepdims=True)
    scores = scores / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    scores = truncate(scores, top_k, top_p, min_p)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)
