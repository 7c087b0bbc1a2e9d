"""Microbatches together are the batch, whatever their rows weigh and wherever they are."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l32jax.config import MeshConfig
from l32jax.data.batches import place
from l32jax.errors import InputError
from l32jax.model.parameters import flatten
from l32jax.sharding import make_mesh, single_device_mesh
from l32jax.train.accumulate import _split, require_even_rows
from l32jax.train.objectives import next_token
from l32jax.train.step import begin_stage, make_train_step
from tests.checkpoint_tests.weights import random_params
from tests.train_tests.small import LENGTH, TEXT, rows, stage

LIMIT = 1e-6
MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def uneven_rows() -> dict[str, np.ndarray]:
    """Rows of a microbatch weigh from nothing to much."""
    batch = rows(8, images=False)
    weights = batch["weights"] * np.array([0, 5, 0.1, 1, 0, 2, 0.01, 0.5], np.float32)[:, None]
    return batch | {"weights": weights}


def training(accumulate: int):
    plain = stage(("language_model",), clip_norm=1e9)
    data = dataclasses.replace(plain.data, batch_size=8)
    return dataclasses.replace(plain, data=data, accumulate=accumulate)


def stepped(accumulate: int, mesh) -> tuple[dict, dict]:
    """Metrics and first moments, which after one step are the gradients but for a factor."""
    with jax.set_mesh(mesh):
        begin = partial(begin_stage, TEXT, training(accumulate), seed=0)
        state = jax.jit(begin)(random_params(TEXT, mesh))
        step = make_train_step(TEXT, training(accumulate), partial(next_token, z_loss=0.1))
        state, metrics = step(state, place(uneven_rows(), mesh), jnp.float32(1e-3))
    moments = {n: np.asarray(m) for n, m in flatten(state.opt_state).items() if "/mu/" in n}
    return jax.tree.map(float, metrics), moments


@pytest.fixture(scope="module")
def whole():
    return stepped(1, single_device_mesh())


@pytest.mark.parametrize(
    ("accumulate", "mesh"),
    [(2, None), (8, None), (1, MESH), (2, MESH)],
    ids=["2", "8", "1_on_a_mesh", "2_on_a_mesh"],
)
def test_microbatches_give_the_gradients_of_the_batch(accumulate, mesh, whole):
    metrics, moments = stepped(accumulate, make_mesh(mesh) if mesh else single_device_mesh())
    assert metrics == pytest.approx(whole[0], rel=LIMIT)
    largest = max(np.abs(moment).max() for moment in whole[1].values())
    for name, moment in whole[1].items():
        assert moment.any(), name
        np.testing.assert_allclose(
            moments[name], moment, rtol=0, atol=LIMIT * largest, err_msg=name
        )


def test_every_device_keeps_its_rows_and_has_as_many_of_every_microbatch():
    mesh = make_mesh(MESH)
    with jax.set_mesh(mesh):
        whole = place({"tokens": np.arange(8 * LENGTH, dtype=np.int32).reshape(8, LENGTH)}, mesh)
        parts = jax.jit(partial(_split, num_parts=2))(whole["tokens"])
    assert parts.shape == (2, 4, LENGTH)
    before = {shard.device: np.asarray(shard.data) for shard in whole["tokens"].addressable_shards}
    for shard in parts.addressable_shards:
        assert shard.data.shape == (2, 1, LENGTH)
        np.testing.assert_array_equal(shard.data[:, 0], before[shard.device])


def test_rows_that_do_not_split_evenly_are_an_input_error():
    mesh = make_mesh(MESH)
    require_even_rows(training(2), mesh.shape)
    with pytest.raises(InputError, match="it must be a multiple of 16, as 4 devices share"):
        require_even_rows(training(4), mesh.shape)
    with pytest.raises(InputError, match="batch_size=8 must be a multiple of it"):
        training(3)
