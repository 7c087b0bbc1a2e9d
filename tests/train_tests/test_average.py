"""The average of a stage is that of the samples it says it takes, and what the stage results in."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l32jax.data.batches import place
from l32jax.model.parameters import flatten, trains
from l32jax.sharding import single_device_mesh
from l32jax.train.average import averaged, begin_average
from l32jax.train.objectives import next_token
from l32jax.train.step import end_stage, init_state, make_train_step
from tests.train_tests.small import TEXT, rows, stage

SAMPLES = [  # (steps, share before, steps between, steps done at each sample)
    (10, 0.8, 1, [8, 9, 10]),
    (10, 0.8, 2, [8, 10]),
    (10, 0.75, 4, [10]),
    (10, 0.0, 3, [1, 4, 7, 10]),
    (1, 0.8, 5, [1]),
]


def followed(average: str, num_steps: int, share: float, every: int, decay: float = 0.5):
    """The average after each step of parameters that are 1, 4, 9, …"""
    chosen = dataclasses.replace(
        stage(("adapter",), num_steps),
        average=average,
        ema_decay=decay,
        average_from=share,
        average_every=every,
    )
    step = jax.jit(partial(averaged, chosen))
    found, mean = [], begin_average(chosen, {"weight": jnp.ones(2)})
    for done in range(1, num_steps + 1):
        mean = step(mean, {"weight": jnp.full(2, float(done**2))}, jnp.int32(done))
        found.append(float(mean["weight"][0]))
    return found


@pytest.mark.parametrize(("num_steps", "share", "every", "samples"), SAMPLES)
def test_polyaks_average_is_the_mean_of_the_samples(num_steps, share, every, samples):
    found = followed("polyak", num_steps, share, every)
    for done in range(1, num_steps + 1):
        taken = [sample**2 for sample in samples if sample <= done]
        assert found[done - 1] == pytest.approx(np.mean(taken) if taken else 0, rel=1e-6)


@pytest.mark.parametrize(("num_steps", "share", "every", "samples"), SAMPLES)
def test_an_exponential_average_begins_with_its_first_sample(num_steps, share, every, samples):
    found = followed("ema", num_steps, share, every, decay=0.9)
    expected = samples[0] ** 2
    for sample in samples[1:]:
        expected = 0.9 * expected + 0.1 * sample**2
    assert found[-1] == pytest.approx(expected, rel=1e-6)


def test_no_average_has_no_arrays():
    chosen = stage(("adapter",))
    assert begin_average(chosen, {"weight": jnp.ones(2)}) is None
    assert averaged(chosen, None, {"weight": jnp.ones(2)}, jnp.int32(1)) is None


def test_a_stage_results_in_its_average_of_what_trained():
    chosen = dataclasses.replace(
        stage(("language_model",), num_steps=4), average="polyak", average_from=0.5, average_every=2
    )
    mesh, seen = single_device_mesh(), []
    with jax.set_mesh(mesh):
        state = jax.jit(partial(init_state, TEXT, chosen, 0))()
        step = make_train_step(TEXT, chosen, next_token)
        batch = place(rows(4, images=False), mesh)
        for _ in range(4):
            state, _ = step(state, batch, jnp.float32(1e-2))
            seen.append(jax.tree.map(np.array, state.params))
        result = flatten(end_stage(TEXT, chosen, state).params)
    second, fourth = flatten(seen[1]), flatten(seen[3])
    assert set(flatten(state.average)) == set(filter(trains(chosen.trains, TEXT), result))
    for path, leaf in result.items():
        np.testing.assert_allclose(
            leaf, (second[path] + fourth[path]) / 2, rtol=1e-6, atol=1e-7, err_msg=path
        )
