"""The time of a step, from the compiled program and what its chip is capable of.

Instructions run in the program's order, each as long as XLA's own estimate of cycles says; loops as
often as their counter does. Kernels take what the caller says. Collectives take their bytes at the
links' bandwidth: all of it where the program waits for them, and what is left of it where they
were started earlier. So it is a model, and compares programs; nothing of it was measured.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

from l32jax.plan.chips import Chip
from l32jax.plan.compute import COLLECTIVES, seconds_of, traffic
from l32jax.plan.hlo import Computation, Instruction, Program
from l32jax.plan.network import Network, group_of, heads_up, sent_bytes
from l32jax.plan.tally import Exchange, StepTime, Sum

KernelSeconds = Callable[[Instruction], float | None]

FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "add-dependency", "opt-barrier", "async-update", "infeed", "outfeed",
}  # fmt: skip
FREE_CALLS = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "Sharding",
    "SPMDFullToShardShape", "SPMDShardToFullShape", "ConcatBitcast",
}  # fmt: skip
LINKS = ("up", "down")  # neighbours can send in both directions at once
HOST, HOST_BANDWIDTH = 5, 16e9  # a memory space of XLA; bytes a second, assumed
UNKNOWN_KERNEL = 0.45  # share of the peak, of a kernel that says its operations and no more


def estimate(
    text: str,
    chip: Chip,
    mesh_axes: Mapping[str, int],
    kernel_seconds: KernelSeconds = lambda instruction: None,
    *,
    shape: tuple[int, ...] = (),
) -> StepTime:
    """The time of a compiled program.

    Args:
      text: `compiled.as_text()`, of a TPU.
      mesh_axes: sizes by name, outermost first; logical devices are numbered along the last first.
        If the program is for fewer devices than these, it is one of several slices, which the
        outermost axes go through.
      kernel_seconds: of a Pallas call; None of one that it does not know.
      shape: topology of a slice, like (4, 4, 4); the most even one if it is not given.
    Raises:
      ValueError: the text is not that of a program, or is for another number of devices.
    """
    program = Program.parse(text)
    found = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    devices = math.prod(mesh_axes.values())
    partitions = int(found[1]) if found else devices
    if devices % partitions:
        raise ValueError(f"a program for {partitions} devices on a mesh of {dict(mesh_axes)}")
    network = Network(chip, mesh_axes, shape, devices // partitions)
    return _Timer(program, chip, network, kernel_seconds).of(program.entry)


class _Timer:
    def __init__(
        self, program: Program, chip: Chip, network: Network, kernel_seconds: KernelSeconds
    ):
        self.program, self.chip, self.network = program, chip, network
        self.kernel_seconds = kernel_seconds
        self.known: dict[str, StepTime] = {}
        self.inside: dict[str, frozenset[str]] = {}

    def of(self, name: str) -> StepTime:
        """Of one run of a computation."""
        if name not in self.known:
            computation = self.program.computations[name]
            self.known[name] = _Run(self, computation).time()
        return self.known[name]

    def opcodes(self, name: str) -> frozenset[str]:
        """Of everything that is computed inside."""
        if name not in self.inside:
            instructions = self.program.computations[name].instructions
            deeper = (self.opcodes(called) for one in instructions for called in one.called)
            self.inside[name] = frozenset(one.opcode for one in instructions).union(*deeper)
        return self.inside[name]


class _Run:
    """One computation, instruction by instruction.

    pending: when what was started is over, on the clock of this computation. lanes: until when the
    links, the way to other slices and the way to HBM are taken by it.
    """

    def __init__(self, timer: _Timer, computation: Computation):
        self.timer, self.computation = timer, computation
        self.total = StepTime()
        self.pending: dict[str, float] = {}
        self.lanes: dict[str, float] = {}

    def time(self) -> StepTime:
        for instruction in self.computation.instructions:
            self._step(instruction)
        return self.total

    def _step(self, one: Instruction) -> None:
        opcode = one.opcode
        if opcode in FREE:
            return
        if opcode == "while":
            self._loop(one)
        elif opcode in ("call", "conditional"):
            runs = [self.timer.of(name) for name in one.branches or one.called]
            self.total.add(max(runs, key=lambda run: run.seconds))
        elif opcode.endswith("-done"):
            self._await(one)
        elif opcode.endswith("-start") or opcode in ("send", "recv"):
            self._start(one)
        elif opcode in COLLECTIVES:
            self.total.exposed += self._begin(one, opcode) - self.total.seconds
        elif opcode == "custom-call":
            self._custom_call(one)
        else:
            self._compute(one)

    def _loop(self, one: Instruction) -> None:
        trips = self.timer.program.trips(one, self.computation)
        if trips is None:
            self._doubt("a loop whose turns are not a constant: one is counted", 0.0)
        body = one.attribute(r"\bbody=%?([\w.\-]+)")
        assert body
        self.total.add(self.timer.of(body), 1 if trips is None else trips)

    def _start(self, one: Instruction) -> None:
        kind = one.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            self.pending[one.name] = self._begin(one, kind)
        elif kind in ("send", "recv"):
            begin = max(self.total.seconds, self.lanes.get("slices", 0.0))
            self.lanes["slices"] = self.pending[one.name] = begin + self._transfer(one)
        elif kind == "copy":
            begin = max(self.total.seconds, self.lanes.get("memory", 0.0))
            self.lanes["memory"] = self.pending[one.name] = begin + self._copy(one)
        else:
            self._start_computation(one)

    def _start_computation(self, one: Instruction) -> None:
        """That of an "async-start": its collectives, or what else runs beside the core."""
        inside = StepTime()
        for name in one.called:
            inside.add(self.timer.of(name))
        self.total.add_counts(inside)
        begin = max([self.total.seconds, *(self.lanes.get(lane, 0.0) for lane in LINKS)])
        self.pending[one.name] = begin + inside.seconds
        if inside.exposed:
            self.lanes.update(dict.fromkeys(LINKS, self.pending[one.name]))

    def _begin(self, one: Instruction, kind: str) -> float:
        """When a collective that starts now, or as soon as its links are free, is over."""
        taken = LINKS
        if kind == "collective-permute":
            taken = LINKS[:1] if heads_up(one) else LINKS[1:]
        begin = max([self.total.seconds, *(self.lanes.get(lane, 0.0) for lane in taken)])
        end = begin + self._exchange(one, kind)
        self.lanes.update(dict.fromkeys(taken, end))
        return end

    def _copy(self, one: Instruction) -> float:
        """Seconds of a copy between HBM and the memory of the core; the host's is far."""
        if any(array.space == HOST for array in one.arrays):
            seconds = one.arrays[0].num_bytes / HOST_BANDWIDTH
            self._doubt(f"{one.opcode} of the host's memory, at an assumed bandwidth", seconds)
            return seconds
        return max(traffic(one, self.computation)) / self.timer.chip.hbm

    def _await(self, one: Instruction) -> None:
        started = _started(self.computation, one)
        if started is None or started.name not in self.pending:
            self._doubt(f"{one.opcode} of what was started elsewhere", 0.0)
            return
        late = max(0.0, self.pending.pop(started.name) - self.total.seconds)
        if started.opcode == "copy-start":
            self.total.other += late
        else:
            self.total.exposed += late

    def _exchange(self, one: Instruction, kind: str) -> float:
        """Seconds of a collective, which is noted."""
        network = self.timer.network
        group = group_of(one, network.devices)
        if group is None:
            self._doubt(f"{kind} of groups that are not understood: all devices", 0.0)
            group = [*range(network.devices)]
        given = self._given_bytes(one)
        whole = given * len(group) if kind == "all-gather" else given
        sent = sent_bytes(kind, whole, len(group))
        axes = network.spanned(group)
        seconds = network.seconds(kind, sent, axes) if axes else 0.0
        self._note(Exchange(kind, axes), sent, seconds)
        return seconds

    def _given_bytes(self, one: Instruction) -> float:
        """Of what a device brings, which XLA may narrow on the way: taken to be sent narrow."""
        given = [array for name in one.operands for array in self.computation.named[name].arrays]
        if len(given) != len(one.arrays):  # what it was started with is in the result too
            return math.fsum(array.num_bytes for array in given)
        narrow = (
            dataclasses.replace(a, dtype=b.dtype) for a, b in zip(given, one.arrays, strict=True)
        )
        return math.fsum(min(a.num_bytes, b.num_bytes) for a, b in zip(given, narrow, strict=True))

    def _transfer(self, one: Instruction) -> float:
        """Seconds of a send to other slices; what is received arrives with what is sent."""
        if "megascale" not in one.attributes:
            self._doubt(f"{one.opcode} to the host", 0.0)
            return 0.0
        if one.opcode == "recv":
            return 0.0
        network = self.timer.network
        kind = one.attribute(r'_xla_megascale_transfer_type="(\w+)"') or "unknown"
        kind = kind.lower().replace("_", "-")
        array = math.fsum(
            array.num_bytes for array in self.computation.named[one.operands[0]].arrays
        )
        whole = array * network.slices if kind == "all-gather" else array
        sent = sent_bytes(kind, whole, network.slices)
        seconds = network.seconds_between_slices(sent)
        self._note(Exchange(f"{kind} of slices", network.between_slices), sent, seconds)
        return seconds

    def _custom_call(self, one: Instruction) -> None:
        target = one.attribute(r'custom_call_target="([^"]*)"')
        if target in FREE_CALLS:
            return
        if target != "tpu_custom_call":
            seconds = sum(traffic(one, self.computation)) / self.timer.chip.hbm
            self.total.other += seconds
            self._doubt(f"custom call {target}, at least its bytes", seconds)
            return
        name = re.sub(r"\.\d+$", "", one.name)
        seconds = self.timer.kernel_seconds(one)
        if seconds is None:
            flops = int(one.attribute(r'"cost_estimate":\{[^}]*"flops":"?(\d+)') or 0)
            seconds = flops / (UNKNOWN_KERNEL * self.timer.chip.peak)
            self._doubt(f"kernel {name} that is not known", seconds)
        self.total.kernels += seconds
        self.total.by_kernel.setdefault(name, Sum()).add(Sum(1, seconds=seconds))

    def _compute(self, one: Instruction) -> None:
        inside = frozenset().union(*(self.timer.opcodes(name) for name in one.called))
        inside |= {one.opcode}
        seconds, doubt = seconds_of(one, self.computation, inside, self.timer.chip)
        if doubt:
            self._doubt(doubt, seconds)
        if inside & {"convolution", "dot"}:
            self.total.matmul += seconds
        else:
            self.total.other += seconds
        if inside & COLLECTIVES:
            self.total.exposed += max(0.0, self._fused_exchange(one) - seconds)

    def _fused_exchange(self, one: Instruction) -> float:
        """All-reduce and slice in one is what other compilers call reduce-scatter."""
        seconds = 0.0
        for name in one.called:
            run = _Run(self.timer, self.timer.program.computations[name])
            opcodes = self.timer.opcodes(name)
            for inner in run.computation.instructions:
                kind = inner.opcode
                if kind == "all-reduce" and "dynamic-slice" in opcodes:
                    kind = "reduce-scatter"
                if inner.opcode in COLLECTIVES:
                    seconds += run._exchange(inner, kind)
            self.total.add_counts(run.total)
        return seconds

    def _note(self, exchange: Exchange, sent: float, seconds: float) -> None:
        self.total.exchanges.setdefault(exchange, Sum()).add(Sum(1, sent, seconds))

    def _doubt(self, what: str, seconds: float) -> None:
        self.total.doubts.setdefault(what, Sum()).add(Sum(1, seconds=seconds))


def _started(computation: Computation, done: Instruction) -> Instruction | None:
    found = computation.named.get(done.operands[0]) if done.operands else None
    while found is not None and found.opcode in ("async-update", "get-tuple-element"):
        found = computation.named.get(found.operands[0])
    return found
