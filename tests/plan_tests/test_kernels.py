"""Attention kernels are told by name, and their time follows from the pairs that are seen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax.plan.chips import CHIPS
from l32jax.plan.hlo import Program
from l32jax.plan.kernels import SHARES, attention_seconds, share_of_peak
from tests.plan_tests.programs import program

V5P = CHIPS["v5p"]


def call(name: str, queries: int, keys: int, *, dtype: str = "bf16", dims=(1, 8, 4, 128)):
    """As the compiler writes a call of `kernels.tpu`: the queries come after the schedule."""
    batch, heads, shared, width = dims
    given = (
        f"s32[], s32[2,64]{{1,0}}, {dtype}[{batch},{heads},{shared},{queries},{width}]"
        f"{{4,3,2,1,0}}, {dtype}[{batch},{heads},{keys},{width}]{{3,2,1,0}}"
    )
    line = f'ROOT %{name}.2 = f32[8] custom-call(%x), custom_call_target="tpu_custom_call", '
    line += f"operand_layout_constraints={{{given}}}, frontend_attributes={{kernel_metadata={{}}}}"
    return Program.parse(program("%x = f32[8] parameter(0)", line)).computations["main"].root


def seconds(*shape, visible=None, **options) -> float:
    found = attention_seconds(V5P, visible)(call(*shape, **options))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "milliseconds"), [("forward", 3.05 / 1.75), ("backward", 6.1 / 1.75)]
)
def test_causal_rows_take_what_their_schedule_does(name, milliseconds):
    """Cycles of docs/attention_costs.md, 32 heads of 8."""
    found = seconds(f"attention_{name}", 8192, 8192)
    assert found == pytest.approx(milliseconds / 1e3, rel=0.02)


def test_other_rows_come_near_to_their_schedules():
    """Packed ones, with a sixth of the pairs; and long ones, with fewer heads."""
    packed = seconds("attention_forward", 8192, 8192, visible={(8192, 8192): 0.1673 / 2})
    assert packed == pytest.approx(1.03e-3 / 1.75, rel=0.15)
    long = seconds("attention_forward", 131_072, 131_072, dims=(1, 2, 4, 128))
    assert long == pytest.approx(174.87e-3 / 1.75, rel=0.1)


def test_an_encoder_sees_all_pairs():
    dims = (1, 16, 1, 80)
    found = seconds("attention_forward", 6432, 6432, visible={(6432, 6432): 1.0}, dims=dims)
    assert found == pytest.approx(2.19e-3 / 1.75, rel=0.15)


def test_lengths_are_filled_up_to_blocks_without_more_to_see():
    """6,432 tokens of an encoder are 7,168 to the kernel; 153,696 of images are 154,624."""
    encoder, dims = {(6432, 6432): 1.0}, (1, 16, 1, 80)
    exact, filled = (
        seconds("attention_forward", size, size, visible=encoder, dims=dims)
        for size in (6432, 7168)
    )
    assert exact < filled < 1.02 * exact
    images = {(2048, 153_696): 1 / 32}
    exact, filled = (
        seconds("attention_forward", 2048, size, visible=images) for size in (153_696, 154_624)
    )
    assert filled == pytest.approx(exact)


@given(share=st.floats(0.01, 1.0))
def test_more_pairs_take_longer(share):
    some, all_pairs = (
        seconds("attention_backward", 1024, 4096, visible={(1024, 4096): seen})
        for seen in (share, 1.0)
    )
    assert some <= all_pairs


def test_other_kernels_are_not_known():
    known = attention_seconds(V5P)
    assert known(call("splash", 8192, 8192)) is None
    assert known(call("attention_forward", 8192, 8192, dtype="f32")) is None


def test_heads_that_are_not_in_the_table_are_like_the_nearest():
    half, whole = share_of_peak("v5p", 32, 4), share_of_peak("v5p", 64, 4)
    assert half == pytest.approx([share / 2 for share in whole])
    assert share_of_peak("v5p", 128, 5) == SHARES["v5p", 128, 4]
    with pytest.raises(ValueError, match="h100"):
        share_of_peak("h100", 128, 4)


def test_every_tpu_is_in_the_table():
    tpus = {chip.name for chip in CHIPS.values() if chip.platform == "tpu"}
    assert {chip for chip, _, _ in SHARES} == tpus
    assert all(0.1 < share < 1 for shares in SHARES.values() for share in shares)
