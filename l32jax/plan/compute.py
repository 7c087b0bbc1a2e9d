"""How long an operation of a core takes: as the compiler estimates, else as its bytes need."""

import math
import re
from collections.abc import Iterable

from l32jax.plan.chips import Chip
from l32jax.plan.hlo import Array, Computation, Instruction

COLLECTIVES = {
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
}  # fmt: skip
NAMED = {"sort", "gather", "scatter", "dynamic-update-slice", "reduce-window"}
SMALLEST = 2000  # cycles; less than that XLA estimates for nothing


def seconds_of(
    one: Instruction, computation: Computation, inside: frozenset[str], chip: Chip
) -> tuple[float, str | None]:
    """Seconds, and what is to be said about them if they are not the compiler's.

    Args:
      inside: opcodes of what it computes, its own among them.
    """
    if cycles := _cycles(one):
        return cycles / chip.clock, None
    if inside & COLLECTIVES or not any(array.dims for array in one.arrays):
        return 0.0, None  # scalars are computed beside the vector units
    read, written = traffic(one, computation)
    moved = _touched(inside, read, written)
    name = min(inside & NAMED, default=one.opcode)
    seconds = max(moved / chip.hbm, SMALLEST / chip.clock)
    return seconds, f"{name} without an estimate: at least its bytes"


def traffic(one: Instruction, computation: Computation) -> tuple[float, float]:
    """Bytes that it reads from HBM, and writes to it."""
    given = (array for name in one.operands for array in computation.named[name].arrays)
    made = one.arrays[:1] if one.opcode == "copy-start" else one.arrays  # else both sides of it
    return _in_hbm(given), _in_hbm(made)


def _cycles(one: Instruction) -> int:
    """The estimate for the code if there is one, else the one that the window was chosen by."""
    text = one.attributes.partition("backend_config=")[2]
    for pattern in (r'"bundle_analysis_data":\{', ""):
        if found := re.search(pattern + r'"estimated_cycles":"(\d+)"', text):
            return int(found[1])
    return 0


def _in_hbm(arrays: Iterable[Array]) -> float:
    return math.fsum(array.num_bytes for array in arrays if not array.space)


def _touched(inside: frozenset[str], read: float, written: float) -> float:
    """Rows are taken from tables, and put into them, without a pass over all of the table."""
    if inside & {"scatter", "dynamic-update-slice"}:
        return 3 * max(0.0, read - written)
    if inside & {"gather", "dynamic-slice"}:
        return 2 * written
    return read + written
