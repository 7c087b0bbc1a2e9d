"""The learning rate at its turning points, and what the optimizer does to which parameter."""

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax.model.llama import abstract_params
from l32jax.model.parameters import flatten
from l32jax.run_config import OptimizerConfig
from l32jax.sharding import single_device_mesh
from l32jax.train.optimizer import learning_rate, make_optimizer
from tests.train_tests.small import MODEL

SCHEDULES = st.sampled_from(["cosine", "linear", "constant"])
PEAK, FINAL = 1e-3, 1e-5


def rates(num_steps: int, warmup: int, schedule: str) -> list[float]:
    """One after the last step included."""
    config = OptimizerConfig(peak_lr=PEAK, final_lr=FINAL, warmup_steps=warmup, schedule=schedule)
    return [learning_rate(config, num_steps, step) for step in range(num_steps + 1)]


@given(st.integers(1, 200), st.integers(0, 50), SCHEDULES)
def test_rate_rises_to_the_peak_and_falls_to_the_end(decay_steps, warmup, schedule):
    found = rates(warmup + decay_steps, warmup, schedule)
    assert all(0 < rate <= PEAK * (1 + 1e-12) for rate in found)
    rise, fall = found[: warmup + 1], found[warmup:]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    assert found[0] == pytest.approx(PEAK / (warmup + 1))
    assert found[warmup] == pytest.approx(PEAK)
    assert found[-1] == pytest.approx(PEAK if schedule == "constant" else FINAL)


def test_the_middle_of_the_decay():
    middle = (PEAK + FINAL) / 2
    assert rates(20, 10, "cosine")[15] == pytest.approx(middle)
    assert rates(20, 10, "linear")[15] == pytest.approx(middle)
    assert rates(20, 0, "cosine")[5] == pytest.approx(FINAL + (PEAK - FINAL) * (2 + 2**0.5) / 4)


def test_a_stage_that_is_all_warm_up_never_reaches_the_peak():
    found = rates(5, 10, "cosine")
    assert found == sorted(found) and found[-1] < PEAK


def first_update(config: OptimizerConfig, grads, params):
    """Jitted: step by step, every operation would be compiled for every shape."""
    optimizer = make_optimizer(config)

    @jax.jit
    def update(grads, params):
        return optimizer.update(grads, optimizer.init(params), params)

    return update(grads, params)


def ones():
    with jax.set_mesh(single_device_mesh()):
        shapes = abstract_params(MODEL)
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)


def decayed(path: str) -> bool:
    """Matrices and tables of tokens; not what scales, shifts, opens, or tells a place."""
    return path.split("/")[-1] == "weight"


def test_weight_decay_spares_norms_biases_gates_and_places():
    config = OptimizerConfig(peak_lr=1.0, weight_decay=0.5)
    params = ones()
    updates, _ = first_update(config, jax.tree.map(np.zeros_like, params), params)
    for path, update in flatten(updates).items():
        np.testing.assert_allclose(update, -0.5 if decayed(path) else 0, err_msg=path)
    spared = {path for path in flatten(params) if not decayed(path)}
    for kind in ("scale", "bias", "gate", "embedding"):
        assert any(path.endswith(kind) for path in spared)


def test_gates_alone_move_at_their_own_rate():
    params = ones()

    def updates(gate_rate):
        config = OptimizerConfig(peak_lr=1.0, gate_rate=gate_rate)
        return flatten(first_update(config, params, params)[0])

    plain, faster = updates(1.0), updates(30.0)
    for path, update in faster.items():
        times = 30 if path.endswith("gate") else 1
        np.testing.assert_allclose(update, times * plain[path], rtol=1e-6, err_msg=path)
    names = {path.split("/")[-1] for path in plain}
    assert {"attention_gate", "mlp_gate", "gate"} <= names


def test_updates_do_not_depend_on_the_size_of_large_gradients():
    """They are clipped by the norm of all of them together."""
    config = OptimizerConfig(peak_lr=1.0, clip_norm=1.0, weight_decay=0.0)
    params = {"a": {"weight": np.ones(3, np.float32)}, "b": {"scale": np.ones(2, np.float32)}}
    direction = {"a": {"weight": np.array([3, -4, 0])}, "b": {"scale": np.array([0, 12])}}

    def moments(size):
        grads = jax.tree.map(lambda g: np.float32(size * g), direction)
        return first_update(config, grads, params)[1]

    once, more = moments(1.0), moments(1000.0)
    for one, other in zip(jax.tree.leaves(once), jax.tree.leaves(more), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    (mu,) = (state.mu for state in jax.tree.leaves(once, is_leaf=_is_adam) if _is_adam(state))
    assert optax.tree.norm(mu) == pytest.approx(0.1, rel=1e-4)  # (1 - beta1) of norm 1


def _is_adam(state) -> bool:
    return isinstance(state, optax.ScaleByAdamState)
