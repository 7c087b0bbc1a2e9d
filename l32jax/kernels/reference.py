"""Attention by key intervals, in plain jnp: the definition that every kernel is held against.

Query row i sees the keys start[i] <= j < stop[i] and nothing else. That one half-open range
expresses every mask of this family: causal packed text, images seen by text, decoding, padding.
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
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
    kv_heads, shared = k.shape[2], heads // k.shape[2]
    # Queries that share a key head stand below each other: one product a head, not `shared`.
    mesh, (rows, _, across, _) = jax.typeof(q).sharding.mesh, jax.typeof(q).sharding.spec
    apart = NamedSharding(mesh, PartitionSpec(rows, None, across, None, None))
    stacked = NamedSharding(mesh, PartitionSpec(rows, across, None, None))
    q = (q * scale).reshape(batch, time, kv_heads, shared, head_dim, out_sharding=apart)
    q = q.transpose(0, 2, 3, 1, 4).reshape(
        batch, kv_heads, shared * time, head_dim, out_sharding=stacked
    )
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)

    key = jnp.arange(k.shape[2])
    visible = (key >= start[..., None]) & (key < stop[..., None])
    visible = jnp.tile(visible, (1, shared, 1))[:, None]
    # A finite lowest score: rows without keys must not turn into inf - inf.
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores - largest), 0)
    total = weights.sum(axis=-1, keepdims=True)

    weights = weights.astype(v.dtype)
    mixed = jnp.einsum("bkts,bksh->bkth", weights, v, preferred_element_type=jnp.float32)
    mixed = (mixed / jnp.where(total > 0, total, 1)).astype(v.dtype)
    apart = NamedSharding(mesh, PartitionSpec(rows, across, None, None, None))
    mixed = mixed.reshape(batch, kv_heads, shared, time, head_dim, out_sharding=apart)
    mixed = mixed.transpose(0, 3, 1, 2, 4)
    whole = NamedSharding(mesh, PartitionSpec(rows, None, across, None))
    return mixed.reshape(batch, time, heads, head_dim, out_sharding=whole)
