"""Context parallelism: attention over rows whose positions are split over a mesh axis.

For C devices a row is cut into 2C chunks, and device i stores the chunks i and 2C-1-i one behind
the other ("balanced": Llama 3 paper, section 3.3.2). Causal queries see little early in a row and
much late in it, so every device has as much to do as the next.

None of this needs a mask. Queries carry their intervals of keys, in row order, wherever they are
stored. Keys are stored in ascending order on each device, so that what an interval of the row
covers of them is an interval of them: attention to one device's keys is one call of any kernel.

`Replicated`, `Gathered` and `Ring` each make of a backend one that keeps the same contract for the
local shards inside `jax.shard_map(..., check_vma=False)`.
"""

import dataclasses
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from l32jax.kernels import intervals

Method = Literal["gather", "ring"]
Layout = Literal["contiguous", "balanced"]

Queries = Float[Array, "b k g t h"]
Keys = Float[Array, "b k s h"]
Scores = Float[Array, "b k g t"]
Bounds = Int[Array, "b t"]
Shape = Array | jax.ShapeDtypeStruct


@runtime_checkable
class Backend(Protocol):
    """Attention on one device: a kernel's module, or one of the classes below."""

    def make_plan(self, start: Bounds, stop: Bounds, q: Shape, k: Shape) -> Any:
        """Arrays that tell the other two about the intervals; q and k need shapes and dtypes."""
        ...

    def forward(
        self, q: Queries, k: Keys, v: Keys, start: Bounds, stop: Bounds,
        *, scale: float, plan: Any = None,
    ) -> tuple[Queries, Scores]:  # fmt: skip
        """The result, in q's dtype, and the float32 log-sum-exp of each row's scores."""
        ...

    def backward(
        self, q: Queries, k: Keys, v: Keys, start: Bounds, stop: Bounds,
        lse: Scores, delta: Scores, dout: Queries, *, scale: float, plan: Any = None,
    ) -> tuple[Queries, Keys, Keys]:  # fmt: skip
        """dq, dk and dv in float32; delta is sum(dout * out, -1) minus the cotangent of lse."""
        ...


def split(
    backend: Backend, *, axis: str, method: Method, keys: Layout | Literal["replicated"]
) -> "Replicated | Gathered | Ring":
    """The backend for queries split over the mesh axis, in any order, and keys stored as said."""
    if keys == "replicated":
        return Replicated(backend, axis)
    return {"gather": Gathered, "ring": Ring}[method](backend, axis, keys)


def balanced_order(length: int, num_shards: int) -> Int[np.ndarray, "length"]:
    """Where in the row each position of balanced storage comes from: stored = row[order]."""
    chunks = _stored_chunks("balanced", num_shards)
    return np.arange(length).reshape(len(chunks), -1)[chunks].reshape(-1)


def row_order(length: int, num_shards: int) -> Int[np.ndarray, "length"]:
    """The inverse, where each position of the row is in balanced storage: row = stored[order]."""
    return np.argsort(balanced_order(length, num_shards))


@dataclasses.dataclass(frozen=True)
class Replicated:
    """Every device has all keys; only the queries are split."""

    backend: Backend
    axis: str

    def make_plan(self, start: Bounds, stop: Bounds, q: Shape, k: Shape) -> Any:
        return self.backend.make_plan(start, stop, q, k)

    def forward(
        self, q: Queries, k: Keys, v: Keys, start: Bounds, stop: Bounds,
        *, scale: float, plan: Any = None,
    ) -> tuple[Queries, Scores]:  # fmt: skip
        return self.backend.forward(q, k, v, start, stop, scale=scale, plan=plan)

    def backward(
        self, q: Queries, k: Keys, v: Keys, start: Bounds, stop: Bounds,
        lse: Scores, delta: Scores, dout: Queries, *, scale: float, plan: Any = None,
    ) -> tuple[Queries, Keys, Keys]:  # fmt: skip
        given = (q, k, v, start, stop, lse, delta, dout)
        dq, dk, dv = self.backend.backward(*given, scale=scale, plan=plan)
        return dq, *jax.lax.psum((dk, dv), self.axis)


@dataclasses.dataclass(frozen=True)
class Gathered:
    """Every device fetches the keys and values of all: one call, and memory for the whole row."""

    backend: Backend
    axis: str
    keys: Layout

    def make_plan(self, start: Bounds, stop: Bounds, q: Shape, k: Shape) -> Any:
        batch, heads, share, width = k.shape
        whole = (batch, heads, share * jax.lax.axis_size(self.axis), width)
        return self.backend.make_plan(start, stop, q, jax.ShapeDtypeStruct(whole, k.dtype))

    def forward(
        self, q: Queries, k: Keys, v: Keys, start: Bounds, stop: Bounds,
        *, scale: float, plan: Any = None,
    ) -> tuple[Queries, Scores]:  # fmt: skip
        k, v = self._whole(k), self._whole(v)
        return self.backend.forward(q, k, v, start, stop, scale=scale, plan=plan)

    def backward(
        self, q: Queries, k: Keys, v: Keys, start: Bounds, stop: Bounds,
        lse: Scores, delta: Scores, dout: Queries, *, scale: float, plan: Any = None,
    ) -> tuple[Queries, Keys, Keys]:  # fmt: skip
        k, v = self._whole(k), self._whole(v)
        given = (q, k, v, start, stop, lse, delta, dout)
        dq, dk, dv = self.backend.backward(*given, scale=scale, plan=plan)
        return dq, self._summed_share(dk), self._summed_share(dv)

    def _whole(self, share: Float[Array, "b k share h"]) -> Float[Array, "b k s h"]:
        stored = jax.lax.all_gather(share, self.axis, axis=2, tiled=True)
        return _reorder(stored, np.argsort(self._chunks()))

    def _summed_share(self, whole: Float[Array, "b k s h"]) -> Float[Array, "b k share h"]:
        stored = _reorder(whole, self._chunks())
        return jax.lax.psum_scatter(stored, self.axis, scatter_dimension=2, tiled=True)

    def _chunks(self) -> Int[np.ndarray, "chunks"]:
        return _stored_chunks(self.keys, jax.lax.axis_size(self.axis))


