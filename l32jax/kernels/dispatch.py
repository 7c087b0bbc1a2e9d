"""The door to attention: one definition, several implementations, and the one place that shards it.

Everything here is about arrays over the whole mesh. What computes on a device is a backend
(`context.Backend`): functions of heads-major arrays that know nothing of meshes. Differentiation
and sharding happen here, once, around any of them.
"""

import dataclasses
import functools
import logging
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from l32jax.kernels import context, reference
from l32jax.kernels.context import Backend
from l32jax.kernels.gpu import backend as gpu
from l32jax.kernels.tpu import backend as tpu
from l32jax.kernels.tpu.chips import LANES
from l32jax.sharding import CONTEXT_AXIS

logger = logging.getLogger(__name__)

Impl = Literal["auto", "reference", "tpu", "gpu", "xla", "cudnn"]
BACKENDS: dict[str, Backend] = {"reference": reference, "tpu": tpu, "gpu": gpu}
# With these two saved, the backward pass never computes attention again.
SAVED_NAMES = ("attention_out", "attention_lse")


def attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    start: Int[Array, "b t"],
    stop: Int[Array, "b t"],
    *,
    scale: float,
    impl: Impl = "auto",
    across: context.Method = "gather",
    order: context.Layout = "balanced",
    plan: Any = None,
) -> Float[Array, "b t n h"]:
    """Query row i sees the keys start[i] <= j < stop[i]; a row that sees nothing gives zeros.

    Grouped-query attention in bfloat16 or float32, with float32 softmax and accumulation. Nothing
    quadratic in length is stored (but for "xla" and "cudnn"), forward or backward.

    Arrays may be sharded: b, n and k over any axes of the mesh, t over the axis "context", in any
    order of rows. Keys are then whole on every device, or sharded over that axis too.

    Args:
      impl: "reference" (jnp, any platform), "tpu" or "gpu" (Pallas), "xla" or "cudnn" (JAX's own,
        with the intervals as a dense mask); "auto" takes the kernel of the platform.
      across: how devices get the keys that are sharded over the context axis.
      order: of these keys: that of the row, or `context.balanced_order`.
      scale: what scores are multiplied by; positive.
      plan: `make_plan`'s for these intervals, shapes and dtypes, which layers that have them
        share. Another's gives wrong results.

    Raises:
      ValueError: shapes that do not go together, or an implementation that cannot do this.
    """
    if impl in ("xla", "cudnn"):
        _require_matching(q, k, v, start, stop)
        return _with_mask(q, k, v, start, stop, scale=scale, impl=impl)
    out, _ = attention_and_lse(
        q, k, v, start, stop, scale=scale, impl=impl, across=across, order=order, plan=plan
    )
    return out


