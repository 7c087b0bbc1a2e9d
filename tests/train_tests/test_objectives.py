"""Scores by the chunk are those of all logits at once, which never exist."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l32jax.config import MeshConfig
from l32jax.data.batches import place
from l32jax.model.llama import abstract_params, batch_logits, bind
from l32jax.model.parameters import flatten
from l32jax.sharding import make_mesh, single_device_mesh
from l32jax.train import chunks
from l32jax.train.objectives import cross_entropy, next_token
from tests.checkpoint_tests.weights import random_params
from tests.train_tests.small import LENGTH, TEXT, rows
from tests.train_tests.traces import equations

LIMIT = 1e-6
Z_LOSS = 1e-2
VOCABULARY = TEXT.decoder.vocab_size
MESHES = {
    "context2_tensor2_fsdp2": MeshConfig(fsdp=2, context=2, tensor=2),
    "context4_data2": MeshConfig(data=2, fsdp=1, context=4),
}


def weighted_rows() -> dict[str, np.ndarray]:
    batch = rows(8, images=False)
    random = np.random.default_rng(1).uniform(0, 2, batch["weights"].shape)
    return batch | {"weights": (batch["weights"] * random).astype(np.float32)}


def unchunked(model, batch):
    """As a textbook has it, with every logit there is."""
    logits = batch_logits(model, batch)
    weights = batch["weights"]
    logarithms = jax.nn.logsumexp(logits, axis=-1)
    sums = {
        "loss": jnp.sum(cross_entropy(logits, batch["targets"]) * weights),
        "accuracy": jnp.sum((logits.argmax(-1) == batch["targets"]) * weights),
        "weight": weights.sum(),
        "z_loss": jnp.sum(logarithms**2 * weights),
    }
    return sums["loss"] + Z_LOSS * sums["z_loss"], sums


def chunked(model, batch):
    return next_token(model, batch, jax.random.key(0), z_loss=Z_LOSS)


def computed(objective, mesh):
    def loss(params, batch):
        return objective(bind(TEXT, params), batch)

    with jax.set_mesh(mesh):
        batch = place(weighted_rows(), mesh)
        grads, sums = jax.jit(jax.grad(loss, has_aux=True))(random_params(TEXT, mesh), batch)
    return jax.tree.map(float, sums), {name: np.asarray(g) for name, g in flatten(grads).items()}


@pytest.fixture(scope="module")
def whole():
    return computed(unchunked, single_device_mesh())


def assert_same(found, expected) -> None:
    assert found[0] == pytest.approx(expected[0], rel=LIMIT)
    largest = max(np.abs(gradient).max() for gradient in expected[1].values())
    for path, gradient in expected[1].items():
        np.testing.assert_allclose(
            found[1][path], gradient, rtol=0, atol=LIMIT * largest, err_msg=path
        )


# Positions of each device that are scored at a time; 5 and 3 leave some over.
@pytest.mark.parametrize("positions", [LENGTH, 5, 1])
def test_chunks_give_the_same_loss_accuracy_and_gradients(positions, whole, monkeypatch):
    monkeypatch.setattr(chunks, "MAX_LOGITS", 8 * positions * VOCABULARY)
    assert_same(computed(chunked, single_device_mesh()), whole)


@pytest.mark.parametrize("name", MESHES)
def test_chunks_on_a_mesh_give_the_same(name, whole, monkeypatch):
    mesh = make_mesh(MESHES[name])
    local = LENGTH // mesh.shape["context"]
    rows_of_one = 8 // (mesh.shape["data"] * mesh.shape["fsdp"])
    limit = rows_of_one * (local - 1) * VOCABULARY // mesh.shape["tensor"]
    monkeypatch.setattr(chunks, "MAX_LOGITS", limit)
    assert_same(computed(chunked, mesh), whole)


@pytest.mark.parametrize("limit", [2**26, 2 * 4 * VOCABULARY])
def test_all_logits_never_exist_where_they_are_too_many(limit, monkeypatch):
    monkeypatch.setattr(chunks, "MAX_LOGITS", limit)
    mesh = single_device_mesh()

    def loss(params, batch):
        return chunked(bind(TEXT, params), batch)[0]

    with jax.set_mesh(mesh):
        batch = place(weighted_rows(), mesh)
        jaxpr = jax.make_jaxpr(jax.grad(loss))(abstract_params(TEXT), batch).jaxpr
    of_logits = [
        math.prod(variable.aval.shape)
        for equation in equations(jaxpr)
        for variable in equation.outvars
        if VOCABULARY in variable.aval.shape and variable.aval.ndim > 2
    ]
    assert max(of_logits) <= limit
    if limit == 2**26:
        assert max(of_logits) == 8 * LENGTH * VOCABULARY


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 8, 4), None),
        ((64, 512, 4), 32),  # of 2**17 words: 2**28 logits are 32 positions of 64 rows
        ((4096, 3, 4), 1),
    ],
)
def test_the_size_of_a_chunk_follows_from_shapes(shape, expected):
    found = []
    with jax.set_mesh(single_device_mesh()):
        states = jax.ShapeDtypeStruct(shape, jnp.float32)
        jax.eval_shape(lambda x: found.append(chunks._chunk_size(x.shape[:2], 2**17)), states)
    assert found == [expected]


def test_the_z_loss_comes_on_top_of_the_loss():
    mesh = single_device_mesh()

    @partial(jax.jit, static_argnames="z_loss")
    def sums(params, batch, z_loss):
        return next_token(bind(TEXT, params), batch, jax.random.key(0), z_loss=z_loss)

    with jax.set_mesh(mesh):
        batch, params = place(rows(8, images=False), mesh), random_params(TEXT, mesh)
        plain, of_plain = sums(params, batch, 0.0)
        more, of_more = sums(params, batch, 0.5)
    assert "z_loss" not in of_plain and float(plain) == float(of_plain["loss"])
    assert float(more) == pytest.approx(float(plain + 0.5 * of_more["z_loss"]), rel=LIMIT)