@dataclasses.dataclass(frozen=True)
class Ring:
    """Keys and values go round in C steps; no device ever has room for more than two shares.

    The loop is rolled: the kernel is compiled once for any C, and later steps' keys cannot be sent
    for early, as XLA did when it was not, which took room for all of them. What the last step
    sends nobody needs, but it is hidden behind the kernel like the rest.
    """

    backend: Backend
    axis: str
    keys: Layout

    def make_plan(self, start: Bounds, stop: Bounds, q: Shape, k: Shape) -> Any:
        """One for the keys of each step, stacked."""

        def at_step(step):
            seen = self._seen(step, start, stop, k.shape[2])
            return self.backend.make_plan(*seen, q, k)

        return jax.lax.map(at_step, jnp.arange(self._num_shards()))

    def forward(
        self, q: Queries, k: Keys, v: Keys, start: Bounds, stop: Bounds,
        *, scale: float, plan: Any = None,
    ) -> tuple[Queries, Scores]:  # fmt: skip
        def visit(step, carry):
            k, v, merged = carry
            upcoming = self._pass_on((k, v))
            seen = self._seen(step, start, stop, k.shape[2])
            out, lse = self.backend.forward(q, k, v, *seen, scale=scale, plan=_at(plan, step))
            return *upcoming, intervals.merge(merged, (out.astype(jnp.float32), lse))

        nothing = _zeros(q), jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
        _, _, (out, lse) = jax.lax.fori_loop(0, self._num_shards(), visit, (k, v, nothing))
        return out.astype(q.dtype), lse

    def backward(
        self, q: Queries, k: Keys, v: Keys, start: Bounds, stop: Bounds,
        lse: Scores, delta: Scores, dout: Queries, *, scale: float, plan: Any = None,
    ) -> tuple[Queries, Keys, Keys]:  # fmt: skip
        """What keys gather on their way travels a step behind them, and so overlaps as well."""

        def visit(step, carry):
            k, v, dq, *gathered = carry
            upcoming = self._pass_on((k, v))
            dk, dv = self._pass_on(gathered)
            seen = self._seen(step, start, stop, k.shape[2])
            given = (q, k, v, *seen, lse, delta, dout)
            part = self.backend.backward(*given, scale=scale, plan=_at(plan, step))
            return *upcoming, dq + part[0], dk + part[1], dv + part[2]

        carry = k, v, _zeros(q), _zeros(k), _zeros(v)
        _, _, dq, *gathered = jax.lax.fori_loop(0, self._num_shards(), visit, carry)
        return dq, *self._pass_on(gathered)

    def _pass_on(self, arrays):
        num_shards = self._num_shards()
        to_next = [(shard, (shard + 1) % num_shards) for shard in range(num_shards)]
        return jax.lax.ppermute(arrays, self.axis, to_next)

    def _seen(self, step, start: Bounds, stop: Bounds, num_keys: int) -> tuple[Bounds, Bounds]:
        """The intervals within the keys that are here at a step: those of the device `step` back.

        How many of these keys lie before each bound. An interval that reaches both chunks covers
        the end of the first and the beginning of the second, which are neighbours here.
        """
        num_shards = self._num_shards()
        owner = (jax.lax.axis_index(self.axis) - step) % num_shards
        chunks = jnp.stack(_chunks(self.keys, owner, num_shards))
        length = num_keys // len(chunks)

        def before(bound):
            return jnp.clip(bound[..., None] - chunks * length, 0, length).sum(axis=-1)

        return before(start), before(stop)

    def _num_shards(self) -> int:
        return jax.lax.axis_size(self.axis)


def _chunks(keys: Layout, shard, num_shards: int) -> tuple:
    """Which chunks of the row a device stores, in ascending order; shard may be traced."""
    return (shard,) if keys == "contiguous" else (shard, 2 * num_shards - 1 - shard)


def _stored_chunks(keys: Layout, num_shards: int) -> Int[np.ndarray, "chunks"]:
    """The chunks of all devices one behind the other."""
    return np.concatenate([_chunks(keys, shard, num_shards) for shard in range(num_shards)])


def _reorder(x: Float[Array, "b k s h"], chunks) -> Float[Array, "b k s h"]:
    """As many chunks of positions as `chunks` names, in that order."""
    pieces = jnp.split(x, len(chunks), axis=2)
    return jnp.concatenate([pieces[chunk] for chunk in chunks], axis=2)


def _at(plan: Any, step) -> Any:
    return jax.tree.map(lambda leaf: leaf[step], plan)


def _zeros(x: Array) -> Array:
    return jnp.zeros(x.shape, jnp.float32)
