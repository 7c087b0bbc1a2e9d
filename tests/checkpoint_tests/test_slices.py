"""Parameters by slices: what is read of them, and where it goes."""

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax.checkpoint.engine.slices import ALL, Home, Slices, _fill, homes_of
from l32jax.checkpoint.engine.sources import Source
from l32jax.checkpoint.engine.tables import HEADS_OUT, SCALAR, Part, ours, theirs
from tests import golden
from tests.checkpoint_tests.weights import random_params

STACKED, PLAIN = "decoder/groups/blocks/0/mlp/up/weight", "decoder/embedding/weight"


def bounds_of(shape):
    """Some box in an array, as a device's shard of it."""
    spans = (
        st.integers(0, size - 1).flatmap(
            lambda start, size=size: st.tuples(st.just(start), st.integers(start + 1, size))
        )
        for size in shape
    )
    return st.tuples(*spans)


@given(st.data())
def test_shards_get_their_part_and_nothing_else_is_read(data):
    path = data.draw(st.sampled_from([STACKED, PLAIN]))
    shape = (3, 4, 5) if path == STACKED else (6, 5)
    values = np.arange(np.prod(shape)).reshape(shape)
    asked = []

    def read(home, rows):
        asked.append((home, *rows.indices(shape[-2])[:2]))
        return (values if home.layer is None else values[home.layer])[rows]

    slices = Slices("memory", {path: shape}, {path: values.dtype}, read)
    boxes = data.draw(st.lists(bounds_of(shape), min_size=1, max_size=3, unique=True))
    buffers = {box: np.empty([stop - start for start, stop in box], np.int64) for box in boxes}
    for home in homes_of(path, shape):
        _fill(slices, home, buffers)
    for box, buffer in buffers.items():
        np.testing.assert_array_equal(buffer, values[tuple(slice(*span) for span in box)])
    expected = {
        (Home(path, layer), *box[1]) for box in boxes for layer in range(*box[0]) if path == STACKED
    } or {(Home(path, None), *box[0]) for box in boxes}
    assert sorted(asked, key=str) == sorted(expected, key=str)  # each but once


def test_parameters_in_memory_are_read_on_host_and_device_alike():
    params = random_params(golden.VISION)
    on_device, on_host = Slices.of(params), Slices.of(jax.tree.map(np.asarray, params))
    assert on_device.shapes == on_host.shapes and on_device.dtypes == on_host.dtypes
    for home in on_host.homes():
        rows = slice(1, 3) if on_host.shape(home) else ALL
        np.testing.assert_array_equal(on_device.read(home, rows), on_host.read(home, rows))


def test_rounding_happens_as_rows_are_read():
    params = random_params(golden.TEXT)
    rounded = Slices.of(params).as_dtype(ml_dtypes.bfloat16)
    values = rounded.read(Home(PLAIN, None), slice(2, 5))
    assert values.dtype == ml_dtypes.bfloat16 == rounded.dtypes[PLAIN]
    expected = np.asarray(params["decoder"]["embedding"]["weight"])[2:5]
    np.testing.assert_array_equal(values, expected.astype(ml_dtypes.bfloat16))


TABLE = (
    Part("a/weight", "x.weight", HEADS_OUT),
    Part("b/weight", "both"),
    Part("c/weight", "both"),
    Part("gate", "gate", SCALAR),
)
SHAPES = {"a/weight": (3, 2, 4), "b/weight": (5, 4), "c/weight": (2, 4), "gate": ()}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@given(st.data())
def test_any_rows_of_any_tensor_come_through_a_table(dtype, data):
    random = np.random.default_rng(0)
    arrays = {
        "x.weight": random.standard_normal((6, 4)).astype(dtype),
        "both": random.standard_normal((7, 4)).astype(np.float32),
        "gate": random.standard_normal(1).astype(dtype),
    }
    slices = ours(TABLE, Source.of(arrays, "memory"), SHAPES)
    back = theirs(TABLE, slices)
    name = data.draw(st.sampled_from(sorted(arrays)))
    step = back.tensors[name].step
    size = len(arrays[name]) // step
    start = data.draw(st.integers(0, size - 1))
    rows = slice(start * step, data.draw(st.integers(start + 1, size)) * step)
    np.testing.assert_array_equal(back.read(name, rows), arrays[name][rows])
    assert back.tensors[name].shape == arrays[name].shape
    assert back.tensors[name].dtype == arrays[name].dtype
