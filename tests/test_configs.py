"""Every config in configs/: what it says, and that its steps can be traced at their full size."""

import runpy
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from l32jax.cli.runs import read_config
from l32jax.config import LlamaConfig
from l32jax.data.rows import FIELDS
from l32jax.data.sources.mixture import row_shape
from l32jax.run_config import StageConfig, TrainConfig
from l32jax.sharding import single_device_mesh
from l32jax.train.objectives import next_token
from l32jax.train.step import init_state, make_train_step

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def batch_like(stage: StageConfig, model: LlamaConfig, rows: int) -> dict:
    """A batch of the stage as shapes, with so many rows."""
    shape = row_shape(stage.data, model)
    sizes = {"b": rows, "t": shape.length, "2": 2, "3": 3}
    names = ["tokens", "targets", "weights", "positions", "start", "stop"]
    if shape.vision is not None:
        encoder = shape.vision.encoder
        sizes |= {"i": shape.vision.max_images, "c": encoder.max_tiles, "m": shape.vision.slots}
        sizes |= {"y": encoder.image_size, "x": encoder.image_size}
        names += ["tiles", "aspect", "tile_index", "vision_start", "vision_stop"]
    kinds = {"tiles": jnp.uint8, "weights": jnp.float32}
    return {
        name: jax.ShapeDtypeStruct(
            tuple(sizes[dim] for dim in FIELDS[name]), kinds.get(name, jnp.int32)
        )
        for name in names
    }


def trace(config: TrainConfig, number: int) -> None:
    stage, model = config.stages[number], config.model_of(number)
    options = {"dtype": jnp.dtype(config.dtype), "saved": config.saved}
    step = make_train_step(model, stage, partial(next_token, **options))
    with jax.set_mesh(single_device_mesh()):
        init = partial(init_state, model, stage, 0, frozen=config.params)
        state = jax.eval_shape(init)
        batch = batch_like(stage, model, rows=stage.accumulate)
        after, metrics = jax.eval_shape(step, state, batch, jnp.float32(0))
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
        different.setdefault((stage.trains, shape, config.model_of(number)), number)
    for number in different.values():
        trace(config, number)


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
