"""The mesh that a model has by default is about as good as the best, and covers any number."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax import recipes
from l32jax.config import MeshConfig
from l32jax.config_text import override
from l32jax.errors import InputError
from l32jax.plan.planning import mesh_of
from l32jax.plan.search import ranked
from l32jax.plan.topology import open_topology
from l32jax.presets import (
    LLAMA3_1_8B,
    LLAMA3_1_70B,
    LLAMA3_2_1B,
    LLAMA3_2_3B,
    LLAMA3_2_11B_VISION,
    LLAMA3_2_90B_VISION,
    PRESETS,
    mesh_for,
)

MODELS = {
    "1B": LLAMA3_2_1B,
    "3B": LLAMA3_2_3B,
    "8B": LLAMA3_1_8B,
    "70B": LLAMA3_1_70B,
    "11B": LLAMA3_2_11B_VISION,
    "90B": LLAMA3_2_90B_VISION,
}
SMALL, LARGE = ("1B", "3B", "8B", "11B"), ("70B", "90B")


def run(model, rows):
    if model.vision is not None:
        whole = recipes.vision_pretrain(model, start_from="trunk", directory="runs/none")
    else:
        whole = recipes.text_run(model, peak_lr=1e-4, directory="runs/none", tokenizer="none")
    first = whole.stages[0]
    stage = replace(first, data=replace(first.data, batch_size=rows))
    return replace(whole, stages=(stage,))


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        *((name, each) for name in SMALL for each in ("v5p:2x2x2", "h100:1x8")),
        *((name, each) for name in LARGE for each in ("v5p:4x4x4", "h100:32x8")),
    ],
)
def test_no_other_mesh_is_much_faster(name, topology):
    """By arithmetic, two rows a device, with attention's outputs saved as the recipes have it."""
    machine = open_topology(topology)
    config = run(MODELS[name], 2 * len(machine.devices))
    found = [one for one in ranked(config, 0, machine) if one.config.saved == config.saved]
    (own,) = (one for one in found if one.mesh == mesh_of(config, machine))
    assert own.seconds <= 1.05 * found[0].seconds, found[0].mesh


@given(
    st.sampled_from(sorted(PRESETS)), st.sampled_from(["tpu", "gpu", "cpu"]), st.integers(1, 3000)
)
def test_every_number_of_devices_has_one_that_divides_the_model(name, platform, devices):
    model = PRESETS[name]
    sizes = mesh_for(model, platform, devices).sizes(devices)
    assert model.decoder.embed_dim % sizes["fsdp"] == 0
    assert model.vision is None or model.vision.embed_dim % sizes["fsdp"] == 0


def test_a_part_of_it_may_be_given():
    """What is not given is what a mesh has without a preset."""
    config = run(LLAMA3_2_1B, 8)
    assert config.mesh is None
    assert override(config, "mesh.tensor=4").mesh == MeshConfig(tensor=4)
    assert override(config, "mesh=fsdp=2,tensor=4").mesh == MeshConfig(fsdp=2, tensor=4)
    assert override(override(config, "mesh.tensor=4"), "mesh=None").mesh is None


@pytest.mark.parametrize("field", ["vision.image_size", "vision.mlp_dim"])
def test_a_part_of_what_has_no_defaults_is_refused(field):
    """A text model's encoder has nothing to be changed."""
    with pytest.raises(InputError, match="has no parts"):
        override(run(LLAMA3_2_1B, 8), f"model.{field}=448")
