"""Every instruction counts as often as it runs, and waits for no more than it must."""

import dataclasses

import pytest

from l32jax.plan.chips import CHIPS
from l32jax.plan.network import HOP
from l32jax.plan.steptime import Exchange, estimate
from tests.plan_tests.programs import computation, cycles, loop, program

V5P = dataclasses.replace(CHIPS["v5p"], clock=1e6, hbm=1e6, network=1e3)  # a cycle: 1 us
AXES = {"data": 1, "fsdp": 8, "tensor": 1}  # 2x2x2: three links of 90 GB/s
X = "%x = f32[8]{0:T(128)} parameter(0)"
PRODUCT = "%product (a: f32[8]) -> f32[8] {\n  %a = f32[8] parameter(0)\n" + (
    "  ROOT %r = f32[8] convolution(%a, %a), dim_labels=bf_io->bf\n}\n\n"
)
LARGE = 270 * 10**6  # float32 numbers: seven eighths of their bytes take 3.5 ms over three links
ARRAY = f"f32[{LARGE // 8}]{{0:T(1024)}}"
GATHERED = f"f32[{LARGE}]{{0:T(1024)}}"
GATHER = "replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}"
WIRE = 4 * LARGE * 7 / 8 / 270e9 + 3 * HOP


def of(text: str, axes=AXES, **options):
    return estimate(text, V5P, axes, **options)


def work(name: str, count: int, operand: str = "x") -> str:
    return f"%{name} = f32[8]{{0}} add(%{operand}, %{operand}){cycles(count)}"


def test_cycles_are_seconds_and_products_are_told_from_others():
    fusion = f"%p = f32[8]{{0}} fusion(%x), kind=kOutput, calls=%product{cycles(3_000_000)}"
    found = of(program(X, fusion, work("y", 2_000_000), before=PRODUCT))
    assert (found.matmul, found.other, found.seconds) == (3.0, 2.0, 5.0)
    assert found.warnings == []


def test_the_estimate_for_the_code_is_preferred():
    config = '"window_config":{"estimated_cycles":"9"},'
    config += '"bundle_analysis_data":{"estimated_cycles":"5000000"}'
    line = f"%y = f32[8]{{0}} add(%x, %x), backend_config={{{config}}}"
    assert of(program(X, line)).seconds == 5.0


def test_a_loop_counts_its_body_as_often_as_it_turns():
    found = of(loop(work("y", 1_000_000), begin=1, bound=8, step=2))
    assert found.other == 4.0


def test_loops_inside_loops_multiply():
    inner = loop(work("y", 1_000_000), bound=3)
    entry = inner.index("ENTRY")
    called = inner[entry:].replace("ENTRY %main", "%inner")
    outer = loop("%z = f32[8]{0:T(128)} call(%x), to_apply=%inner", bound=5)
    outer = outer.replace("%condition", "%until").replace("%body", "%turn")
    head, _, rest = outer.partition("\n\n")
    text = head + "\n\n" + inner[:entry].partition("\n\n")[2] + called + "\n" + rest
    assert of(text).other == 15.0


def test_a_loop_without_a_constant_count_is_told_of():
    found = of(loop(work("y", 1_000_000)).replace("constant(8)", "bitcast(%i)"))
    assert found.other == 1.0
    assert "not a constant" in found.warnings[0]


def test_of_branches_the_longest_counts():
    branches = "".join(
        computation(name, X, work("y", count))
        for name, count in (("one", 1_000_000), ("two", 4_000_000))
    )
    line = "%y = f32[8] conditional(%x, %x), branch_computations={%one, %two}"
    assert of(program(X, line, before=branches)).seconds == 4.0


def gather(name: str = "g", opcode: str = "all-gather") -> str:
    kind = GATHERED if opcode == "all-gather" else f"({ARRAY}, {GATHERED})"
    return f"%{name} = {kind} {opcode}(%big), channel_id=1, {GATHER}"


