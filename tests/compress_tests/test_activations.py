"""What is seen inside is what the forward pass computes, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l32jax.compress.calibration import Calibration, Subject, _begin, _products
from l32jax.config import MeshConfig
from l32jax.model.llama import bind, forward_batch
from l32jax.sharding import make_mesh, single_device_mesh
from tests.checkpoint_tests.weights import random_params
from tests.compress_tests.models import MODELS, batches

MESHES = {
    "data2_fsdp2_tensor2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp2_context2_tensor2": MeshConfig(fsdp=2, context=2, tensor=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_running_the_groups_one_by_one_is_the_forward_pass(name):
    config, mesh = MODELS[name], single_device_mesh()
    with jax.set_mesh(mesh):
        params, batch = random_params(config, mesh), batches(config, mesh)[0]
        model = bind(config, params)
        expected = forward_batch(model, batch).states
        stream = _begin(config, params, batch)
        for group in range(config.decoder.num_groups):
            stream, _ = _products(config, params, batch, stream, jnp.int32(group), "neurons")
        found = model.decoder.final_norm(stream.x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_diagonals_of_moments(name):
    config, mesh = MODELS[name], single_device_mesh()
    with jax.set_mesh(mesh):
        subject = Subject(config, random_params(config, mesh))
        calibration = Calibration(batches(config, mesh))
        scores = calibration.scores(subject)
        for place in ("attention_norm", "heads", "mlp_norm", "neurons"):
            for group, moments in enumerate(calibration.moments(subject, place)):
                for slot, products in enumerate(moments):
                    squares = getattr(scores.blocks[slot], place)[group].reshape(-1)
                    np.testing.assert_allclose(np.diag(products), squares, rtol=1e-5)


def test_padding_and_what_no_text_sees_do_not_count():
    """Normalised values have a mean square of one, in the mean over tokens that count."""
    config, mesh = MODELS["vision"], single_device_mesh()
    with jax.set_mesh(mesh):
        subject = Subject(config, random_params(config, mesh))
        scores = Calibration(batches(config, mesh)).scores(subject)
    for block in scores.blocks:
        np.testing.assert_allclose(block.attention_norm.mean(axis=1), 1, rtol=1e-2)
    cross = scores.blocks[1]
    np.testing.assert_allclose(cross.query_norm.mean(axis=1), 1, rtol=1e-2)
    np.testing.assert_allclose(cross.key_norm.mean(axis=1), 1, rtol=1e-2)


def measured_on(mesh, config):
    with jax.set_mesh(mesh):
        subject = Subject(config, random_params(config, mesh))
        calibration = Calibration(batches(config, mesh))
        moments = [next(iter(calibration.moments(subject, p))) for p in ("heads", "mlp_norm")]
        return calibration.scores(subject), moments, calibration.loss(subject)


@pytest.fixture(scope="module")
def alone():
    return {name: measured_on(single_device_mesh(), config) for name, config in MODELS.items()}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_every_mesh_measures_the_same(name, mesh, alone):
    found = measured_on(make_mesh(MESHES[mesh]), MODELS[name])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, alone[name]
    )
