"""Stages that train LoRA alone, beside a base in any dtype: what changes, and what it costs."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l32jax import api
from l32jax.checkpoint.steps import Steps
from l32jax.config import MeshConfig
from l32jax.data.batches import place
from l32jax.errors import InputError
from l32jax.model.parameters import flatten, is_lora, is_quantised, partition
from l32jax.plan.program import device_bytes, training_inputs
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig
from l32jax.sharding import make_mesh, single_device_mesh
from l32jax.train.loop import stage_directory
from l32jax.train.step import begin_options, begin_stage, stage_step
from tests.checkpoint_tests.weights import random_params
from tests.model_tests.test_lora import MESHES, MODELS
from tests.train_tests.small import MODEL, rows, stage

STEPS = 6
MODEL_WITH_LORA = MODELS["vision"]


def run_of(stored: str, **stage_fields) -> TrainConfig:
    adapters = replace(stage(("lora",)), **stage_fields)
    return TrainConfig(
        model=MODEL_WITH_LORA, stages=(adapters,), directory="runs/none", params=stored
    )


class Trained:
    """A stage of a few steps on one batch of pictures, beside what it started from."""

    def __init__(self, stored: str, mesh=None):
        self.config, self.losses = run_of(stored), []
        mesh = mesh or single_device_mesh()
        with jax.set_mesh(mesh):
            (adapters,) = self.config.stages
            begin = partial(begin_stage, MODEL_WITH_LORA, adapters, seed=0)
            begin = partial(begin, **begin_options(self.config))
            state = jax.jit(begin)(random_params(MODEL_WITH_LORA, mesh))
            self.before = jax.tree.map(np.array, state)
            step, batch = stage_step(self.config, 0), place(rows(8, images=True), mesh)
            for _ in range(STEPS):
                state, metrics = step(state, batch, jnp.float32(1e-2))
                self.losses.append(float(metrics["loss"]))
            assert step._cache_size() == 1
            self.norms = {name for name in metrics if name.startswith("grad_norm/")}
            self.after = jax.tree.map(np.array, state)


@pytest.fixture(scope="module")
def trained():
    return {stored: Trained(stored) for stored in ("float32", "int4")}


def test_only_adapters_change_bit_by_bit(trained):
    for one in trained.values():
        before, after = flatten(one.before.params), flatten(one.after.params)
        changed = {path for path, leaf in before.items() if not np.array_equal(leaf, after[path])}
        assert changed == set(filter(is_lora, before))
        assert one.norms == {"grad_norm/lora"}


def test_the_optimizer_knows_nothing_but_adapters(trained):
    for one in trained.values():
        moments = [name for name in flatten(one.after.opt_state) if not name.endswith("count")]
        assert moments and all(map(is_lora, moments))
        assert len(moments) == 2 * len(list(filter(is_lora, flatten(one.after.params))))


def test_the_loss_goes_down_beside_any_base(trained):
    for one in trained.values():
        assert one.losses[-1] < one.losses[0] - 0.3


def test_a_quantised_base_stays_in_its_bits(trained):
    leaves = jax.tree.leaves(trained["int4"].after.params, is_leaf=is_quantised)
    weights = [leaf for leaf in leaves if is_quantised(leaf)]
    assert {str(leaf.qvalue.dtype) for leaf in weights} == {"int4"}
    assert len(weights) == 7 * 2 + 2 * 6 + 2  # of blocks, of the encoder's, and around them


@pytest.mark.slow
def test_a_mesh_trains_the_same(trained):
    alone = trained["float32"]
    spread = Trained("float32", make_mesh(MESHES["data2_fsdp2_tensor2"]))
    np.testing.assert_allclose(spread.losses, alone.losses, rtol=1e-5)
    for path, leaf in flatten(alone.after.params).items():
        found = flatten(spread.after.params)[path]
        np.testing.assert_allclose(found, leaf, rtol=0, atol=1e-4, err_msg=path)


def test_the_state_is_as_small_as_its_bits():
    """Nine sixteenths of a byte for each number of a projection, two for others."""
    mesh = single_device_mesh()
    sizes = {}
    for stored in ("float32", "bfloat16", "int8", "int4"):
        state, _ = training_inputs(run_of(stored), 0, mesh)
        _, frozen = partition(state.params, is_lora)
        sizes[stored] = device_bytes(frozen)
    numbers = sizes["float32"] // 4
    assert sizes["bfloat16"] == 2 * numbers
    assert sizes["int4"] < sizes["int8"] < sizes["bfloat16"]
    state, _ = training_inputs(run_of("int4"), 0, mesh)
    weights = [w for w in jax.tree.leaves(state.params, is_leaf=is_quantised) if is_quantised(w)]
    of_weights = sum(w.qvalue.size // 2 + 2 * w.scale.size for w in weights)
    rest = numbers - sum(w.qvalue.size for w in weights)
    assert sizes["int4"] == of_weights + 2 * rest


def test_a_part_that_was_frozen_in_few_bits_trains_on_from_what_it_stood_for(trained):
    state = trained["int4"].after
    with jax.set_mesh(single_device_mesh()):
        whole = stage(("language_model",))
        begin = partial(begin_stage, MODEL_WITH_LORA, whole, seed=0, frozen="int4")
        begun = jax.jit(begin)(jax.tree.map(jnp.asarray, state.params))
    block = begun.params["decoder"]["groups"]["blocks"]
    assert block[0]["mlp"]["up"]["weight"].dtype == jnp.float32
    before = state.params["decoder"]["groups"]["blocks"]
    np.testing.assert_array_equal(
        block[1]["mlp"]["up"]["weight"].qvalue, before[1]["mlp"]["up"]["weight"].qvalue
    )


@pytest.fixture(scope="module")
def run(sentences, tmp_path_factory):
    """A QLoRA run on text, stopped by nothing."""

    def config(folder, stored="int4") -> TrainConfig:
        data = DataConfig(mixture=((sentences, 1.0),), batch_size=8, length=64)
        adapters = StageConfig(
            name="adapting",
            num_steps=4,
            trains=("lora",),
            data=data,
            optimizer=OptimizerConfig(peak_lr=1e-2),
        )
        return TrainConfig(
            model=MODELS["text"],
            stages=(adapters,),
            directory=str(folder),
            params=stored,
            save_every=2,
        )

    done = config(tmp_path_factory.mktemp("run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "make_mesh", lambda _: single_device_mesh())
        return config, done, api.run(done)


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, context=1, tensor=2)])
def test_a_stopped_run_goes_on_as_if_never_stopped(mesh, run, monkeypatch):
    """From its second step; to the last bit where it was, nearly so on another mesh."""
    _, done, trained = run
    spread = make_mesh(mesh) if mesh else single_device_mesh()
    monkeypatch.setattr(api, "make_mesh", lambda _: spread)
    Steps(stage_directory(done, 0)).remove(4)
    again = flatten(api.run(done).params)
    for path, leaf in flatten(trained.params).items():
        if mesh is None or not is_lora(path):
            np.testing.assert_array_equal(again[path], leaf, err_msg=path)
        np.testing.assert_allclose(again[path], leaf, rtol=0, atol=1e-5, err_msg=path)


def test_what_has_no_lora_cannot_train_it():
    with pytest.raises(InputError, match=r"the model has no lora; .*lora\.rank=16"):
        replace(run_of("float32"), model=MODEL)