def attention_and_lse(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    start: Int[Array, "b t"],
    stop: Int[Array, "b t"],
    *,
    scale: float,
    impl: Impl = "auto",
    across: context.Method = "gather",
    order: context.Layout = "balanced",
    plan: Any = None,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """`attention`, and the float32 log-sum-exp of each row's scores: -inf where it sees nothing.

    Results over different keys merge by it (`intervals.merge`). Both outputs have gradients.
    """
    _require_matching(q, k, v, start, stop)
    place = _Place.of(q, k)
    _require_chunks(k.shape[1], place, order)
    if impl in ("xla", "cudnn"):
        raise ValueError(f"impl={impl!r}: it gives no log-sum-exp; use `attention`")
    backend = _backend(impl, place, across, order, _shape_of(q, k))
    grouped = _split_heads(q, k.shape[2], place)
    keyed = (k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
    bounds = _placed((start, stop), place)
    results: Any = _attend(_How(backend, scale, place), grouped, *keyed, *bounds, plan)
    out, lse = results
    out, lse = out.transpose(0, 3, 1, 2, 4), lse.transpose(0, 3, 1, 2)
    return _merge_heads(out, place), _merge_heads(lse, place)


def cached_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "l b k s h"],
    v: Float[Array, "l b k s h"],
    layer: Int[Array, ""],
    start: Int[Array, "b t"],
    stop: Int[Array, "b t"],
    *,
    scale: float,
    impl: Impl = "auto",
    plan: Any = None,
) -> Float[Array, "b t n h"]:
    """`attention` to one layer of caches that hold all, heads-major; it has no gradient.

    On TPU few queries read their part of the cache in place: a slice of it would be a copy.
    """
    one, other = jax.eval_shape(
        lambda *arrays: [array[0].transpose(0, 2, 1, 3) for array in arrays], k, v
    )
    _require_matching(q, one, other, start, stop)
    place = _Place.of(q, one)
    if impl in ("xla", "cudnn"):
        k, v = (array[layer].transpose(0, 2, 1, 3) for array in (k, v))
        return attention(q, k, v, start, stop, scale=scale, impl=impl)
    backend = _backend(impl, place, "gather", "balanced", _shape_of(q, one))

    def local(q, k, v, layer, start, stop, plan):
        if backend is not tpu:
            k, v, layer = k[layer], v[layer], None
        options = {} if layer is None else {"layer": layer}
        return backend.forward(q, k, v, start, stop, scale=scale, plan=_own(plan), **options)[0]

    stacked = PartitionSpec(None, *place.keyed)
    specs = (place.queries, stacked, stacked, PartitionSpec(), *(place.bounds,) * 3)
    run = _on_shards(local, place, specs, place.queries)
    start, stop = _placed((start, stop), place)
    out = run(_split_heads(q, k.shape[2], place), k, v, layer, start, stop, plan)
    return _merge_heads(out.transpose(0, 3, 1, 2, 4), place)


def laid_out_as_read(cache: Float[Array, "l b k s h"]) -> Float[Array, "l b k s h"]:
    """In memory as `cached_attention` reads it, and no other way.

    What writes a few keys would have it otherwise, and XLA then turns the caches of all layers
    round for every layer.
    """
    if _platform() != "tpu":
        return cache
    across = cache.shape[-1] % LANES != 0  # heads narrower than a register lie across it
    order = (0, 1, 2, 4, 3) if across else (0, 1, 2, 3, 4)
    return with_layout_constraint(cache, MemoryLayout(major_to_minor=order))


def make_plan(
    start: Int[Array, "b t"],
    stop: Int[Array, "b t"],
    q: Array | jax.ShapeDtypeStruct,
    k: Array | jax.ShapeDtypeStruct,
    *,
    impl: Impl = "auto",
    across: context.Method = "gather",
    order: context.Layout = "balanced",
) -> Any:
    """What a kernel needs to know of the intervals: made once a step, given to every layer.

    Of q [b t n h] and k [b s k h] only shapes, dtypes and shardings matter. None where the
    implementation has no use for one.
    """
    place = _Place.of(q, k)
    if impl in ("xla", "cudnn"):
        return None
    backend = _backend(impl, place, across, order, _shape_of(q, k))
    queries, keys = _local_shapes(q, k)

    def local(start, stop):
        # Whatever a plan is made of, each device has its own: two dimensions say which one's.
        plan = backend.make_plan(start, stop, queries, keys)
        return jax.tree.map(lambda leaf: leaf[None, None], plan)

    run = _on_shards(local, place, (place.bounds,) * 2, place.bounds)
    return run(*_placed((start, stop), place))


