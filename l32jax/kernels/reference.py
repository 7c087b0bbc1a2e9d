"""Attention by key intervals, in plain jnp: the definition, and how to compute it on a CPU.

Query row i sees the keys start[i] <= j < stop[i] and nothing else. That one half-open range
expresses every mask of this family: causal packed text, images seen by text, decoding, padding.

  b batch row    k key/value head    g query heads that share a key head
  t query        s key               h head dim

`definition` is what every kernel is held against. `forward` and `backward` compute the same in
memory linear in length: they walk over tiles of the scores, and only over those someone sees.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from l32jax.kernels import intervals
from l32jax.kernels.padding import pad

Queries = Float[Array, "b k g t h"]
Keys = Float[Array, "b k s h"]
Bound = Int[Array, "b t"]

# Measured on two cores: so few scores are fastest all at once, more of them tile by tile. The
# tile is what one head has in a step, 256 x 256 or, of fewer queries, as much.
DENSE_SCORES = 1 << 22
TILE_QUERIES = 256
TILE_SCORES = 1 << 16


def definition(
    q: Queries, k: Keys, v: Keys, start: Bound, stop: Bound, *, scale: float
) -> tuple[Queries, Float[Array, "b k g t"]]:
    """softmax(q k^T * scale) v over the keys that each row sees, and the log of the softmax's sum.

    The first has the dtype of q; the second, like everything between, is float32. A row that sees
    nothing gives exactly 0 and -inf, and has no gradient. Memory is quadratic in length.
    """
    visible = _visible(start, stop, k.shape[2])[:, None, None]
    scores = _product("bkgth,bksh->bkgts", q, k) * scale
    # A finite lowest score: rows without keys must not turn into inf - inf.
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.where(visible, jax.nn.softmax(scores), 0).astype(v.dtype)
    lse = jnp.where(visible.any(axis=-1), jax.nn.logsumexp(scores, axis=-1), -jnp.inf)
    return _product("bkgts,bksh->bkgth", weights, v).astype(q.dtype), lse


def make_plan(start: Bound, stop: Bound, q: Any, k: Any) -> "Block | None":
    """The tiles to walk over; None where all is computed at once. Of q and k shapes matter."""
    if _is_small(q, k):
        return None
    num_keys = k.shape[2]
    return _blocks(start, stop, _tile(q.shape[3], num_keys), num_keys)


def forward(
    q: Queries,
    k: Keys,
    v: Keys,
    start: Bound,
    stop: Bound,
    *,
    scale: float,
    plan: "Block | None" = None,
) -> tuple[Queries, Float[Array, "b k g t"]]:
    """The definition, tile by tile: (out of the dtype of q, log-sum-exp in float32)."""
    if _is_small(q, k):
        out, lse = _attend(_stack(q), k, v, start, stop, scale=scale)
    else:
        plan = plan or make_plan(start, stop, q, k)
        out, lse = _walk_forward(q, k, v, plan, scale=scale)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:-1])


def backward(
    q: Queries,
    k: Keys,
    v: Keys,
    start: Bound,
    stop: Bound,
    lse: Float[Array, "b k g t"],
    delta: Float[Array, "b k g t"],
    dout: Queries,
    *,
    scale: float,
    plan: "Block | None" = None,
) -> tuple[Queries, Keys, Keys]:
    """The gradients by q, k and v, in float32, with the weights computed again from `lse`.

    `delta` is sum(dout * out) over the head dim, less the gradient by `lse`.
    """
    # Finite numbers for rows that see nothing: their weights are 0 and must not meet a NaN.
    sees = lse > -jnp.inf
    lse, delta = jnp.where(sees, lse, 0), jnp.where(sees, delta, 0)
    if not _is_small(q, k):
        plan = plan or make_plan(start, stop, q, k)
        return _walk_backward(q, k, v, lse, delta, dout, plan, scale=scale)
    rows = (_stack(x) for x in (lse, delta, dout))
    dq, dk, dv = _attend_back_at_once(_stack(q), k, v, start, stop, *rows, scale=scale)
    return dq.reshape(q.shape), dk, dv


def with_mask(
    q: Queries,
    k: Keys,
    v: Keys,
    start: Bound,
    stop: Bound,
    *,
    scale: float,
    implementation: Literal["xla", "cudnn"],
) -> Queries:
    """JAX's own attention with the intervals as a boolean mask, which is quadratic in length.

    Differentiable; a row that sees nothing gives exactly zero and has zero gradients.
    """
    batch, kv_heads, shared, time, head_dim = q.shape
    visible = _visible(start, stop, k.shape[2])
    out = jax.nn.dot_product_attention(
        q.reshape(batch, kv_heads * shared, time, head_dim).swapaxes(1, 2),
        k.swapaxes(1, 2),
        v.swapaxes(1, 2),
        mask=visible[:, None],
        scale=scale,
        implementation=implementation,
    )
    # It gives rows without keys the mean of all values.
    out = jnp.where(visible.any(axis=-1)[..., None, None], out, 0)
    return out.swapaxes(1, 2).reshape(q.shape)


def _product(equation: str, *factors: Array) -> Float[Array, "..."]:
    return jnp.einsum(equation, *factors, preferred_element_type=jnp.float32)


def _visible(start: Bound, stop: Bound, num_keys: int) -> Bool[Array, "b t s"]:
    key = jnp.arange(num_keys)
    return (key >= start[..., None]) & (key < stop[..., None])


# Rows: the queries that share a key head stand below each other, head after head. That is one
# product a key head, and XLA:CPU writes the mask and the weights once, not once in each shape.


def _stack(x: Float[Array, "b k g t *h"]) -> Float[Array, "b k rows *h"]:
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _scores(
    q: Float[Array, "b k rows h"], k: Keys, start: Bound, stop: Bound, scale: float
) -> Float[Array, "b k rows s"]:
    visible = jnp.tile(_visible(start, stop, k.shape[2]), (1, q.shape[2] // start.shape[1], 1))
    return jnp.where(visible[:, None], _product("bkrh,bksh->bkrs", q, k) * scale, -jnp.inf)


def _top(scores: Float[Array, "b k rows s"]) -> Float[Array, "b k rows"]:
    top = scores.max(axis=-1)
    return jnp.where(top > -jnp.inf, top, 0)


def _attend(
    q: Float[Array, "b k rows h"], k: Keys, v: Keys, start: Bound, stop: Bound, *, scale: float
) -> tuple[Float[Array, "b k rows h"], Float[Array, "b k rows"]]:
    """The whole output and log-sum-exp at once, both in float32."""
    scores = _scores(q, k, start, stop, scale)
    top = _top(scores)
    weights = jnp.exp(scores - top[..., None])
    total = weights.sum(axis=-1)
    out = _product("bkrs,bksh->bkrh", weights.astype(v.dtype), v)
    return out / jnp.where(total > 0, total, 1)[..., None], top + jnp.log(total)


def _attend_back(
    q: Float[Array, "b k rows h"],
    k: Keys,
    v: Keys,
    start: Bound,
    stop: Bound,
    lse: Float[Array, "b k rows"],
    delta: Float[Array, "b k rows"],
    dout: Float[Array, "b k rows h"],
    *,
    scale: float,
) -> tuple[Float[Array, "b k rows h"], Keys, Keys]:
    """The gradients by q, k and v, in float32; `lse` and `delta` are finite."""
    weights = jnp.exp(_scores(q, k, start, stop, scale) - lse[..., None])
    by_weight = _product("bkrh,bksh->bkrs", dout, v) - delta[..., None]
    by_score = (weights * by_weight * scale).astype(q.dtype)
    return (
        _product("bkrs,bksh->bkrh", by_score, k),
        _product("bkrs,bkrh->bksh", by_score, q),
        _product("bkrs,bkrh->bksh", weights.astype(v.dtype), dout),
    )


def _attend_back_at_once(q, k, v, start, stop, lse, delta, dout, *, scale):
    """The same, of all scores: with the weights of `_attend`, which XLA then computes only once.

    They lack the division by their sum, which falls on the cotangents instead.
    """
    top = _top(_scores(q, k, start, stop, scale))
    share = jnp.exp(top - lse)
    dout = (dout * share[..., None]).astype(dout.dtype)
    return _attend_back(q, k, v, start, stop, top, delta * share, dout, scale=scale)


class Tile(NamedTuple):
    """A step of the walk: so many queries of one batch row, in all heads, by so many keys."""

    queries: int
    keys: int


class Block(NamedTuple):
    """The queries of one row of tiles, and the tiles [first, last) where they see something."""

    row: Int[Array, "*blocks"]
    query: Int[Array, "*blocks"]
    first: Int[Array, "*blocks"]
    last: Int[Array, "*blocks"]
    start: Int[Array, "*blocks 1 t"]
    stop: Int[Array, "*blocks 1 t"]


def _is_small(q: Any, k: Any) -> bool:
    return q.size // q.shape[-1] * k.shape[2] <= DENSE_SCORES


def _tile(time: int, num_keys: int) -> Tile:
    queries = _even(time, TILE_QUERIES)
    return Tile(queries, _even(num_keys, TILE_SCORES // queries))


def _even(length: int, most: int) -> int:
    """The size of equal parts, as few as possible, of at most `most`: little is left to fill up."""
    return -(-length // -(-length // most))


def _walk_forward(q, k, v, blocks, *, scale):
    time, num_keys = q.shape[3], k.shape[2]
    tile = _tile(time, num_keys)
    q, k, v = pad(q, 3, tile.queries), pad(k, 2, tile.keys), pad(v, 2, tile.keys)

    def attend(done, block):
        rows = _take(q, block)

        def add(index, so_far):
            seen = _look(block, k, v, index, tile.keys)
            return intervals.merge(so_far, _attend(rows, *seen, scale=scale))

        nothing = _zeros(rows), jnp.full_like(rows[..., 0], -jnp.inf, jnp.float32)
        ours = jax.lax.fori_loop(block.first, block.last, add, nothing)
        return tuple(_put(x, new, block) for x, new in zip(done, ours, strict=True)), None

    done = jnp.zeros_like(q), _zeros(q[..., 0])
    (out, lse), _ = jax.lax.scan(attend, done, blocks)
    return out[:, :, :, :time], lse[:, :, :, :time]


def _walk_backward(q, k, v, lse, delta, dout, blocks, *, scale):
    time, num_keys = q.shape[3], k.shape[2]
    tile = _tile(time, num_keys)
    of_queries = tuple(pad(x, 3, tile.queries) for x in (q, lse, delta, dout))
    k, v = pad(k, 2, tile.keys), pad(v, 2, tile.keys)

    def attend(done, block):
        rows, *others = (_take(x, block) for x in of_queries)

        def add(index, so_far):
            dq, dk, dv = so_far
            seen = _look(block, k, v, index, tile.keys)
            by_q, by_k, by_v = _attend_back(rows, *seen, *others, scale=scale)
            at = (block.row, 0, index * tile.keys, 0)
            return dq + by_q, _add_at(dk, by_k, at), _add_at(dv, by_v, at)

        dq, *totals = done
        by_q, *totals = jax.lax.fori_loop(block.first, block.last, add, (_zeros(rows), *totals))
        return (_put(dq, by_q, block), *totals), None

    done = _zeros(of_queries[0]), _zeros(k), _zeros(v)
    (dq, dk, dv), _ = jax.lax.scan(attend, done, blocks)
    return dq[:, :, :, :time], dk[:, :, :num_keys], dv[:, :, :num_keys]


def _zeros(x: Array) -> Float[Array, "..."]:
    return jnp.zeros_like(x, jnp.float32)


def _blocks(start: Bound, stop: Bound, tile: Tile, num_keys: int) -> Block:
    start, stop = intervals.clip(start, stop, num_keys)
    seen = intervals.hulls(start, stop, block=tile.queries, num_keys=num_keys)
    first, last = seen.first // tile.keys, -(-seen.last // tile.keys)
    row, block = jnp.indices(first.shape, jnp.int32)
    bounds = (pad(x, 1, tile.queries).reshape(-1, 1, tile.queries) for x in (start, stop))
    return Block(*(x.reshape(-1) for x in (row, block * tile.queries, first, last)), *bounds)


def _look(
    block: Block, k: Keys, v: Keys, index: Int[Array, ""], size: int
) -> tuple[Array, Array, Array, Array]:
    """The keys and values of a tile, and what the block sees of them."""
    at, shape = (block.row, 0, index * size, 0), (1, k.shape[1], size, k.shape[3])
    keys, values = (jax.lax.dynamic_slice(x, at, shape) for x in (k, v))
    return keys, values, *intervals.shift(block.start, block.stop, index * size, size)


def _add_at(x: Array, new: Array, at: tuple) -> Array:
    old = jax.lax.dynamic_slice(x, at, new.shape)
    return jax.lax.dynamic_update_slice(x, old + new, at)


def _take(x: Float[Array, "b k g t *h"], block: Block) -> Float[Array, "1 k rows *h"]:
    """The rows of a block."""
    at = (block.row, 0, 0, block.query, 0)[: x.ndim]
    shape = (1, *x.shape[1:3], block.start.shape[-1], *x.shape[4:])
    return _stack(jax.lax.dynamic_slice(x, at, shape))


def _put(
    x: Float[Array, "b k g t *h"], rows: Float[Array, "1 k rows *h"], block: Block
) -> Float[Array, "b k g t *h"]:
    """With the rows of a block in their place."""
    at = (block.row, 0, 0, block.query, 0)[: x.ndim]
    shape = (1, *x.shape[1:3], block.start.shape[-1], *x.shape[4:])
    return jax.lax.dynamic_update_slice(x, rows.reshape(shape).astype(x.dtype), at)
