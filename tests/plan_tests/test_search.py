"""A search lists what goes with the model, the batch and the devices, the best first."""

import functools
from contextlib import nullcontext
from dataclasses import replace
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l32jax.plan.chips import chip_of
from l32jax.plan.gpu import plan_by_arithmetic
from l32jax.plan.search import POLICIES, Candidate, compiled, meshes, ranked, variants
from l32jax.plan.topology import Topology
from l32jax.presets import LLAMA3_1_8B, LLAMA3_2_11B_VISION, SMOLLM2_135M
from tests.plan_tests.test_analytic import text, vision


def machine(chip: str, *shape: int) -> Topology:
    return Topology(chip_of(chip), shape, 1, [None] * prod(shape))


@functools.cache
def choices() -> list[Candidate]:
    return ranked(text(rows=32), 0, machine("v5p", 2, 2, 4))


@settings(max_examples=20)
@given(
    devices=st.sampled_from([1, 2, 3, 8, 12, 64]),
    model=st.sampled_from([LLAMA3_1_8B, LLAMA3_2_11B_VISION, SMOLLM2_135M]),
)
def test_meshes_cover_the_devices_and_divide_the_model(devices, model):
    found = [*meshes(model, 8192, devices)]
    assert len(set(found)) == len(found) > 0
    for mesh in found:
        assert prod(mesh.sizes(devices).values()) == devices
        assert model.decoder.num_kv_heads % mesh.tensor == 0
        assert model.decoder.embed_dim % mesh.fsdp == 0
        assert model.vision is None or model.vision.embed_dim % mesh.fsdp == 0


def test_meshes_of_a_small_machine_are_all_there_are():
    assert len([*meshes(LLAMA3_1_8B, 8192, 2)]) == 4
    assert len([*meshes(SMOLLM2_135M, 8192, 2)]) == 3  # it has three heads
    assert len([*meshes(SMOLLM2_135M, 8191, 2)]) == 2  # and a row of these has no half


def test_every_variant_has_the_whole_batch_in_even_parts():
    config = text(rows=24)
    found = [*variants(config, 0, chip_of("v5p"), 4)]
    assert {one.saved for one in found} == set(POLICIES)
    assert {one.stages[0].accumulate for one in found} == {1, 2, 4, 8}
    for one in found:
        assert one.stages[0].data == config.stages[0].data
        assert 24 % (one.mesh.data * one.mesh.fsdp * one.stages[0].accumulate) == 0


def test_heads_are_not_split_between_machines_with_gpus():
    wide = [one.mesh.tensor for one in variants(text(rows=16), 0, chip_of("h100"), 16)]
    assert max(wide) == 8
    narrow = replace(chip_of("h100"), per_host=2)
    assert max(one.mesh.tensor for one in variants(text(rows=16), 0, narrow, 16)) == 2


def test_images_are_dealt_evenly():
    config = vision(accumulate=1)
    stage = replace(config.stages[0], data=replace(config.stages[0].data, max_images=30))
    found = variants(replace(config, stages=(stage,)), 0, chip_of("v5p"), 4)
    assert {one.mesh.context for one in found} == {1, 2}


def test_the_fastest_come_first_and_all_of_them_fit():
    found = choices()
    assert found == ranked(text(rows=32), 0, machine("v5p", 2, 2, 4))
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    assert all(one.estimate.memory.fits for one in found)
    keys = [(one.config.mesh, one.config.saved) for one in found]
    assert len(set(keys)) == len(keys) > 10


def test_nothing_fits_where_there_is_too_little():
    assert ranked(text(rows=1), 0, machine("v5e", 1, 1)) == []


@pytest.mark.parametrize(("large", "tried"), [(0, 3), (2, 5), (6, 6)])
def test_as_many_are_compiled_as_are_needed(large, tried):
    said: list[str] = []

    def plan(config, number, topology):
        made = plan_by_arithmetic(config, number, topology)
        return replace(made, memory=made.memory._replace(fits=len(said) > large))

    def saying(what: str):
        said.append(what)
        return nullcontext()

    plans = compiled(choices(), 0, machine("v5p", 2, 2, 4), saying, plan)
    assert len(plans) == len(said) == tried
    assert said[0].startswith("compiling 1 of 3 for v5p:2x2x4: fsdp=")
    assert "left" in said[1]
