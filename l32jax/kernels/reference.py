"""Attention by key intervals, in plain jnp: the definition that every kernel is held against.

Query row i sees the keys start[i] <= j < stop[i] and nothing else. That one half-open range
expresses every mask of this family: causal packed text, images seen by text, decoding, padding.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    start: Int[Array, "b t"],
    stop: Int[Array, "b t"],
    *,
    scale: float,
) -> Float[Array, "b t n h"]:
    """Grouped-query attention; softmax in float32; a row with an empty range gives exactly zero.

    Memory is quadratic in length. Gradients of empty rows are zero too, never NaN.
    """
    batch, time, heads, head_dim = q.shape
    grouped = q.reshape(batch, time, k.shape[2], heads // k.shape[2], head_dim)
    scores = scale * jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    key = jnp.arange(k.shape[1])
    visible = (key >= start[..., None]) & (key < stop[..., None])
    visible = visible[:, None, None]
    # A finite lowest value: rows without keys must not turn into inf - inf.
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True)) * visible
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    mixed = jnp.einsum(
        "bkgts,bskh->btkgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return mixed.reshape(q.shape).astype(q.dtype)
