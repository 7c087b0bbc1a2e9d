"""What is compiled is what a run puts on its devices and runs."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from l32jax.config import MeshConfig
from l32jax.data.batches import place
from l32jax.data.rows import make_row, stack
from l32jax.data.samples import Sample
from l32jax.errors import InputError
from l32jax.plan.program import abstract_batch, compile_training, device_bytes, training_inputs
from l32jax.plan.topology import open_topology
from l32jax.run_config import TrainConfig
from l32jax.sharding import make_mesh
from l32jax.train.step import begin_options, init_state
from tests.train_tests.small import LENGTH, MODEL, TEXT, VISION, stage


def run_of(model, *, images: int = 0, **fields) -> TrainConfig:
    chosen = stage(("language_model",))
    data = replace(chosen.data, batch_size=8, max_images=images)
    return TrainConfig(
        model=model, stages=(replace(chosen, data=data),), directory="runs/none", **fields
    )


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=2, context=2, tensor=2)])
def test_batches_are_as_training_places_them(images, mesh):
    mesh = make_mesh(mesh)
    config = run_of(MODEL if images else TEXT, images=images)
    samples = [Sample.single([1, 2, 3], [1.0] * 3, [])]
    row = make_row(samples, length=LENGTH, vision=VISION if images else None)
    placed = place(stack([row] * 8), mesh)
    planned = abstract_batch(config, 0, mesh)
    assert planned.keys() == placed.keys()
    for name, array in placed.items():
        found = planned[name]
        assert (found.shape, found.dtype) == (array.shape, array.dtype), name
        assert found.sharding.is_equivalent_to(array.sharding, array.ndim), name


@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_the_state_is_as_a_stage_begins_with_it(offload):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    config = run_of(TEXT, offload=offload)
    planned, _ = training_inputs(config, 0, mesh)
    with jax.set_mesh(mesh):
        options = begin_options(config)
        begun = jax.jit(lambda: init_state(TEXT, config.stages[0], 0, **options))()
    for (path, found), array in zip(
        jax.tree.leaves_with_path(planned), jax.tree.leaves(begun), strict=True
    ):
        assert (found.shape, found.dtype) == (array.shape, array.dtype), path
        if array.ndim:  # of scalars the compiler says where they are, whatever they are told
            assert found.sharding.is_equivalent_to(array.sharding, array.ndim), path
    on_one = sum(
        leaf.addressable_shards[0].data.nbytes
        for leaf in jax.tree.leaves(begun.opt_state)
        if leaf.sharding.memory_kind != "pinned_host"
    )
    assert device_bytes(planned.opt_state) == on_one


def test_a_slice_that_does_not_exist_is_refused():
    for name in ("v5p", "v5p:0x2x2", "v5p:2x2", "v9:2x2", "v5e:4x4x4", "v5p:two"):
        with pytest.raises(InputError, match="topology|no chip"):
            open_topology(name)


@pytest.mark.compile
@pytest.mark.slow
def test_a_step_compiles_for_chips_that_are_not_here():
    """In bfloat16, as kernels take it; memory is what arithmetic says of the state."""
    pytest.importorskip("libtpu")
    topology = open_topology("v5e:2x2")
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), topology.devices)
    config = run_of(TEXT, dtype="bfloat16", params="bfloat16", saved="attention")
    compiled = compile_training(config, 0, mesh)
    assert "ENTRY" in compiled.text and "tpu_custom_call" in compiled.text
    state, _ = training_inputs(config, 0, mesh)
    held = device_bytes(state)
    assert held <= compiled.memory.peak < held + 2**28
    assert compiled.memory.work == compiled.memory.peak - sum(
        (compiled.memory.params, compiled.memory.optimizer, compiled.memory.batch)
    )
    assert compiled.memory.params == pytest.approx(held / 3, rel=0.2)  # and two moments


@pytest.mark.compile
def test_a_mesh_that_does_not_divide_the_model_is_refused():
    pytest.importorskip("libtpu")
    topology = open_topology("v5e:2x4")
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=8), topology.devices)
    config = run_of(TEXT, dtype="bfloat16")
    with pytest.raises(InputError, match="tensor=8"):
        compile_training(config, 0, mesh)
    assert np.prod(list(mesh.shape.values())) == 8
