"""Searches the block sizes of our attention kernels by their modelled cost on a chip.

    python benchmarks/tune_attention.py --chip v5p --head-dim 128 --shared 4

Compiles every candidate, forward and backward, for 8,192 tokens and 32 query heads, and sorts them
by the time of a causal row and a packed one together (see `attention.py`, which says what the model
leaves out). The best belongs in `CHIPS` of l32jax/kernels/tpu/chips.py.
"""

import argparse
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import jax
from attention_costs import Cost, Workload, our_blocks, our_costs, our_program, packed, tower
from kernel_cycles import CHIPS, Program

from l32jax.kernels.tpu.schedule import Blocks

SIZES = {"stacked": (512, 1024, 2048), "keys": (512, 1024, 2048), "step": (256, 512)}


class Candidate(NamedTuple):
    """Block sizes and what they cost: causal and packed, each forward and backward."""

    stacked: int
    keys: int
    step: int
    costs: tuple[Cost, ...]
    program: Program


def workloads(head_dim: int, shared: int) -> list[Workload]:
    """The rows to be fast on; the vision encoder's if no heads share keys."""
    if shared == 1:
        return [tower()._replace(head_dim=head_dim)]
    documents = packed()._replace(head_dim=head_dim, shared=shared, kv_heads=32 // shared)
    causal = documents._replace(name="causal", start=0 * documents.start)
    return [causal, documents]


def candidate(chip: str, works: list[Workload], stacked: int, keys: int, step: int) -> Candidate:
    work = works[0]
    _, parts = our_blocks(chip, work)
    blocks = Blocks(stacked // work.shared, keys, step)
    program = our_program(chip, work, blocks, parts)
    costs = [our_costs(chip, program, work, blocks, parts) for work in works]
    return Candidate(stacked, keys, step, tuple(itertools.chain(*costs)), program)


def line(chip: str, found: Candidate) -> str:
    vmem = max(kernel.vmem for kernel in found.program.kernels.values()) / 2**20
    cells = [
        *map(str, found[:3]),
        *(f"{cost.cycles / 1e6:.2f}" for cost in found.costs),
        f"{time(chip, found):.2f}",
        f"{found.program.glue / 1e6:.2f}",
        f"{vmem:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def time(chip: str, found: Candidate) -> float:
    return sum(cost.milliseconds(chip) for cost in found.costs)


def search(chip: str, works: list[Workload], sizes: Iterable[tuple[int, ...]]) -> list[Candidate]:
    """From the fastest; says on the way what it finds, and what the compiler refuses."""
    found = []
    for stacked, keys, step in sizes:
        try:
            found.append(candidate(chip, works, stacked, keys, step))
            print(line(chip, found[-1]), flush=True)
        except jax.errors.JaxRuntimeError as error:
            print(f"{stacked, keys, step}: {' '.join(str(error).split())[:160]}", flush=True)
    return sorted(found, key=lambda one: time(chip, one))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--chip", default="v5p", choices=CHIPS)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--shared", type=int, default=4, help="query heads per key head")
    for name, values in SIZES.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=values)
    options = parser.parse_args()
    works = workloads(options.head_dim, options.shared)
    sizes = itertools.product(options.stacked, options.keys, options.step)
    found = search(options.chip, works, sizes)
    columns = [f"{work.name} {way}" for work in works for way in ("forward", "backward")]
    names = ["stacked", "keys", "step", *columns, "ms", "glue", "VMEM MiB"]
    print(f"\n{options.chip}, modelled, cycles in millions\n\n| {' | '.join(names)} |")
    print("|---:" * len(names) + "|")
    print("\n".join(line(options.chip, one) for one in found))
    stacked, keys, step = found[0][:3]
    print(f"\nChip({stacked=}, {keys=}, {step=}, vmem=…)")


if __name__ == "__main__":
    main()
