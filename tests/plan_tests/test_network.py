"""Which axes a collective goes along, and what its bytes cost there."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax.plan.chips import CHIPS
from l32jax.plan.hlo import Program
from l32jax.plan.network import HOP, Network, default_shape, group_of, heads_up, sent_bytes
from tests.plan_tests.programs import program

V5P = CHIPS["v5p"]
AXES = {"data": 1, "fsdp": 2, "context": 1, "tensor": 4}


def instruction(attributes: str):
    line = f"ROOT %c = f32[8] all-gather(%x), channel_id=1, {attributes}"
    text = program("%x = f32[8]{0} parameter(0)", line)
    return Program.parse(text).computations["main"].root


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}", [0, 4]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={0}", [*range(8)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, dimensions={0}", [0, 1]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, dimensions={0}", [0, 2]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'a'}", [3, 2]),
        ("replica_groups={}, dimensions={0}", [*range(8)]),
        ("replica_groups=of another kind", None),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", [0, 1]),
        ("dimensions={0}", [*range(8)]),
    ],
)
def test_groups_are_read_in_every_form(attributes, group):
    assert group_of(instruction(attributes), 8) == group


def test_a_group_goes_along_the_axes_in_which_its_devices_differ():
    network = Network(V5P, AXES)
    assert network.spanned([0, 1, 2, 3]) == ("tensor",)
    assert network.spanned([0, 4]) == ("fsdp",)
    assert network.spanned([*range(8)]) == ("fsdp", "tensor")
    assert network.spanned([3]) == ()


def test_axes_are_those_that_jax_means():
    """A mesh of JAX numbers its devices along the last axis first."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    order = np.argsort(ids.reshape(-1))  # logical numbers
    assert Network(V5P, AXES).spanned(order.reshape(2, 4)[0].tolist()) == ("tensor",)


def test_permutations_have_a_direction():
    assert heads_up(instruction("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"))
    assert not heads_up(instruction("source_target_pairs={{0,3},{1,0},{2,1},{3,2}}"))


@given(power=st.integers(0, 12), dims=st.integers(1, 3))
def test_a_default_topology_has_all_chips(power, dims):
    shape = default_shape(2**power, dims)
    assert math.prod(shape) == 2**power and len(shape) == dims
    assert max(shape) <= 2 * min(shape)


def test_all_links_of_a_cube_carry_a_collective_of_all_chips():
    """Three rings, in both directions: 540 GB/s."""
    network = Network(V5P, {"data": 1, "fsdp": 64, "tensor": 1}, (4, 4, 4))
    assert network.seconds("all-gather", 540e9, ["fsdp"]) == pytest.approx(1 + 6 * HOP)


def test_an_axis_has_the_links_of_its_sides():
    network = Network(V5P, {"fsdp": 16, "tensor": 4}, (4, 4, 4))
    assert network.sides == {"fsdp": ((4, True), (4, True)), "tensor": ((4, True),)}
    assert network.seconds("all-gather", 180e9, ["tensor"]) == pytest.approx(1, rel=1e-4)
    assert network.seconds("all-gather", 360e9, ["fsdp"]) == pytest.approx(1, rel=1e-4)


def test_a_part_of_a_side_is_no_ring():
    network = Network(CHIPS["v5e"], {"fsdp": 64, "tensor": 4}, (16, 16))
    assert network.sides["tensor"] == ((4, False),)
    assert sorted(network.sides["fsdp"]) == [(4, False), (16, True)]


@given(
    powers=st.tuples(*[st.integers(0, 3)] * 3),
    chip=st.sampled_from([chip for chip in CHIPS.values() if chip.torus]),
)
def test_axes_share_out_all_chips(powers, chip):
    axes = {name: 2**power for name, power in zip("abc", powers, strict=True)}
    sides = Network(chip, axes).sides
    devices = math.prod(axes.values())
    taken = math.prod(size for some in sides.values() for size, _ in some)
    assert taken == max(1, devices // chip.per_chip)


def test_slices_are_along_the_outermost_axes():
    network = Network(V5P, {"data": 4, "fsdp": 8}, slices=2)
    assert network.local == {"data": 2, "fsdp": 8}
    assert network.between_slices == ("data",)
    assert network.devices == 16


def test_gpus_of_a_host_have_its_switch():
    network = Network(CHIPS["h100"], {"fsdp": 4, "tensor": 8})
    assert network.seconds("all-gather", 450e9, ["tensor"]) == 1
    assert network.seconds("all-gather", 50e9, ["fsdp"]) == 1  # one network card each
    assert network.seconds("all-gather", 400e9, ["fsdp", "tensor"]) == 1


def test_reducing_sends_what_scattering_and_gathering_do():
    both = sent_bytes("reduce-scatter", 800.0, 8) + sent_bytes("all-gather", 800.0, 8)
    assert sent_bytes("all-reduce", 800.0, 8) == both == 1400
    assert sent_bytes("all-gather", 800.0, 1) == 0
