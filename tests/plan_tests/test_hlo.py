"""The text of a program becomes instructions, and loops know how often they turn."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l32jax.plan.hlo import Array, Program
from tests.plan_tests.programs import loop, program


def only_loop(text: str) -> int | None:
    parsed = Program.parse(text)
    entry = parsed.computations[parsed.entry]
    return parsed.trips(entry.named["while.1"], entry)


def test_an_instruction_is_read_whole():
    text = program(
        "%x = f32[8]{0:T(128)} parameter(0)",
        "%a-start.2 = (bf16[2,4]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/u32[]{:S(2)}) "
        'copy-start(%x, /*index=1*/%x), channel_id=3, metadata={op_name="jit(f)/(odd"}',
        "ROOT %y = f32[8]{0} fusion(%x), kind=kLoop, calls=%inside",
    )
    x, start, root = Program.parse(text).computations["main"].instructions
    assert (x.opcode, x.literal, x.operands) == ("parameter", "0", ())
    assert (start.name, start.opcode, start.operands) == ("a-start.2", "copy-start", ("x", "x"))
    assert start.arrays == (Array("bf16", (2, 4), 1), Array("u32", (), 2))
    assert start.arrays[0].num_bytes == 16
    assert start.attribute(r"channel_id=(\d+)") == "3"
    assert root.is_root and root.called == ["inside"]


def test_an_instruction_may_have_several_lines():
    """As those of kernels do that have metadata of their own."""
    line = (
        '%k = f32[8]{0} custom-call(%x), frontend_attributes={kernel_metadata={\n"a":"%b = 1"\n}}, '
    )
    text = program("%x = f32[8]{0} parameter(0)", line + "channel_id=7", "ROOT %y = f32[8] add(%k)")
    _, kernel, root = Program.parse(text).computations["main"].instructions
    assert kernel.attribute(r"channel_id=(\d+)") == "7"
    assert root.is_root and root.operands == ("k",)


def test_names_in_quotes_are_not_called():
    line = 'ROOT %y = f32[8]{0} add(%x, %x), metadata={op_name="calls=%nothing"}'
    text = program("%x = f32[8]{0} parameter(0)", line)
    assert Program.parse(text).computations["main"].root.called == []


def test_branches_are_those_of_either_form():
    listed = "ROOT %y = f32[8] conditional(%x, %x), branch_computations={%one, %two}"
    named = "ROOT %y = f32[8] conditional(%x, %x), true_computation=%one, false_computation=%two"
    for line in (listed, named):
        text = program("%x = f32[8]{0} parameter(0)", line)
        assert Program.parse(text).computations["main"].root.branches == ["one", "two"]


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program.parse("HloModule nothing\n")


@settings(max_examples=30)
@given(begin=st.integers(0, 9), bound=st.integers(0, 99), step=st.integers(1, 9))
def test_a_loop_turns_as_often_as_its_counter_says(begin, bound, step):
    """XLA peels first turns off, and takes several at a time."""
    assert only_loop(loop(begin=begin, bound=bound, step=step)) == len(range(begin, bound, step))
    up_to = loop(begin=begin, bound=bound, step=step, direction="LE")
    assert only_loop(up_to) == len(range(begin, bound + 1, step))
    down = loop(begin=bound, bound=begin, step=-step, direction="GT")
    assert only_loop(down) == len(range(bound, begin, -step))


def test_a_known_count_is_taken():
    known = 'body=%body, backend_config={"known_trip_count":{"n":"17"}}'
    assert only_loop(loop(bound=3).replace("body=%body", known)) == 17


def test_a_count_that_is_computed_is_not_guessed():
    for computed in ("add(%p, %p)", "bitcast(%i)"):  # the counter changes
        assert only_loop(loop().replace("constant(8)", computed)) is None


def test_a_condition_may_be_a_fusion():
    """Its bound comes in as a parameter."""
    plain = loop(bound=6, step=2)
    fused = plain.replace(
        "ROOT %test = pred[]{:T(512)} compare(%i, %bound), direction=LT",
        "ROOT %test = pred[]{:T(512)} fusion(%bound, %i), kind=kLoop, calls=%compared",
    ).replace(
        "%condition (",
        "%compared (a: s32[], b: s32[]) -> pred[] {\n"
        "  %a = s32[] parameter(0)\n  %b = s32[] parameter(1)\n"
        "  ROOT %t = pred[] compare(%b, %a), direction=LT\n}\n\n%condition (",
    )
    assert fused != plain and only_loop(fused) == 3
