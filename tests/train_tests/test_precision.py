"""Frozen weights in bfloat16 beside float32 masters of those that train."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from l32jax.data.batches import place
from l32jax.model.parameters import flatten, trains
from l32jax.sharding import single_device_mesh
from l32jax.train.objectives import next_token
from l32jax.train.step import begin_stage, init_state, make_train_step
from tests.checkpoint_tests.weights import random_params
from tests.train_tests.small import MODEL, TEXT, rows, stage
from tests.train_tests.traces import equations

HALF = jnp.bfloat16
ADAPTER, TRUNK = ("vision_tower", "adapter"), ("language_model",)


def dtypes(tree) -> dict[str, np.dtype]:
    return {path: leaf.dtype for path, leaf in flatten(tree).items()}


def begun(parts, params):
    return jax.jit(partial(begin_stage, MODEL, stage(parts), seed=0, frozen="bfloat16"))(params)


def test_a_stage_stores_what_it_trains_in_float32_and_the_rest_in_bfloat16():
    with jax.set_mesh(single_device_mesh()):
        first = begun(ADAPTER, random_params(MODEL))
        second = begun(TRUNK, first.params)
    for parts, state in ((ADAPTER, first), (TRUNK, second)):
        is_trainable = trains(parts, MODEL)
        for path, dtype in dtypes(state.params).items():
            assert dtype == (jnp.float32 if is_trainable(path) else HALF), path
        floats = {d for d in dtypes(state.opt_state).values() if d != jnp.int32}
        assert floats == {np.dtype(np.float32)}
    before, after = flatten(first.params), flatten(second.params)
    for path, leaf in before.items():
        expected = leaf.astype(HALF).astype(jnp.float32)
        np.testing.assert_array_equal(after[path].astype(jnp.float32), expected, err_msg=path)


def test_masters_keep_what_bfloat16_would_lose_and_the_loss_falls():
    mesh, chosen = single_device_mesh(), stage(TRUNK, clip_norm=1e9)
    objective = partial(next_token, dtype=HALF)
    with jax.set_mesh(mesh):
        state = jax.jit(partial(init_state, TEXT, chosen, 0, frozen="bfloat16"))()
        before = jax.tree.map(np.array, state.params)
        step = make_train_step(TEXT, chosen, objective, matrix_dtype=HALF)
        batch = place(rows(4, images=False), mesh)
        losses = []
        for rate in (1e-6, 1e-2, 1e-2, 1e-2):
            state, metrics = step(state, batch, jnp.float32(rate))
            if not losses:
                small = jax.tree.map(np.array, state.params)
            losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert set(dtypes(state.params).values()) == {np.dtype(np.float32)}
    name = "decoder/groups/blocks/0/mlp/up/weight"
    old, new = flatten(before)[name], flatten(small)[name]
    assert (old != new).mean() > 0.9  # a step of 1e-6
    assert (old.astype(HALF) != new.astype(HALF)).mean() < 0.1


def test_matrices_are_rounded_once_a_step():
    chosen, mesh = stage(TRUNK), single_device_mesh()
    shape = (1, TEXT.decoder.mlp_dim, TEXT.decoder.embed_dim)

    def casts(matrix_dtype) -> int:
        step = make_train_step(
            TEXT, chosen, partial(next_token, dtype=HALF), matrix_dtype=matrix_dtype
        )
        with jax.set_mesh(mesh):
            state = jax.eval_shape(partial(init_state, TEXT, chosen, 0))
            batch = place(rows(4, images=False), mesh)
            jaxpr = jax.make_jaxpr(step)(state, batch, jnp.float32(0)).jaxpr
        return sum(
            equation.primitive.name == "convert_element_type"
            and equation.outvars[0].aval.dtype == HALF
            and equation.invars[0].aval.dtype == jnp.float32
            and equation.outvars[0].aval.shape == shape
            for equation in equations(jaxpr)
        )

    assert casts(HALF) == 2  # gate and up, of all layers together
    assert casts(jnp.float32) == 0


def test_gradients_are_those_of_float32_to_the_rounding_of_bfloat16():
    mesh, chosen = single_device_mesh(), stage(TRUNK, clip_norm=1e9)

    def moments(dtype):
        with jax.set_mesh(mesh):
            begin = partial(begin_stage, TEXT, chosen, seed=0)
            state = jax.jit(begin)(random_params(TEXT, mesh))
            step = make_train_step(
                TEXT, chosen, partial(next_token, dtype=dtype), matrix_dtype=dtype
            )
            state, _ = step(state, place(rows(4, images=False), mesh), jnp.float32(0))
        return {n: np.asarray(m) for n, m in flatten(state.opt_state).items() if "/mu/" in n}

    exact, rounded = moments(jnp.float32), moments(HALF)
    assert exact
    for name, moment in exact.items():
        error = np.linalg.norm(rounded[name] - moment) / np.linalg.norm(moment)
        assert error < 0.05, (name, error)
