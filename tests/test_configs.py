"""Every config in configs/: what it says, and that its steps can be traced at their full size."""

import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from l32jax.cli.runs import execute, read_config
from l32jax.plan.program import abstract_batch, abstract_teachers
from l32jax.rounds_config import RoundsConfig
from l32jax.run_config import TrainConfig
from l32jax.sharding import single_device_mesh
from l32jax.train.step import init_state, stage_step

FOLDER = Path(__file__).parents[1] / "configs"
ROUNDS = [FOLDER / "arithmetic_rounds.py"]
CONFIGS = sorted(set(FOLDER.glob("*.py")) - set(ROUNDS))


def trace(config: TrainConfig, number: int) -> None:
    stage, model = config.stages[number], config.model_of(number)
    step, mesh = stage_step(config, number), single_device_mesh()
    one_row = replace(stage, data=replace(stage.data, batch_size=stage.accumulate))
    stages = (*config.stages[:number], one_row)
    batch = abstract_batch(replace(config, stages=stages), number, mesh)
    with jax.set_mesh(mesh):
        init = partial(init_state, model, stage, 0, frozen=config.params)
        state = jax.eval_shape(init)
        taught_by = abstract_teachers(config, number, mesh)
        after, metrics = jax.eval_shape(step, state, batch, jnp.float32(0), taught_by)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
        lambda a: (a.shape, a.dtype), state
    )
    assert {"loss", "grad_norm"} <= metrics.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_stage_of_a_config_can_be_traced(path):
    config = read_config(path)
    assert path.stem in config.directory
    different = {}  # stages that differ in nothing that a trace would see are traced once
    for number, stage in enumerate(config.stages):
        data = stage.data
        shape = data.length, data.max_images, data.vision_tiles
        seen = stage.trains, stage.objective, shape, config.model_of(number)
        different.setdefault(seen, number)
    for number in different.values():
        trace(config, number)


@pytest.mark.parametrize("path", ROUNDS, ids=lambda path: path.stem)
def test_every_stage_of_rounds_can_be_traced(path):
    config = execute(path)
    assert isinstance(config, RoundsConfig) and config.reward is not None
    for number in range(len(config.run.stages)):
        trace(config.run, number)
    ranked = replace(config.run.model, reward_head=True)
    trace(replace(config.run, model=ranked, stages=(config.reward,)), 0)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_how_to_run_it_and_what_to_expect(path):
    docstring = path.read_text().split('"""')[1]
    assert f"l32jax train configs/{path.name}" in docstring
    assert "CPU" in docstring or "pod" in docstring


def test_the_twin_has_the_tokenizer_that_it_can_make():
    twin = runpy.run_path(str(CONFIGS[0].with_name("vision_twin.py")))
    made = twin["make_tokenizer"]()
    assert made.files()["tokenizer.model"] == twin["TOKENIZER"].read_bytes()
    assert made.num_tokens == twin["MODEL"].decoder.vocab_size
