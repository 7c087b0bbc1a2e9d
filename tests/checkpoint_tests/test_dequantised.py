"""Quantised weights in a checkpoint: read for what they stand for, and believed in nothing."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax.checkpoint.dequantised import dequantised
from l32jax.checkpoint.engine.slices import Home, Slices
from l32jax.checkpoint.native import open_store
from l32jax.checkpoint.store import Store
from l32jax.config_text import to_json
from l32jax.errors import InputError
from tests.checkpoint_tests.weights import random_params
from tests.train_tests.small import TEXT

ALL = slice(None)


def weight_of(values, scale) -> Slices:
    return Slices.of({"up": {"weight": {"qvalue": values, "scale": scale}}})


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.data())
def test_any_rows_are_the_integers_times_their_scales(outs, groups, size, data):
    random = np.random.default_rng(outs)
    values = random.integers(-8, 8, (outs, groups * size)).astype(ml_dtypes.int4)
    scale = random.random((outs, groups)).astype(ml_dtypes.bfloat16)
    slices = dequantised(weight_of(values, scale))
    assert slices.shapes == {"up/weight": values.shape}
    start = data.draw(st.integers(0, outs))
    rows = slice(start, data.draw(st.integers(start, outs)))
    found = slices.read(Home("up/weight", None), rows)
    whole = values.astype(np.float32) * np.repeat(scale.astype(np.float32), size, axis=1)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, whole[rows])


@pytest.mark.parametrize("shape", [(4, 4), (4,), (2, 6), (4, 12), (4, 0), (1, 6)])
def test_scales_that_do_not_fit_are_refused(shape):
    values = np.zeros((4, 6), np.int8)
    with pytest.raises(InputError, match=r"'up/weight/scale' in memory: its shape is"):
        dequantised(weight_of(values, np.ones(shape, np.float32)))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int4])
def test_integers_are_no_parameters(dtype, tmp_path):
    params = random_params(TEXT)
    table = params["decoder"]["embedding"]
    table["weight"] = table["weight"].astype(dtype)
    with Store(tmp_path / "run") as store:
        store.save(1, {"params": params}, config_json=config_json())
    with pytest.raises(InputError, match="the types differ of params/decoder/embedding/weight"):
        open_store(tmp_path / "run")


def test_floats_are_no_integers(tmp_path):
    params = random_params(TEXT)
    up = params["decoder"]["groups"]["blocks"][0]["mlp"]["up"]
    up["weight"] = {"qvalue": up["weight"], "scale": jnp.ones((*up["weight"].shape[:2], 1))}
    with Store(tmp_path / "run") as store:
        store.save(1, {"params": params}, config_json=config_json())
    with pytest.raises(InputError, match=r"the types differ of params/.*/up/weight/qvalue"):
        open_store(tmp_path / "run")


def config_json() -> str:
    return f'{{"model": {to_json(TEXT)}}}'
