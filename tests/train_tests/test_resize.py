"""Position tables at another image size are Meta's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from l32jax.config import VisionConfig
from l32jax.model.llama import shapes_of
from l32jax.model.parameters import flatten
from l32jax.model.resize import resize_positions
from tests.checkpoint_tests.weights import random_params
from tests.train_tests.small import MODEL

encoder_utils = pytest.importorskip("llama_models.llama3.multimodal.encoder_utils")


def tables(grid: int, tiles: int = 4, width: int = 8) -> dict:
    random = np.random.default_rng(grid)
    tokens = grid**2 + 1
    return {
        "embedding": random.standard_normal((tokens, width)).astype(np.float32),
        "tile_embedding": random.standard_normal((tiles, tiles, tokens, width)).astype(np.float32),
        "gate": np.float32(0.5),
    }


def as_meta(table: np.ndarray, grid: int) -> np.ndarray:
    table = torch.from_numpy(table)
    if table.ndim == 2:
        return encoder_utils.resize_local_position_embedding(table, (grid, grid)).numpy()
    tiles = table.shape[0]
    return encoder_utils.resize_global_position_embedding(table, (grid, grid), tiles, tiles).numpy()


@pytest.mark.parametrize(("old", "new"), [(32, 40), (40, 32), (2, 5), (5, 1), (1, 3)])
def test_tables_are_resized_as_meta_does(old, new):
    position = tables(old)
    config = VisionConfig(image_size=14 * new)
    resized = resize_positions(
        {"vision": {"position": jax.tree.map(jnp.asarray, position)}}, config
    )["vision"]["position"]
    for name in ("embedding", "tile_embedding"):
        expected = as_meta(position[name], new)
        np.testing.assert_allclose(resized[name], expected, rtol=0, atol=1e-4, err_msg=name)
        np.testing.assert_array_equal(resized[name][..., 0, :], position[name][..., 0, :])
    assert resized["gate"] == position["gate"]


def test_everything_else_is_shared_and_the_same_size_changes_nothing():
    params = random_params(MODEL)
    assert resize_positions(params, MODEL.vision) is params
    larger = dataclasses.replace(MODEL.vision, image_size=42)
    before, after = flatten(params), flatten(resize_positions(params, larger))
    assert {path: leaf.shape for path, leaf in after.items()} == shapes_of(
        dataclasses.replace(MODEL, vision=larger)
    )
    changed = {path for path, leaf in before.items() if after[path] is not leaf}
    assert changed == {"vision/position/embedding", "vision/position/tile_embedding"}


def test_a_table_keeps_its_dtype():
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), random_params(MODEL))
    larger = dataclasses.replace(MODEL.vision, image_size=42)
    resized = flatten(resize_positions(half, larger))
    assert {str(leaf.dtype) for leaf in resized.values()} == {"bfloat16"}
