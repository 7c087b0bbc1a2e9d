"""One door for every implementation, differentiation, caches and meshes."""

import inspect
import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from l32jax import kernels
from l32jax.kernels import context, dispatch
from l32jax.kernels.intervals import merge

SCALE = 0.3
LIMIT = 1e-5
AXES = ("data", "fsdp", "context", "tensor")
MESHES = {
    "rows": (2, 4, 1, 1),
    "heads": (2, 2, 1, 2),
    "context": (1, 1, 8, 1),
    "all": (2, 1, 2, 2),
}
BATCH, TIME, HEADS, KV_HEADS, WIDTH = 4, 32, 4, 2, 8


def drawn(num_keys: int = TIME, *, batch: int = BATCH, time: int = TIME, seed: int = 0):
    random = np.random.default_rng(seed)
    shapes = [(batch, time, HEADS, WIDTH), *[(batch, num_keys, KV_HEADS, WIDTH)] * 2]
    q, k, v = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    start = random.integers(0, num_keys, (batch, time)).astype(np.int32)
    stop = start + random.integers(-4, num_keys, (batch, time)).astype(np.int32)
    return q, k, v, start, stop


@partial(jax.jit, static_argnames=("planned", "options"))
def outputs_and_gradients(arrays, weights, *, planned=False, options=()):
    """Outputs, and gradients of a weighted sum of them."""
    q, k, v, start, stop = arrays
    options = dict(options)
    plan = kernels.make_plan(start, stop, q, k, **options) if planned else None

    def scalar(q, k, v):
        out, lse = kernels.attention_and_lse(
            q, k, v, start, stop, scale=SCALE, plan=plan, **options
        )
        total = jnp.sum(out * weights[0]) + jnp.sum(jnp.where(lse > -jnp.inf, lse, 0) * weights[1])
        return total, (out, lse)

    found, outputs = jax.grad(scalar, (0, 1, 2), has_aux=True)(q, k, v)
    return *outputs, *found


def run(arrays, *, planned=False, **options) -> list[np.ndarray]:
    random = np.random.default_rng(9)
    shapes = (arrays[0].shape, arrays[0].shape[:3])
    weights = [random.standard_normal(shape).astype(np.float32) for shape in shapes]
    options = tuple(options.items())
    results = outputs_and_gradients(arrays, weights, planned=planned, options=options)
    return [np.asarray(array) for array in results]


def assert_close(ours, theirs, limit=LIMIT):
    for one, other in zip(ours, theirs, strict=True):
        seen = np.isfinite(other)
        np.testing.assert_array_equal(np.isfinite(one), seen)
        largest = np.abs(other[seen]).max()
        np.testing.assert_allclose(one[seen], other[seen], rtol=0, atol=limit * largest)


@pytest.fixture(scope="module")
def alone():
    return run(drawn(), impl="reference")


def balanced(arrays, num_shards: int, *, keys=True):
    """As `data.batches.place` stores rows; keys too, if they are the row's own."""
    q, k, v, start, stop = arrays
    order = context.balanced_order(q.shape[1], num_shards)
    if keys:
        k, v = k[:, order], v[:, order]
    return q[:, order], k, v, start[:, order], stop[:, order]


def in_row_order(results, num_shards: int, *, keys=True):
    order = context.row_order(results[0].shape[1], num_shards)
    out, lse, dq, dk, dv = results
    if keys:
        dk, dv = dk[:, order], dv[:, order]
    return [out[:, order], lse[:, order], dq[:, order], dk, dv]


def on_mesh(arrays, *, keys: str | None):
    q, k, v, start, stop = arrays
    rows = ("data", "fsdp")
    spec = PartitionSpec(rows, "context", "tensor")
    of_keys = PartitionSpec(rows, keys, "tensor")
    k, v = (jax.device_put(array, of_keys) for array in (k, v))
    # Random weights of the test's sum are per position: they need the order of the rows too.
    return jax.device_put(q, spec), k, v, start, stop


@pytest.mark.parametrize("across", ["gather", "ring"])
@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_same(name, across, alone):
    shards = dict(zip(AXES, MESHES[name], strict=True))["context"]
    with jax.set_mesh(jax.make_mesh(MESHES[name], AXES)):
        arrays = on_mesh(balanced(drawn(batch=8), shards), keys="context")
        ours = run_weighted_by_row(arrays, shards, impl="reference", across=across, planned=True)
    theirs = run(drawn(batch=8), impl="reference")
    assert_close(in_row_order(ours, shards), theirs)


def run_weighted_by_row(arrays, shards, *, planned, **options):
    """`run`, whose random weights move with the rows."""
    random = np.random.default_rng(9)
    shapes = (arrays[0].shape, arrays[0].shape[:3])
    order = context.balanced_order(shapes[0][1], shards)
    weights = [random.standard_normal(shape).astype(np.float32)[:, order] for shape in shapes]
    options = tuple(options.items())
    results = outputs_and_gradients(arrays, weights, planned=planned, options=options)
    return [np.asarray(array) for array in results]


