"""The cost of Pallas kernels on a TPU that is not here, counted in what its compiler writes.

A TPU core starts one VLIW bundle a cycle, in the compiler's order, and libtpu compiles for any
topology on any machine. So the schedule of a kernel's grid loop is its cost: some at every grid
point, the rest in the bodies of `pl.when`, each as often as its condition holds, which the caller
knows. The final listing has no empty bundles: waiting for a matrix unit is a field of the bundle
before. So cycles are taken from the schedule of the pass before, which still has them. Nothing is
measured on hardware: late copies, refetched instructions and the clock's moods are left out.

libtpu reads its flags once, when it is loaded: nothing else in the process may load it before.
"""

import atexit
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

jax.config.update("jax_platforms", "cpu")

DELAY_SLOTS = 4  # bundles that still run after a branch


class Chip(NamedTuple):
    """One device as JAX counts them. Clock and bandwidth are the vendor's or follow from them."""

    topology: str
    gigahertz: float
    gigabytes_per_second: float
    config: str | None = None

    def milliseconds(self, cycles: float) -> float:
        return cycles / self.gigahertz / 1e6

    def copying(self, num_bytes: float) -> float:
        return num_bytes / self.gigabytes_per_second / 1e6


CHIPS = {
    "v4": Chip("v4:2x2x1", 1.05, 1228, "megacore"),
    "v5e": Chip("v5e:2x2", 1.5, 819),
    "v5p": Chip("v5p:2x2x1", 1.75, 2765),
    "v6e": Chip("v6e:2x2", 1.75, 1640),
    "tpu7x": Chip("tpu7x:2x2x1", 2.2, 3690),
}


class Phase(NamedTuple):
    """The body of a `pl.when` that computes; those that only copy count for every grid point.

    step: cycles of one turn of the loop inside, if there is one; `cycles` are those around it.
    usage: slots in use, as a share of those that the core has, by the compiler's column.
    """

    cycles: int
    step: int | None
    usage: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """overhead: cycles of every grid point. vmem: bytes, registers spilled there among them.

    trips: turns of the grid loop on one core, where they are a constant.
    """

    overhead: int
    phases: tuple[Phase, ...]
    trips: int | None
    vmem: int

    def expect(self, num_phases: int) -> tuple[Phase, ...]:
        if len(self.phases) != num_phases or any(phase.step for phase in self.phases):
            raise ValueError(
                f"expected {num_phases} bodies of pl.when without loops, found {self.phases}"
            )
        return self.phases


@dataclasses.dataclass(frozen=True)
class Program:
    """glue: estimated cycles of what XLA computes around the kernels. peak: bytes of HBM."""

    kernels: dict[str, Kernel]
    glue: int
    peak: int

    def kernel(self, pattern: str) -> Kernel:
        found = [kernel for name, kernel in self.kernels.items() if re.search(pattern, name)]
        if len(found) != 1:
            raise ValueError(f"{len(found)} kernels match {pattern!r}: {sorted(self.kernels)}")
        return found[0]


def compile_for(chip: str, function: Callable, *args) -> Program:
    """Compiles for one device. args: trees of shapes (`jax.ShapeDtypeStruct`).

    Inside `function` the abstract mesh has one device of the chip, so code that asks where it runs
    hears of that one.
    """
    sharding = SingleDeviceSharding(_device(chip))
    dump = _dump()
    for path in dump.iterdir():
        path.unlink()
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with on_chip(chip):
        compiled = jax.jit(function).lower(*args).compile()
    text = compiled.as_text() or ""
    names = re.findall(r'%([\w.-]+) = [^\n]*custom_call_target="tpu_custom_call"', text)
    vmem = _vmem(dump)
    kernels = {name: _kernel(dump, name, vmem) for name in names}
    if len(kernels) != len(names):
        raise ValueError(f"two kernels of one name among {names}")
    glue = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
    memory = compiled.memory_analysis()
    assert memory is not None
    return Program(kernels, glue, memory.peak_memory_in_bytes)


def on_chip(chip: str):
    """Within this context JAX's abstract mesh is one device of the chip."""
    mesh = Mesh(np.array([_device(chip)]), ("one",))
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def num_cores(chip: str) -> int:
    return _device(chip).num_cores


@functools.cache
def _device(chip: str):
    _dump()
    options = {"chip_config_name": CHIPS[chip].config} if CHIPS[chip].config else {}
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=CHIPS[chip].topology, **options
    )
    return topology.devices[0]