BIG = f"%big = {ARRAY} parameter(1)"
DONE = f"%d = {GATHERED} all-gather-done(%s)"


def test_the_program_waits_for_what_it_gathers_at_once():
    found = of(program(X, BIG, gather()))
    assert found.exposed == pytest.approx(WIRE)
    (noted,) = found.exchanges.items()
    assert noted[0] == Exchange("all-gather", ("fsdp",))
    assert noted[1].sent == 4 * LARGE * 7 / 8
    assert found.sent_along == {("fsdp",): 4 * LARGE * 7 / 8}


@pytest.mark.parametrize(("microseconds", "late"), [(1000, WIRE - 1e-3), (9000, 0.0)])
def test_work_hides_what_was_started_before(microseconds, late):
    lines = X, BIG, gather("s", "all-gather-start"), work("y", microseconds), DONE
    found = of(program(*lines))
    assert found.exposed == pytest.approx(late)
    assert found.seconds == pytest.approx(microseconds * 1e-6 + late)
    (noted,) = found.exchanges.values()
    assert noted.seconds == pytest.approx(WIRE)


def test_two_collectives_share_the_links():
    lines = X, BIG, gather("s", "all-gather-start"), gather("g"), DONE
    assert of(program(*lines)).exposed == pytest.approx(2 * WIRE)


def test_neighbours_send_in_both_directions_at_once():
    def start(name: str, pairs: str) -> str:
        line = f"%{name} = ({ARRAY}, {ARRAY}) collective-permute-start(%big), "
        return line + f"channel_id=1, source_target_pairs={{{pairs}}}"

    def done(name: str) -> str:
        return f"%{name}.done = {ARRAY} collective-permute-done(%{name})"

    up, down = "{0,1},{1,2},{2,3},{3,0}", "{0,3},{1,0},{2,1},{3,2}"
    once = 4 * LARGE / 8 / 90e9 + HOP
    for second, time in ((down, once), (up, 2 * once)):
        lines = X, BIG, start("a", up), start("b", second), done("a"), done("b")
        found = of(program(*lines))
        assert found.exposed == pytest.approx(time)
        assert found.exchanges[Exchange("collective-permute", ("fsdp",))].count == 2


@pytest.mark.parametrize(("opcode", "calls"), [("async", "calls"), ("call", "to_apply")])
def test_what_runs_beside_the_core_is_awaited(opcode, calls):
    inside = computation("offloaded", f"%big = {ARRAY} parameter(0)", f"ROOT {gather()}")
    start = f"%s = (({ARRAY}), {GATHERED}, u32[]) {opcode}-start(%big), {calls}=%offloaded"
    done = f"%d = {GATHERED} {opcode}-done(%s)"
    found = of(program(X, BIG, start, work("y", 1000), done, before=inside))
    assert found.exposed == pytest.approx(WIRE - 1e-3)
    assert found.exchanges[Exchange("all-gather", ("fsdp",))].count == 1


def test_reducing_and_slicing_in_one_is_scattering():
    whole = f"f32[{LARGE}]"
    inside = computation(
        "scattered",
        f"%big = {whole} parameter(0)",
        f"%sum = {whole} all-reduce(%big), replica_groups={{{{0,1,2,3,4,5,6,7}}}}, to_apply=%add",
        "%id = u32[] partition-id()",
        f"ROOT %part = {ARRAY} dynamic-slice(%sum, %id), dynamic_slice_sizes={{{LARGE // 8}}}",
    )
    inside += computation("add", X)
    line = f"%y = {ARRAY} fusion(%g), kind=kCustom, calls=%scattered"
    given = f"%g = {whole} parameter(1)"
    found = of(program(X, given, line, before=inside))
    assert found.exposed == pytest.approx(WIRE)
    assert found.exchanges[Exchange("reduce-scatter", ("fsdp",))].sent == 4 * LARGE * 7 / 8


