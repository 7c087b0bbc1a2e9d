"""The programs of the GPU kernels: what one of them computes."""

import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from l32jax.kernels.gpu.layout import Tile

LOG2_E = math.log2(math.e)
# Where running maxima begin: below every score, yet finite, for -inf - -inf would be NaN.
FLOOR = -1e30


def _walk(span_ref, visit, carry):
    """Visits whole blocks, then those at either edge, which need a mask."""
    first, whole_first, whole_last, last = (span_ref[i] for i in range(4))
    carry = jax.lax.fori_loop(
        whole_first, whole_last, functools.partial(visit, masked=False), carry
    )
    before = whole_first - first

    def visit_edge(i, carry):
        block = first + i + jnp.where(i < before, 0, whole_last - whole_first)
        return visit(block, carry, masked=True)

    return jax.lax.fori_loop(0, before + last - whole_last, visit_edge, carry)


def _pieces(head_dim: int) -> list[pl.Slice]:
    """Slices of a head whose sizes are powers of two, the largest first."""
    sizes = [1 << bit for bit in reversed(range(head_dim.bit_length())) if head_dim >> bit & 1]
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    return [pl.Slice(begin, size) for begin, size in zip(begins, sizes, strict=True)]


def _load(ref, *index) -> list[Array]:
    """Vectors of ref[*index], in pieces."""
    return [ref[(*index, piece)] for piece in _pieces(ref.shape[-1])]


def _store(ref, vectors: Sequence[Array]):
    for piece, vector in zip(_pieces(ref.shape[-1]), vectors, strict=True):
        ref[:, piece] = vector.astype(ref.dtype)


def _zeros(rows: int, ref) -> list[Array]:
    return [jnp.zeros((rows, piece.size), jnp.float32) for piece in _pieces(ref.shape[-1])]


def _dot(left, right, *, contract: int):
    """Over the last dimension of `left` and that one of `right`; float32, exact products."""
    return jax.lax.dot_general(
        left,
        right,
        (((1,), (contract,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _scores(left: Sequence[Array], right: Sequence[Array]) -> Float[Array, "i j"]:
    """Products of vectors with vectors."""
    products = (_dot(a, b, contract=1) for a, b in zip(left, right, strict=True))
    return functools.reduce(operator.add, products)


def _mix(sums: Sequence[Array], weights, vectors: Sequence[Array]) -> list[Array]:
    """The sums, and to them vectors by their weights, rounded to the vectors' dtype."""
    weights = weights.astype(vectors[0].dtype)
    return [a + _dot(weights, b, contract=0) for a, b in zip(sums, vectors, strict=True)]


def forward_program(
    span_ref, start_ref, stop_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, tile, scale
):
    q, start, stop = _load(q_ref, slice(None)), start_ref[...], stop_ref[...]
    scale *= LOG2_E  # the hardware's exponential is that of two

    def visit(block, carry, *, masked):
        sums, top, total = carry
        keys = pl.ds(block * tile.keys, tile.keys)
        scores = _scores(q, _load(k_ref, keys))
        if masked:
            scores = jnp.where(_visible(block, tile, start, stop), scores, -jnp.inf)
        # Scaled after the maximum: one multiply-add a score.
        new_top = jnp.maximum(top, scores.max(axis=1) * scale)
        weights = jnp.exp2(scores * scale - new_top[:, None])
        fade = jnp.exp2(top - new_top)
        sums = _mix([fade[:, None] * part for part in sums], weights, _load(v_ref, keys))
        return sums, new_top, fade * total + weights.sum(axis=1)

    top = jnp.full(tile.rows, FLOOR, jnp.float32)
    carry = (_zeros(tile.rows, v_ref), top, jnp.zeros(tile.rows, jnp.float32))
    sums, top, total = _walk(span_ref, visit, carry)
    sees = total > 0
    total = jnp.where(sees, total, 1)
    _store(out_ref, [part / total[:, None] for part in sums])
    lse_ref[...] = jnp.where(sees, top / LOG2_E + jnp.log(total), -jnp.inf)


def _visible(block, tile: Tile, start, stop) -> Bool[Array, "rows keys"]:
    key = block * tile.keys + jnp.arange(tile.keys)[None, :]
    return (key >= start[:, None]) & (key < stop[:, None])


def dq_program(
    span_ref, start_ref, stop_ref, q_ref, k_ref, v_ref, lse_ref, delta_ref, dout_ref, dq_ref,
    *, tile, scale,
):  # fmt: skip
    q, dout = _load(q_ref, slice(None)), _load(dout_ref, slice(None))
    start, stop, delta = start_ref[...], stop_ref[...], delta_ref[...]
    lse = lse_ref[...] * LOG2_E

    def visit(block, dq, *, masked):
        keys = pl.ds(block * tile.keys, tile.keys)
        k = _load(k_ref, keys)
        weights = jnp.exp2(_scores(q, k) * (scale * LOG2_E) - lse[:, None])
        if masked:  # after the exponential: lse is -inf in rows that see nothing
            weights = jnp.where(_visible(block, tile, start, stop), weights, 0)
        slopes = weights * (_scores(dout, _load(v_ref, keys)) - delta[:, None])
        return _mix(dq, slopes, k)

    dq = _walk(span_ref, visit, _zeros(tile.rows, q_ref))
    _store(dq_ref, [part * scale for part in dq])


def dkv_program(
    span_ref, start_ref, stop_ref, q_ref, k_ref, v_ref, lse_ref, delta_ref, dout_ref,
    dk_ref, dv_ref, *, tile, scale,
):  # fmt: skip
    k, v = _load(k_ref, slice(None)), _load(v_ref, slice(None))
    key_block = pl.program_id(0)

    def visit(block, carry, *, group, masked):
        dk, dv = carry
        rows = pl.ds(block * tile.rows, tile.rows)
        q, dout = _load(q_ref, group, rows), _load(dout_ref, group, rows)
        lse = lse_ref[group, rows] * LOG2_E
        # Keys stand in the rows here: no product needs a transpose of what was just computed.
        weights = jnp.exp2(_scores(k, q) * (scale * LOG2_E) - lse[None, :])
        if masked:
            visible = _visible(key_block, tile, start_ref[rows], stop_ref[rows])
            weights = jnp.where(visible.T, weights, 0)
        dv = _mix(dv, weights, dout)
        slopes = weights * (_scores(v, dout) - delta_ref[group, rows][None, :])
        return _mix(dk, slopes, q), dv

    def visit_head(group, carry):
        return _walk(span_ref, functools.partial(visit, group=group), carry)

    nothing = (_zeros(tile.keys, k_ref), _zeros(tile.keys, v_ref))
    dk, dv = jax.lax.fori_loop(0, q_ref.shape[0], visit_head, nothing)
    _store(dk_ref, [part * scale for part in dk])
    _store(dv_ref, dv)
