"""The optimizer's state in the host's memory: the same training, and other places."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l32jax.checkpoint.store import Store
from l32jax.config import MeshConfig
from l32jax.data.batches import place
from l32jax.model.parameters import flatten
from l32jax.run_config import BadSteps, TrainConfig
from l32jax.sharding import make_mesh
from l32jax.train.step import abstract_state, begin_options, begin_stage, stage_step
from tests.checkpoint_tests.weights import random_params
from tests.train_tests.small import TEXT, rows, stage

STEPS = 3


def run_of(offload: str, then: str = "stop") -> TrainConfig:
    text = replace(stage(("language_model",)), bad_steps=BadSteps(then=then))
    return TrainConfig(model=TEXT, stages=(text,), directory="runs/none", offload=offload)


def trained(config: TrainConfig, mesh):
    """The state after some steps."""
    with jax.set_mesh(mesh):
        begin = partial(begin_stage, TEXT, config.stages[0], seed=0, **begin_options(config))
        state = jax.jit(begin)(random_params(TEXT, mesh))
        step, batch = stage_step(config, 0), place(rows(8, images=False), mesh)
        for _ in range(STEPS):
            state, _ = step(state, batch, jnp.float32(1e-2))
        assert step._cache_size() == 1  # its result goes in again as it came out
    return state


def kinds(state) -> set[str]:
    """Where the arrays of the optimizer are; its counts stay on the devices."""
    arrays = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert arrays
    return {leaf.sharding.memory_kind for leaf in arrays}


@pytest.mark.parametrize("then", ["stop", "skip"])
def test_training_is_the_same_to_the_last_bit(then):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    here, there = (trained(run_of(offload, then), mesh) for offload in ("none", "optimizer"))
    assert kinds(here) == {jax.devices()[0].default_memory().kind}
    assert kinds(there) == {"pinned_host"}
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_checkpoint_is_restored_to_where_the_run_wants_it(tmp_path):
    mesh = make_mesh(MeshConfig(fsdp=8))
    config = run_of("optimizer")
    state = trained(config, mesh)
    with Store(tmp_path / "store", keep=1) as store, jax.set_mesh(mesh):
        store.save(STEPS, state, config_json="{}", iterator_state=b"", extra_files={})
        store.wait()
        restored = store.restore(abstract_state(config, 0, mesh)).state
        moved = store.restore(abstract_state(run_of("none"), 0, mesh)).state
    assert kinds(restored) == {"pinned_host"} != kinds(moved)
    for found in (restored, moved):
        for path, leaf in flatten(state.opt_state).items():
            np.testing.assert_array_equal(
                np.asarray(leaf), np.asarray(flatten(found.opt_state)[path]), err_msg=path
            )