def test_keys_that_every_device_has_get_the_gradients_of_all():
    arrays = drawn(20, batch=8)
    with jax.set_mesh(jax.make_mesh(MESHES["all"], AXES)):
        placed = on_mesh(balanced(arrays, 2, keys=False), keys=None)
        ours = run_weighted_by_row(placed, 2, impl="reference", planned=True)
    assert_close(in_row_order(ours, 2, keys=False), run(arrays, impl="reference"))


@pytest.mark.parametrize("planned", [True, False])
def test_the_tpu_kernels_differentiate_through_the_same_door(planned, alone):
    with pltpu.force_tpu_interpret_mode():
        ours = run(drawn(), impl="tpu", planned=planned)
    assert_close(ours, alone)


@pytest.mark.parametrize("impl", ["reference", "tpu"])
@pytest.mark.parametrize("time", [1, 16])
def test_a_layer_of_a_cache_is_attended_to_in_place(impl, time):
    q, k, v, start, stop = map(jnp.asarray, drawn(24, batch=2, time=time))
    stacks = [jnp.stack([array * 3, array, array - 1]).transpose(0, 1, 3, 2, 4) for array in (k, v)]

    @jax.jit
    def decode(layer):
        plan = kernels.make_plan(start, stop, q, k, impl=impl)
        return kernels.cached_attention(
            q, *stacks, layer, start, stop, scale=SCALE, impl=impl, plan=plan
        )

    with pltpu.force_tpu_interpret_mode():
        ours = np.asarray(decode(jnp.int32(1)))
    theirs = run((q, k, v, start, stop), impl="reference")[0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_jax_s_own_attention_takes_the_intervals_as_a_mask(alone):
    q, k, v, start, stop = map(jnp.asarray, drawn())

    def scalar(q, k, v, impl):
        out = kernels.attention(q, k, v, start, stop, scale=SCALE, impl=impl)
        return jnp.sum(out**2), out

    ours, theirs = (
        jax.jit(jax.grad(partial(scalar, impl=impl), (0, 1, 2), has_aux=True))(q, k, v)
        for impl in ("xla", "reference")
    )
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_results_over_parts_of_the_keys_merge_by_their_log_sum_exp(alone):
    q, k, v, start, stop = map(jnp.asarray, drawn())

    def part(keys):
        bounds = (
            jnp.clip(bound - keys.start, 0, keys.stop - keys.start) for bound in (start, stop)
        )
        return kernels.attention_and_lse(
            q, k[:, keys], v[:, keys], *bounds, scale=SCALE, impl="reference"
        )

    merged = merge(*(part(keys) for keys in (slice(0, 9), slice(9, TIME))))
    assert_close(merged, alone[:2])


def test_the_choice_is_told_once(caplog):
    dispatch._choose.cache_clear()
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        run(drawn(), impl="auto")
        run(drawn(seed=1), impl="auto")
        run(drawn(40), impl="auto")
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"attention of {TIME} queries, {keys} keys, heads 4/2 x 8 on cpu: 'reference'"
        for keys in (TIME, 40)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (BATCH, TIME, 3, WIDTH), "v": (BATCH, TIME, 3, WIDTH)}, "each key head serve"),
        ({"v": (BATCH, TIME + 1, KV_HEADS, WIDTH)}, "must agree"),
        ({"start": (BATCH, TIME + 1)}, "one of each for every query"),
    ],
)
def test_arrays_that_do_not_go_together_are_refused(change, message):
    """By the check itself: in tests, annotations are executed and speak first."""
    names = ("q", "k", "v", "start", "stop")
    arrays = dict(zip(names, drawn(), strict=True))
    arrays |= {name: np.zeros(shape, arrays[name].dtype) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        dispatch._require_matching(*arrays.values())


def test_other_refusals():
    q, k, v, start, stop = map(jnp.asarray, drawn())
    place = dispatch._Place.of(q, k)
    with pytest.raises(
        ValueError, match="impl='flash': there are 'reference', 'tpu', 'gpu', 'auto'"
    ):
        inspect.unwrap(dispatch._backend)("flash", place, "gather", "balanced", "these")
    with pytest.raises(ValueError, match="across='bus': there are 'gather', 'ring'"):
        inspect.unwrap(dispatch._backend)("tpu", place, "bus", "balanced", "these")
    with pytest.raises(ValueError, match="order='any': there are 'contiguous', 'balanced'"):
        inspect.unwrap(dispatch._backend)("tpu", place, "ring", "any", "these")
    with pytest.raises(ValueError, match="12 keys over 4 devices .* must be a multiple of 8"):
        dispatch._require_chunks(12, place._replace(keys="context", num_shards=4), "balanced")
    with pytest.raises(ValueError, match="one dtype for all"):
        kernels.attention(q, k, v.astype(jnp.bfloat16), start, stop, scale=SCALE)
    with pytest.raises(ValueError, match="gives no log-sum-exp"):
        kernels.attention_and_lse(q, k, v, start, stop, scale=SCALE, impl="xla")
