"""Frozen weights in few bits: what they stand for, where they are, what the model makes of them."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax.checkpoint.dequantised import dequantised
from l32jax.checkpoint.engine.slices import Slices
from l32jax.config import MeshConfig
from l32jax.model.matrices import is_projection, matrix_dims
from l32jax.model.parameters import flatten
from l32jax.model.quantise import dequantised as in_model
from l32jax.model.quantise import frozen_as, group_size, is_quantised
from l32jax.sharding import make_mesh, param_spec, single_device_mesh
from tests.checkpoint_tests.weights import random_params
from tests.model_tests.test_lora import LIMIT, MESHES, MODELS, scores

CONFIG = MODELS["vision"]
KINDS = ("int8", "int4")
ODD = MeshConfig(fsdp=4, tensor=2)  # divides the width, but not the two groups of it


def quantised(kind, mesh=None):
    mesh = mesh or single_device_mesh()
    with jax.set_mesh(mesh):
        return jax.jit(partial(frozen_as, kind))(random_params(CONFIG, mesh))


@pytest.fixture(scope="module")
def alone():
    return {kind: quantised(kind) for kind in KINDS}


def by_hand(
    weight: np.ndarray, kind: str, inputs: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric, to half a step beyond the largest integer, with scales in bfloat16.

    And the step, where the last bit of a division decides between two integers, else 0.
    """
    if kind == "int8":
        most, groups = 127, weight
        largest = np.abs(groups).max(axis=inputs, keepdims=True)
    else:
        size = max(n for n in range(1, 33) if weight.shape[-1] % n == 0)
        most, groups = 7, weight.reshape(*weight.shape[:-1], -1, size)
        largest = np.abs(groups).max(axis=-1, keepdims=True)
    scale = (largest / np.float32(most + 0.5)).astype(np.float32)
    values = groups / scale
    between = np.abs(values % 1 - 0.5) < 1e-4
    step = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    whole = np.clip(np.rint(values), -most - 1, most).astype(np.float32) * step
    return whole.reshape(weight.shape), (between * step).reshape(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_formula(kind, alone):
    before, after = Slices.of(random_params(CONFIG)), dequantised(Slices.of(alone[kind]))
    assert before.shapes == after.shapes
    for home in before.homes():
        weight, found = (np.asarray(s.read(home, slice(None))) for s in (before, after))
        if not is_projection(home.path):
            np.testing.assert_array_equal(found, weight.astype(ml_dtypes.bfloat16), home.path)
            continue
        first = home.layer is not None
        columns = matrix_dims(home.path, weight.ndim + first).columns
        expected, between = by_hand(weight, kind, tuple(dim - first for dim in columns))
        assert (np.abs(found - expected) <= between).all(), home.path
        assert (between > 0).mean() < 0.07, home.path  # the largest of each group
        error = np.sqrt(np.mean((found - weight) ** 2)) / weight.std()
        assert error < {"int8": 0.01, "int4": 0.11}[kind], home.path


def test_the_model_computes_with_what_the_checkpoint_says(alone):
    """One layer, in float32: to the last bit."""
    path = "decoder/groups/blocks/0/attention/out/weight"
    attention = alone["int4"]["decoder"]["groups"]["blocks"][0]["attention"]
    weight = jax.tree.map(lambda leaf: leaf[1], attention["out"]["weight"])
    with jax.set_mesh(single_device_mesh()):
        inside = jax.jit(lambda w: in_model(w, "dnh", jnp.float32))(weight)
    slices = dequantised(Slices.of(alone["int4"]))
    home = next(home for home in slices.homes() if home.path == path and home.layer == 1)
    np.testing.assert_array_equal(inside, slices.read(home, slice(None)))


def with_exact_rest(params):
    """What is not quantised in float32: bfloat16 is rounded where a compiler likes to."""
    return jax.tree.map(
        lambda leaf: leaf if is_quantised(leaf) else leaf.astype(jnp.float32),
        params,
        is_leaf=is_quantised,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_mesh_stores_the_same_and_scores_the_same(kind, alone):
    expected = scores(CONFIG, with_exact_rest(alone[kind]), single_device_mesh(), images=True)
    for mesh in map(make_mesh, (*MESHES.values(), ODD)):
        spread = quantised(kind, mesh)
        for path, leaf in flatten(spread).items():
            np.testing.assert_array_equal(leaf, flatten(alone[kind])[path], path)
        found = scores(CONFIG, with_exact_rest(spread), mesh, images=True)
        np.testing.assert_allclose(found, expected, rtol=0, atol=LIMIT)


def test_integers_and_scales_are_sharded_as_the_weight(alone):
    mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    for kind, dims in (("int4", "lfd"), ("int8", "lf_")):
        spread = flatten(quantised(kind, mesh))
        values, scale = (spread[f"decoder/groups/blocks/0/mlp/up/weight/{n}"] for n in NAMES)
        assert values.sharding.spec == param_spec("lfd")
        assert tuple(scale.sharding.spec) == tuple(param_spec(dims))


NAMES = ("qvalue", "scale")


@given(st.integers(1, 1 << 15))
def test_groups_leave_no_input_over(size):
    group = group_size(size)
    assert size % group == 0 and 1 <= group <= 32
    assert group == 32 or size % 32