def test_numbers_that_are_made_narrow_on_the_way_are_sent_narrow():
    """XLA takes the cast of a sum into the collective."""
    lines = (
        "%x = f32[4000] parameter(0)",
        "%y = bf16[4000] all-reduce(%x), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add",
    )
    found = of(program(*lines, before=computation("add", X)))
    assert found.exchanges[Exchange("all-reduce", ("fsdp",))].sent == 2 * 4000 * 2 * 7 / 8


MEGASCALE = 'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'


def test_between_slices_arrays_go_over_the_network():
    """The program is that of one slice of two."""
    lines = (
        "%x = f32[500]{0:T(128)} parameter(0)",
        "%t = token[] after-all()",
        f"%s = (f32[500], u32[], token[]) send(%x, %t), channel_id=1, {MEGASCALE}",
        f"%r = (f32[500], u32[], token[]) recv(%t), channel_id=2, {MEGASCALE}",
        work("y", 500_000),
        "%sd = token[] send-done(%s), channel_id=1",
        "%rd = (f32[500], token[]) recv-done(%r), channel_id=2",
    )
    found = of(program(*lines), {"data": 2, "fsdp": 8})
    assert found.exchanges[Exchange("all-reduce of slices", ("data",))].sent == 2000
    assert found.exposed == pytest.approx(1.5)


def test_a_late_copy_counts_and_one_in_time_does_not():
    start = "%s = (f32[500]{0:S(1)}, f32[500]{0}, u32[]) copy-start(%x)"
    done = "%d = f32[500]{0:S(1)} copy-done(%s)"
    big = "%x = f32[500]{0} parameter(0)"
    for microseconds, late in ((500, 1.5e-3), (3000, 0.0)):
        found = of(program(big, start, work("y", microseconds, "x"), done))
        assert found.other == pytest.approx(microseconds * 1e-6 + late)


def test_what_has_no_estimate_takes_its_bytes_and_is_told_of():
    big = "%x = f32[1000000]{0} parameter(0)"
    found = of(program(big, "%y = f32[1000000]{0} copy(%x)"))
    assert found.other == pytest.approx(8.0)
    assert found.warnings == ["copy without an estimate: at least its bytes (1 times, 8 s)"]


def test_a_lookup_moves_the_rows_it_takes():
    lines = "%x = f32[1000000]{0} parameter(0)", "%y = f32[500000]{0} gather(%x, %x)"
    assert of(program(*lines)).other == pytest.approx(4.0)


KERNEL = '%attention.3 = f32[8] custom-call(%x), custom_call_target="tpu_custom_call"'


def test_kernels_take_what_the_caller_says():
    found = of(program(X, KERNEL), kernel_seconds=lambda call: 2.0)
    assert (found.kernels, found.seconds) == (2.0, 2.0)
    assert found.by_kernel["attention"].count == 1
    assert found.warnings == []


def test_a_kernel_that_nobody_knows_is_told_of():
    flops = int(0.45 * V5P.peak)
    config = f'{{"custom_call_config":{{"cost_estimate":{{"flops":"{flops}"}}}}}}'
    found = of(program(X, f"{KERNEL}, backend_config={config}"))
    assert found.kernels == pytest.approx(1.0)
    assert "kernel attention that is not known" in found.warnings[0]
    assert "kernel attention that is not known" in of(program(X, KERNEL)).warnings[0]


def test_a_program_for_another_mesh_is_refused():
    with pytest.raises(ValueError, match="for 8 devices"):
        of(program(X), {"data": 1, "fsdp": 4})


def test_doubts_of_no_weight_are_told_of_together():
    lines = "%y = f32[1000000]{0} copy(%x)", "%z = f32[8]{0} sort(%t)", "%w = f32[8]{0} reverse(%t)"
    found = of(program("%x = f32[1000000]{0} parameter(0)", "%t = f32[8]{0} parameter(1)", *lines))
    assert len(found.doubts) == 3
    heavy, light = found.warnings
    assert heavy.startswith("copy") and light.startswith("small operations") and "2 times" in light
