"""Modelled cost of attention on TPUs: ours, JAX's splash attention and its flash attention.

    python benchmarks/attention.py --chips v5p v6e v5e --json costs.json

Needs no TPU: kernels are compiled for one and their bundles counted (`kernel_cycles`), each as
often as it runs. Nothing is measured on hardware. A kernel's time is the larger of its cycles at
the chip's clock and of its bytes at the chip's bandwidth: as if no copy kept it waiting otherwise.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import kernel_cycles
from attention_costs import Row, Workload, causal, cross, ours, packed, tower
from kernel_cycles import CHIPS
from peer_costs import Splash, flash

WORKLOADS = {
    "self": lambda: causal("self 8k", 8192, 8, 4, 128),
    "self64": lambda: causal("self 8k", 8192, 8, 4, 64),
    "packed": packed,
    "cross": cross,
    "tower": tower,
    "long": lambda: causal("self 128k", 131072, 2, 4, 128),
}


# The fastest of these are those of 1,024, by full runs of this file: fused without glue, which for
# them is to sum the partial dq of every block of keys, and mostly apart with it.
SPLASHES = [Splash(block, fused) for block in (512, 1024) for fused in (True, False)]
FASTEST = SPLASHES[2:]


def splashes(chip: str, *, quick: bool) -> list[Splash]:
    pairs = [one._replace(batch=2) for one in FASTEST]
    if kernel_cycles.num_cores(chip) == 1:
        pairs = []
    if quick:
        return pairs or FASTEST
    return [*SPLASHES, *pairs, *(one._replace(segments=False) for one in FASTEST)]


def self_rows(chip: str, work: Workload, *, quick: bool) -> Iterator[Row]:
    yield ours(chip, work)
    for configuration in splashes(chip, quick=quick):
        yield attempt(chip, work, str(configuration), configuration.row)
    if not quick:
        yield attempt(chip, work, "flash 512", flash)


def attempt(chip: str, work: Workload, name: str, make: Callable[[str, Workload], Row]) -> Row:
    """The row, or what the compiler said instead."""
    try:
        return make(chip, work)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return Row(chip, work.title, name, error=" ".join(str(error).split())[:160])


def rows(chip: str, name: str, *, quick: bool) -> Iterator[Row]:
    work = WORKLOADS[name]()
    if name == "cross":
        yield ours(chip, work)
        yield ours(chip, work, dense=True)
    elif name == "packed":  # splash's masks are static: there it costs what the causal row costs
        yield ours(chip, work)
    else:
        yield from self_rows(chip, work, quick=quick)


def table(rows: Sequence[Row]) -> str:
    head = (
        "| workload | kernel | forward | backward | sum | HBM MB | HBM ms | ms | with glue "
        "| of splash | with glue | VMEM MiB | HBM MiB |"
    )
    lines = [head, "|---|---" + "|---:" * 11 + "|"]
    for row in rows:
        begin = f"| {row.workload} | {row.kernel} | "
        if row.error:
            lines.append(begin + row.error.replace("|", "/") + " |" * 11)
            continue
        vmem = max(kernel.vmem for kernel in row.kernels.values())
        backward_cycles = row.cycles - row.forward.cycles
        best = fastest_splash(rows, row.workload, glue=False)
        with_glue = fastest_splash(rows, row.workload, glue=True)
        cells = [
            *(f"{cycles / 1e6:.2f}" for cycles in (row.forward.cycles, backward_cycles)),
            f"{row.cycles / 1e6:.2f}",
            f"{row.num_bytes / 1e6:.0f}",
            f"{CHIPS[row.chip].copying(row.num_bytes):.2f}",
            f"{row.milliseconds:.2f}",
            f"{row.with_glue:.2f}",
            f"{row.milliseconds / best:.2f}",
            f"{row.with_glue / with_glue:.2f}",
            f"{vmem / 2**20:.1f}",
            f"{row.peak / 2**20:.0f}",
        ]
        lines.append(begin + " | ".join(cells) + " |")
    return "\n".join(lines)


def fastest_splash(rows: Sequence[Row], workload: str, *, glue: bool) -> float:
    """Milliseconds, with segment ids, one row or two at a time; nan if there is none."""
    found = [
        row.with_glue if glue else row.milliseconds
        for row in rows
        if row.workload == workload and re.match(r"splash (?!.*no segments)", row.kernel)
    ]
    return min((time for time in found if not math.isnan(time)), default=math.nan)


class Bar(NamedTuple):
    """What must hold: `value` is at most `limit`."""

    what: str
    value: float
    limit: float

    def __str__(self) -> str:
        verdict = "PASS" if self.value <= self.limit else "FAIL"
        return f"{verdict} {self.what}: {self.value:.3f}, bar {self.limit:.3f}"


SPLASH_BARS = {"v5p": 0.75, "v6e": 1.0}


def bars(chip: str, results: dict[str, list[Row]]) -> Iterator[Bar]:
    """Of the workloads that were run.

    Against splash with glue, since that includes the last step of its fused backward pass; against
    ourselves without, since that is the same.
    """
    first = {name: found[0] for name, found in results.items()}
    time = {name: row.milliseconds for name, row in first.items()}
    if "self" in time and chip in SPLASH_BARS:
        best = fastest_splash(results["self"], first["self"].workload, glue=True)
        yield Bar(f"{chip} self / splash", first["self"].with_glue / best, SPLASH_BARS[chip])
    if {"self", "packed"} <= time.keys():
        yield Bar(f"{chip} packed / causal", time["packed"] / time["self"], 0.35)
    if "cross" in time:
        dense = results["cross"][1].milliseconds
        yield Bar(f"{chip} cross / every pair masked", time["cross"] / dense, 1 / 3)


def units(rows: Sequence[Row]) -> str:
    """Of our kernels: the cycles of each part, and how busy the units are where time is spent."""
    lines = []
    for row in rows:
        for name, kernel in row.kernels.items() if row.kernel == "ours" else ():
            sizes = [
                f"{phase.cycles}" + f" + n {phase.step}" * bool(phase.step)
                for phase in kernel.phases
            ]
            busiest = max(kernel.phases, key=lambda phase: phase.cycles)
            busy = ", ".join(f"{unit} {share:.2f}" for unit, share in busiest.usage.items())
            lines.append(f"{row.workload} {name}: {kernel.overhead} | {' | '.join(sizes)}; {busy}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--chips", nargs="+", default=["v5p", "v6e", "v5e"], choices=CHIPS)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--quick", action="store_true", help="only the best splash")
    parser.add_argument("--json", help="write everything that was found there")
    options = parser.parse_args()
    found, verdicts = {}, []
    for chip in options.chips:
        results = {name: list(rows(chip, name, quick=options.quick)) for name in options.workloads}
        every = [row for some in results.values() for row in some]
        print(f"\n{chip}, modelled, cycles in millions\n\n{table(every)}\n\n{units(every)}")
        found[chip] = [dataclasses.asdict(row) for row in every]
        verdicts += bars(chip, results)
    print("\n" + "\n".join(map(str, verdicts)))
    if options.json:
        everything = {"rows": found, "bars": [bar._asdict() for bar in verdicts]}
        pathlib.Path(options.json).write_text(json.dumps(everything, default=float, indent=1))


if __name__ == "__main__":
    main()
