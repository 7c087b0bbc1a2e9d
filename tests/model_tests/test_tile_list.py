"""Tiles end to end are what a gather of them gives, and give back what its gradient does."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from l32jax.config import MeshConfig
from l32jax.model.tile_list import Tiles, end_to_end
from l32jax.sharding import activation_spec, make_mesh, single_device_mesh

WIDTH = 3


def by_gather(tokens, index, tiles):
    batch, images = tokens.shape[:2]
    tiled = tokens[:, :, : tiles.number * tiles.length]
    tiled = tiled.reshape(batch, images * tiles.number, tiles.length, WIDTH)
    return jnp.stack([row[listed] for row, listed in zip(tiled, index, strict=True)]).reshape(
        batch, -1, WIDTH
    )


def on_mesh(tokens, index, tiles, dims):
    placed = jax.sharding.reshard(tokens, activation_spec("b"))
    listed = end_to_end(placed, jnp.asarray(index), tiles, activation_spec(dims))
    return jax.sharding.reshard(listed, PartitionSpec())


def with_gradient(function, tokens, weights):
    value, back = jax.vjp(function, jnp.asarray(tokens))
    return np.asarray(value), np.asarray(back(jnp.asarray(weights))[0])


@st.composite
def lists(draw):
    """Any order, with tiles that are listed twice, not at all, and tokens that are no tile's."""
    batch, images, number, length = (draw(st.integers(1, most)) for most in (3, 3, 4, 5))
    places, padding = draw(st.integers(1, 6)), draw(st.integers(0, 3))
    one = st.integers(0, images * number - 1)
    row = st.lists(one, min_size=places, max_size=places)
    index = draw(st.lists(row, min_size=batch, max_size=batch))
    shape = (batch, images, number * length + padding, WIDTH)
    return shape, np.array(index, np.int32), Tiles(number, length)


@given(lists())
@settings(max_examples=25)
def test_values_and_gradients_are_those_of_a_gather(case):
    shape, index, tiles = case
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=shape).astype(np.float32)
    weights = rng.normal(size=(len(index), index.shape[1] * tiles.length, WIDTH))
    weights = weights.astype(np.float32)
    expected = with_gradient(lambda tokens: by_gather(tokens, index, tiles), tokens, weights)
    with jax.set_mesh(single_device_mesh()):
        ours = with_gradient(partial(on_mesh, index=index, tiles=tiles, dims="b"), tokens, weights)
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dims", ["b", "bt"])
def test_devices_of_a_row_copy_their_part_and_sum_what_comes_back(dims):
    tiles = Tiles(4, 5)
    rng = np.random.default_rng(1)
    tokens = rng.normal(size=(2, 3, 23, WIDTH)).astype(np.float32)
    index = np.array([[3, 0, 11, 5], [8, 8, 1, 0]], np.int32)
    weights = rng.normal(size=(2, 20, WIDTH)).astype(np.float32)
    expected = with_gradient(lambda tokens: by_gather(tokens, index, tiles), tokens, weights)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context=2, tensor=2))):
        ours = with_gradient(partial(on_mesh, index=index, tiles=tiles, dims=dims), tokens, weights)
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