def _local_shapes(q, k) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Of one device's part, heads-major."""

    def local(array):
        kind = jax.typeof(array)
        return kind.shape if kind.sharding.mesh.empty else kind.sharding.shard_shape(kind.shape)

    (batch, time, heads, width), (_, num_keys, kv_heads, _) = local(q), local(k)
    return (
        jax.ShapeDtypeStruct((batch, kv_heads, heads // kv_heads, time, width), q.dtype),
        jax.ShapeDtypeStruct((batch, kv_heads, num_keys, width), k.dtype),
    )


class _Place(NamedTuple):
    """The mesh axes of each dimension; all None without a mesh."""

    rows: Any
    context: Any
    heads: Any
    keys: Any
    sharded: bool
    num_shards: int  # of the context axis

    @classmethod
    def of(cls, q, k) -> "_Place":
        mesh, of_q = jax.typeof(q).sharding.mesh, jax.typeof(q).sharding.spec
        of_k = jax.typeof(k).sharding.spec
        (rows, queries, heads, width), (key_rows, keys, kv_heads, _) = of_q, of_k
        alike = rows == key_rows and heads == kv_heads and width is None
        if not alike or queries not in (None, CONTEXT_AXIS) or keys not in (None, queries):
            raise ValueError(
                f"queries sharded {of_q} and keys {of_k}: rows and heads must be over the same "
                f"axes, positions over {CONTEXT_AXIS!r} or none, keys only where queries are"
            )
        num_shards = mesh.shape[queries] if queries else 1
        return cls(rows, queries, heads, keys, not mesh.empty, num_shards)

    @property
    def bounds(self) -> PartitionSpec:
        return PartitionSpec(self.rows, self.context)

    @property
    def queries(self) -> PartitionSpec:
        return PartitionSpec(self.rows, self.heads, None, self.context)

    @property
    def keyed(self) -> PartitionSpec:
        return PartitionSpec(self.rows, self.heads, self.keys)


@dataclasses.dataclass(frozen=True)
class _How:
    backend: Backend
    scale: float
    place: _Place


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, q, k, v, start, stop, plan):
    """Heads-major [b k g t h] and [b k s h], as backends have them."""
    return _attend_forward(how, q, k, v, start, stop, plan)[0]


def _attend_forward(how: _How, q, k, v, start, stop, plan):
    place = how.place
    queries, keyed, bounds = place.queries, place.keyed, place.bounds

    def local(q, k, v, start, stop, plan):
        return how.backend.forward(q, k, v, start, stop, scale=how.scale, plan=_own(plan))

    specs = (queries, keyed, keyed, bounds, bounds, bounds)
    results = _on_shards(local, place, specs, (queries, queries))(q, k, v, start, stop, plan)
    out, lse = map(checkpoint_name, results, SAVED_NAMES)
    return (out, lse), (q, k, v, start, stop, plan, out, lse)


def _attend_backward(how: _How, saved, cotangents):
    q, k, v, start, stop, plan, out, lse = saved
    dout, dlse = cotangents
    place = how.place
    queries, keyed, bounds = place.queries, place.keyed, place.bounds
    # Where lse is -inf nothing depends on it.
    product = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    delta = product - jnp.where(lse > -jnp.inf, dlse, 0)

    def local(q, k, v, start, stop, lse, delta, dout, plan):
        gradients = how.backend.backward(
            q, k, v, start, stop, lse, delta, dout, scale=how.scale, plan=_own(plan)
        )
        return tuple(g.astype(x.dtype) for g, x in zip(gradients, (q, k, v), strict=True))

    specs = (queries, keyed, keyed, bounds, bounds, queries, queries, queries, bounds)
    run = _on_shards(local, place, specs, (queries, keyed, keyed))
    return *run(q, k, v, start, stop, lse, delta, dout, plan), None, None, None


def _own(plan):
    return jax.tree.map(lambda leaf: leaf[0, 0], plan)


_attend.defvjp(_attend_forward, _attend_backward)


def _on_shards(function, place: _Place, in_specs, out_specs):
    if not place.sharded:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _backend(
    impl: Impl, place: _Place, across: context.Method, order: context.Layout, shape: str
) -> Backend:
    if impl == "auto":
        impl = _choose(_platform(), shape)
    for name, value, known in (
        ("impl", impl, (*BACKENDS, "auto", "xla", "cudnn")),
        ("across", across, get_args(context.Method)),
        ("order", order, get_args(context.Layout)),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: there are {', '.join(map(repr, known))}")
    backend = BACKENDS[impl]
    if place.num_shards == 1:
        return backend
    keys = order if place.keys else "replicated"
    return context.split(backend, axis=CONTEXT_AXIS, method=across, keys=keys)


@functools.cache
def _choose(platform: str, shape: str) -> Impl:
    """Says what it chose, the first time for each platform and shape."""
    impl: Impl = "tpu" if platform == "tpu" else "gpu" if platform == "gpu" else "reference"
    logger.info("attention of %s on %s: %r", shape, platform, impl)
    return impl


def _platform() -> str:
    """Where this will run: that of the mesh, which may be of chips that are not here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    kind = device.device_kind
    return "cpu" if kind == "cpu" else "tpu" if kind.startswith("TPU") else "gpu"


def _shape_of(q, k) -> str:
    return (
        f"{q.shape[1]} queries, {k.shape[1]} keys, heads {q.shape[2]}/{k.shape[2]} x {q.shape[3]}"
    )


def _placed(bounds, place: _Place) -> list[Array]:
    """Bounds are small, and may come from anywhere."""
    bounds = [jnp.asarray(bound, jnp.int32) for bound in bounds]
    if not place.sharded:
        return bounds
    return [jax.sharding.reshard(bound, place.bounds) for bound in bounds]


def _split_heads(q: Float[Array, "b t n h"], kv_heads: int, place: _Place):
    batch, time, heads, width = q.shape
    spec = PartitionSpec(*place.bounds, place.heads)
    grouped = (batch, time, kv_heads, heads // kv_heads, width)
    return _reshape(q, grouped, spec, place).transpose(0, 2, 3, 1, 4)


def _merge_heads(grouped: Array, place: _Place):
    """[b t k g ...] -> [b t n ...]"""
    batch, time, kv_heads, shared, *rest = grouped.shape
    spec = PartitionSpec(*place.bounds, place.heads)
    return _reshape(grouped, (batch, time, kv_heads * shared, *rest), spec, place)


def _reshape(array: Array, shape: tuple[int, ...], spec: PartitionSpec, place: _Place) -> Array:
    return array.reshape(shape, out_sharding=spec) if place.sharded else array.reshape(shape)


def _with_mask(q, k, v, start, stop, *, scale: float, impl: Literal["xla", "cudnn"]):
    place = _Place.of(q, k)
    if place.keys and place.num_shards > 1:
        raise ValueError(f"impl={impl!r}: keys over the context axis need another implementation")
    local = functools.partial(reference.with_mask, scale=scale, implementation=impl)
    specs = (place.queries, place.keyed, place.keyed, place.bounds, place.bounds)
    run = _on_shards(local, place, specs, place.queries)
    bounds = _placed((start, stop), place)
    keyed = (k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
    out = run(_split_heads(q, k.shape[2], place), *keyed, *bounds)
    return _merge_heads(out.transpose(0, 3, 1, 2, 4), place)


def _require_chunks(num_keys: int, place: _Place, order: context.Layout) -> None:
    pieces = place.num_shards * (2 if order == "balanced" else 1)
    if place.keys and place.num_shards > 1 and num_keys % pieces:
        raise ValueError(
            f"{num_keys} keys over {place.num_shards} devices of the axis {CONTEXT_AXIS!r}: in "
            f"{order} order they must be a multiple of {pieces}"
        )


def _require_matching(q, k, v, start, stop) -> None:
    batch, time, heads, width = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (batch, width) or heads % k.shape[2]:
        raise ValueError(
            f"queries {q.shape}, keys {k.shape}, values {v.shape}: batch and head size must agree, "
            "and each key head serve as many query heads"
        )
    if start.shape != (batch, time) or stop.shape != (batch, time):
        raise ValueError(f"bounds {start.shape} and {stop.shape}: one of each for every query")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"queries {q.dtype}, keys {k.dtype}, values {v.dtype}: one dtype for all")