@functools.cache
def _dump() -> pathlib.Path:
    """Where libtpu writes: it hears of the place, and of much else, when it is loaded."""
    dump = tempfile.mkdtemp(prefix="kernel_cycles")
    atexit.register(shutil.rmtree, dump, ignore_errors=True)
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=.*(final_bundles|utilization|vmem_report).*"
    )
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ |= {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
    return pathlib.Path(dump)


def _only(dump: pathlib.Path, pattern: str) -> pathlib.Path:
    found = [path for path in dump.glob(pattern) if "schedule-analysis" not in path.name]
    if len(found) != 1:
        raise RuntimeError(
            f"{len(found)} files {pattern} in {dump}: was libtpu loaded before kernel_cycles?"
        )
    return found[0]


def _vmem(dump: pathlib.Path) -> dict:
    """The compiler's report on vector memory, by operation: JSON inside a page."""
    page = _only(dump, "*vmem_report.html").read_text()
    report = page.split("const DATA =", 1)[1].lstrip()
    return json.JSONDecoder().raw_decode(report)[0]["hlo_breakdowns"]


def _kernel(dump: pathlib.Path, name: str, vmem: dict) -> Kernel:
    final, usage = (
        Usage.read(_only(dump, f"*-{name}-*{stage}_hlo-static-per-bundle-utilization.txt"))
        for stage in ("final", "pre-delay")
    )
    code = Code.read(_only(dump, f"*-{name}-*final_bundles.txt"), final.cycles(usage))
    grid = max(code.loops, key=len)
    phases = [_phase(span, code, usage) for span in code.bodies(grid) if usage.computes(span)]
    spent = sum(phase.cycles + (phase.step or 0) for phase in phases)
    size = vmem[name]["total_size"]
    return Kernel(len(grid) - spent, tuple(phases), code.trips.get(grid), size)


def _phase(span: range, code: "Code", usage: "Usage") -> Phase:
    loops = [loop for loop in code.loops if _inside(loop, span)]
    if len(loops) > 1:
        raise ValueError(f"{len(loops)} loops in one body of pl.when: cannot tell their turns")
    step = len(loops[0]) if loops else None
    return Phase(len(span) - (step or 0), step, usage.of(loops[0] if loops else span))


class Code(NamedTuple):
    """A listing of bundles: ranges of cycles.

    skipped: what a branch may jump over. trips: of loops whose exit test is against a constant.
    """

    loops: list[range]
    skipped: list[range]
    trips: dict[range, int]

    @classmethod
    def read(cls, path: pathlib.Path, cycles: list[int]) -> "Code":
        """cycles: when the bundle of each address starts."""
        targets, branches, tests = {}, [], []
        for address, line in _bundles(path):
            for region in re.findall(r"Start(?:/End empty)? region (\d+)", line):
                targets[region] = cycles[address]
            for region in re.findall(r"sbr\.rel [^;]*?target = \$region(\d+)", line):
                branches.append((cycles[address + DELAY_SLOTS + 1], region))
            for trips in re.findall(r"totalorder [^;]*?, (\d+) /\* loop exit test \*/", line):
                tests.append((cycles[address], int(trips)))
        jumps = [(after, targets[region]) for after, region in branches if region in targets]
        loops = [range(to, after) for after, to in jumps if to < after]
        if not loops:
            raise ValueError(f"no loop in {path.name}: a kernel with a grid of one point?")
        unknown = [after for after, region in branches if region not in targets]
        if any(after in max(loops, key=len) for after in unknown):
            raise ValueError(f"a branch in the grid loop of {path.name} leads nowhere")
        skipped = [range(after, to) for after, to in jumps if after <= to]
        return cls(loops, skipped, dict(_tested(loops, tests)))

    def bodies(self, grid: range) -> list[range]:
        """Of `pl.when`, in the program's order.

        The largest stretch of the grid loop that may be skipped is the kernel; what is around it
        moves blocks.
        """
        kernel = max((span for span in self.skipped if _inside(span, grid)), key=len)
        found: list[range] = []
        for span in sorted(self.skipped, key=lambda span: (span.start, -span.stop)):
            nested = found and _inside(span, found[-1])
            if _inside(span, kernel) and span != kernel and not nested:
                found.append(span)
        return found


class Usage(NamedTuple):
    """Slots in use, by bundle or cycle and unit."""

    units: list[str]
    capacity: np.ndarray
    used: np.ndarray

    @classmethod
    def read(cls, path: pathlib.Path) -> "Usage":
        _, units, capacity, _, *rows = path.read_text().splitlines()
        numbers = np.array([list(map(int, row.split())) for row in rows if row.strip()])
        return cls(units.split(", "), np.array(list(map(int, capacity.split()))), numbers)

    def cycles(self, schedule: "Usage") -> list[int]:
        """When each bundle of this listing, and its end, comes in the schedule it was made of.

        Both issue the same in the same order. A bundle's time is that of its first operation.
        """
        listed, planned = (np.cumsum(usage._issued()) for usage in (self, schedule))
        if listed[-1] != planned[-1]:
            raise ValueError("the final bundles are not those of the schedule before")
        before = np.concatenate([[0], listed])
        return np.searchsorted(planned, before, side="right").tolist()

    def _issued(self) -> np.ndarray:
        """Operations by bundle; the first two units are counted as long as they are busy."""
        assert self.units[:2] == ["MXU", "XLU"], self.units
        return self.used[:, 2:].sum(axis=1)

    def computes(self, span: range) -> bool:
        """Or it only starts and awaits copies, or copies by itself: loads, stores, and no more."""
        total = dict(zip(self.units, self.used[span.start : span.stop].sum(axis=0), strict=True))
        return total["VSTORE"] > 0 and (total["VALU"] > 0 or total["VLOAD"] == 0)

    def of(self, span: range) -> dict[str, float]:
        share = self.used[span.start : span.stop].mean(axis=0) / self.capacity
        return dict(zip(self.units, share.round(3).tolist(), strict=True))


def _bundles(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Addresses and text; a long bundle fills several lines."""
    address = 0
    with path.open(errors="replace") as lines:
        for line in lines:
            if begins := re.match(r"\s*(0x[0-9a-f]+|0)\s+(?:[LP][A-Z])?:", line):
                address = int(begins[1], 16)
            yield address, line


def _inside(span: range, other: range) -> bool:
    return other.start <= span.start and span.stop <= other.stop


def _tested(loops: list[range], tests: list[tuple[int, int]]) -> Iterator[tuple[range, int]]:
    """Each exit test with the innermost loop around it."""
    for address, trips in tests:
        if around := [loop for loop in loops if address in loop]:
            yield min(around, key=len), trips
