"""Pixels become floats inside the model as they do in the reference."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from l32jax.data import images as host
from l32jax.data.rows import VisionShape, make_row, stack
from l32jax.data.samples import Sample
from l32jax.model.llama import Images, batch_logits, bind, init_params
from l32jax.model.vision import normalise
from l32jax.sharding import single_device_mesh
from tests import golden

IMAGE_ID = golden.VISION.decoder.vocab_size
# Every value of a pixel in every channel, in four tiles.
PIXELS = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), (4, 3, 1, 1))
GRID = np.array([2, 2], np.int32)


def on_device(tiles: np.ndarray, aspect: np.ndarray, dtype) -> np.ndarray:
    return np.asarray(jax.jit(normalise, static_argnums=2)(tiles, aspect, dtype))


def batch_of_pictures() -> dict[str, np.ndarray]:
    """A row of two pictures, of two tiles and of one, and a row without any."""
    rng = np.random.default_rng(0)
    sizes = ((50, 100), (56, 56))
    pictures = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]
    vision = VisionShape.of(golden.VISION, max_images=2, max_tiles=4)
    looking = Sample.single([IMAGE_ID, 5, 6, IMAGE_ID, 7, 8], [1.0] * 6, pictures)
    rows = [[looking], [Sample.single([5, 6, 7], [1.0] * 3)]]
    return stack([make_row(row, length=8, vision=vision) for row in rows])


def test_floats_differ_from_the_references_in_the_last_bit_at_most():
    """XLA divides by multiplying, so what lies near zero is as inexact as what lies near one."""
    ours, theirs = on_device(PIXELS, GRID, jnp.float32), host.normalise(PIXELS)
    assert np.abs(ours - theirs).max() <= np.spacing(np.float32(2))


def test_bfloat16_is_the_references_bit_for_bit():
    ours, theirs = on_device(PIXELS, GRID, jnp.bfloat16), host.normalise(PIXELS)
    assert np.array_equal(ours, theirs.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("grid", [(0, 0), (1, 1), (1, 3), (2, 2)])
def test_tiles_outside_the_grid_are_zeros_after_normalisation(grid):
    values = on_device(np.zeros_like(PIXELS), np.array(grid, np.int32), jnp.float32)
    used = grid[0] * grid[1]
    assert (values[:used] < -1).all() and not values[used:].any()


def test_floats_are_taken_as_normalised_already():
    floats = np.random.default_rng(0).normal(size=(1, 1, 4, 3, 2, 2)).astype(np.float32)
    images = Images(*map(jnp.asarray, (floats, GRID[None, None], np.zeros((1, 4), np.int32))))
    assert np.array_equal(images.normalised(jnp.float32).tiles, floats)


def test_pixels_and_the_references_floats_give_the_same_scores():
    pixels = batch_of_pictures()
    assert pixels["tiles"].dtype == np.uint8
    floats = pixels | {"tiles": np.zeros(pixels["tiles"].shape, np.float32)}
    for row, image in np.ndindex(pixels["aspect"].shape[:2]):
        used = pixels["aspect"][row, image].prod()
        floats["tiles"][row, image, :used] = host.normalise(pixels["tiles"][row, image, :used])

    @jax.jit
    def logits(params, batch):
        return batch_logits(bind(golden.VISION, params), batch)

    with jax.set_mesh(single_device_mesh()):
        params = init_params(golden.VISION, jax.random.key(0))
        one, two = (logits(params, batch) for batch in (pixels, floats))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)
