"""Modelled costs of attention on TPUs: the workloads, and what ours cost (JAX's: `peer_costs`).

`kernel_cycles` says what each part of a kernel costs. How often it runs follows exactly: from our
schedule, from the grid and the mask of the others. So do the bytes that are copied.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import kernel_cycles
import numpy as np
from kernel_cycles import CHIPS, Kernel, Program, compile_for, on_chip

from l32jax.data.rows import vision_intervals
from l32jax.kernels.tpu import schedule as words_of
from l32jax.kernels.tpu.backward import backward
from l32jax.kernels.tpu.forward import forward
from l32jax.kernels.tpu.layout import TURN, make_plan
from l32jax.kernels.tpu.schedule import Blocks, Schedule, key_block, row_block, schedule

BFLOAT16, FLOAT32 = 2, 4  # bytes
LANES = 128


class Workload(NamedTuple):
    """One row of a batch: who sees which keys. Arrays of positions have shape [1 t]."""

    name: str
    kv_heads: int
    shared: int
    head_dim: int
    num_keys: int
    start: np.ndarray
    stop: np.ndarray

    @property
    def num_queries(self) -> int:
        return self.start.shape[1]

    @property
    def num_heads(self) -> int:
        return self.kv_heads * self.shared

    @property
    def dims(self) -> tuple[int, ...]:
        return self.kv_heads, self.shared, self.num_queries, self.num_keys, self.head_dim

    @property
    def title(self) -> str:
        return f"{self.name}, {self.num_heads}/{self.kv_heads} x {self.head_dim}"

    def padded(self, block: int) -> "Workload":
        """As many queries as whole blocks hold, and as many keys: for kernels that need that."""
        length = -(-self.num_queries // block) * block
        widths = ((0, 0), (0, length - self.num_queries))
        start, stop = (np.pad(bound, widths) for bound in (self.start, self.stop))
        return self._replace(num_keys=length, start=start, stop=stop)

    @property
    def is_causal(self) -> bool:
        return self.stop[0, 0] == 1

    @property
    def width(self) -> int:
        """Of a head in HBM, where the last dimension fills whole lanes."""
        return -(-self.head_dim // LANES) * LANES


def causal(name: str, length: int, kv_heads: int, shared: int, head_dim: int) -> Workload:
    position = np.arange(length, dtype=np.int32)[None]
    return Workload(name, kv_heads, shared, head_dim, length, np.zeros_like(position), position + 1)


def packed() -> Workload:
    """Eight documents of unequal lengths, not aligned to any block."""
    whole = causal("packed 8 documents", 8192, 8, 4, 128)
    cuts = np.random.default_rng(0).choice(np.arange(1, 8192), 7, replace=False)
    first = np.zeros(8192, np.int32)
    first[cuts] = cuts
    return whole._replace(start=np.maximum.accumulate(first)[None])


def cross() -> Workload:
    """Text that shows five images of four tiles one after the other."""
    places = np.random.default_rng(0).choice(8192, 5, replace=False)
    is_image = np.isin(np.arange(8192), places).astype(int)
    start, stop = vision_intervals(is_image.tolist(), 1, [4] * 5)
    tokens = 1601 * np.stack([start, stop])[:, None].astype(np.int32)
    return Workload("cross 5 images", 8, 4, 128, 5 * 4 * 1601, *tokens)


def tower() -> Workload:
    """The vision encoder: four tiles of 1,601 tokens, then padding, which sees the tokens alone."""
    stop = np.where(np.arange(6432) < 6404, 6432, 6404).astype(np.int32)[None]
    return Workload("vision tower", 16, 1, 80, 6432, np.zeros_like(stop), stop)


class Cost(NamedTuple):
    """Of one kernel on one device: cycles of its busiest core, bytes between HBM and the cores."""

    cycles: float
    num_bytes: float

    def milliseconds(self, chip: str) -> float:
        return max(CHIPS[chip].milliseconds(self.cycles), CHIPS[chip].copying(self.num_bytes))


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table; `error` says what the compiler refused."""

    chip: str
    workload: str
    kernel: str
    forward: Cost = Cost(math.nan, math.nan)
    backward: Sequence[Cost] = ()
    glue: int = 0
    peak: int = 0
    kernels: dict[str, Kernel] = dataclasses.field(default_factory=dict)
    error: str = ""

    @property
    def cycles(self) -> float:
        return self.forward.cycles + sum(cost.cycles for cost in self.backward)

    @property
    def num_bytes(self) -> float:
        return self.forward.num_bytes + sum(cost.num_bytes for cost in self.backward)

    @property
    def milliseconds(self) -> float:
        return sum(cost.milliseconds(self.chip) for cost in (self.forward, *self.backward))

    @property
    def with_glue(self) -> float:
        return self.milliseconds + CHIPS[self.chip].milliseconds(self.glue)


def shape(*dims: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def our_blocks(chip: str, work: Workload) -> tuple[Blocks, int]:
    """Block sizes and parts that the kernels choose on this chip."""
    kv_heads, shared, num_queries, num_keys, head_dim = work.dims
    q = shape(1, kv_heads, shared, num_queries, head_dim)
    k = shape(1, kv_heads, num_keys, head_dim)
    bound = shape(1, num_queries, dtype=jnp.int32)
    with on_chip(chip):
        plan = jax.eval_shape(make_plan, bound, bound, q, k)
    return plan.blocks, plan.parts


def our_program(chip: str, work: Workload, blocks: Blocks, parts: int) -> Program:
    return _our_program(chip, work.dims, blocks, parts)


@functools.cache
def _our_program(chip: str, dims: tuple[int, ...], blocks: Blocks, parts: int) -> Program:
    """The same for all intervals."""
    kv_heads, shared, num_queries, num_keys, head_dim = dims
    q = shape(1, kv_heads, shared, num_queries, head_dim)
    k = shape(1, kv_heads, num_keys, head_dim)
    bound = shape(1, num_queries, dtype=jnp.int32)
    plan_of = functools.partial(schedule, num_keys=num_keys, blocks=blocks, parts=parts)

    def step(q, k, v, start, stop, plan, dout):
        scale = head_dim**-0.5
        out, lse = forward(q, k, v, start, stop, scale=scale, plan=plan)
        delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
        grads = backward(q, k, v, start, stop, lse, delta, dout, scale=scale, plan=plan)
        return out, *(grad.astype(q.dtype) for grad in grads)

    return compile_for(chip, step, q, k, k, bound, bound, jax.eval_shape(plan_of, bound, bound), q)


class Lists(NamedTuple):
    """Pairs of blocks as one of our kernels visits them, [lists n]; steps of each that it takes.

    `free` steps are those of partly seen pairs that all rows see whole, `masked` their others.
    """

    words: np.ndarray
    free: np.ndarray
    masked: np.ndarray

    @classmethod
    def of(cls, plan: Schedule, words: jax.Array, length: jax.Array, *, dense: bool) -> "Lists":
        """dense: as a kernel would that masks every pair of its grid."""
        places = np.asarray(words)[:, : int(length.max())]
        if dense:
            whole = (places & words_of.WHOLE) > 0
            places = np.where(whole, places ^ (words_of.WHOLE | words_of.PARTLY), places)
        row, block = np.arange(len(places))[:, None] // plan.parts, row_block(places)
        offset = key_block(places) * plan.blocks.keys

        def steps(edge, more=0):
            keys = np.clip(np.asarray(edge)[row, block] - offset, 0, plan.blocks.keys)
            return (keys + more) // plan.blocks.step

        up = plan.blocks.step - 1
        some = steps(plan.seen.last, up) - steps(plan.seen.first)
        free = steps(plan.seen.every_last) - steps(plan.seen.every_first, up)
        free = np.zeros_like(some) if dense else np.maximum(free, 0) // TURN * TURN
        partly = (places & words_of.PARTLY) > 0
        return cls(places, np.where(partly, free, 0), np.where(partly, some - free, 0))

    def count(self, *flags: int) -> np.ndarray:
        """Pairs of each list that have all of the flags."""
        return ((self.words & sum(flags)) == sum(flags)).sum(axis=1)

    def loads(self, block: Callable) -> int:
        """How often a block is brought in: whenever it is another than at the point before."""
        blocks = block(self.words)
        return int((np.diff(blocks, axis=1) != 0).sum() + len(blocks))


# When each body of `pl.when` in our kernels runs, in their order. The two of partly seen pairs are
# loops: over the free steps, over the masked ones.
PARTLY = (words_of.PARTLY,)
FORWARD = (words_of.OPENS,), (words_of.WHOLE,), PARTLY, PARTLY, (words_of.CLOSES,)
BACKWARD = (
    (words_of.OPENS,),
    (words_of.RUN_OPENS, words_of.FRESH),
    (words_of.WHOLE,),
    PARTLY,
    PARTLY,
    (words_of.RUN_CLOSES, words_of.DONE),
    (words_of.CLOSES,),
)


def our_cycles(kernel: Kernel, lists: Lists, num_heads: int, cores: int) -> float:
    conditions = {len(FORWARD): FORWARD, len(BACKWARD): BACKWARD}.get(len(kernel.phases), ())
    loops = [flags for flags, phase in zip(conditions, kernel.phases, strict=False) if phase.step]
    if loops != [PARTLY, PARTLY]:
        raise ValueError(f"expected bodies for {FORWARD} or {BACKWARD}, found {kernel.phases}")
    cycles = kernel.overhead * lists.words.shape[1] + sum(
        phase.cycles * lists.count(*flags)
        for flags, phase in zip(conditions, kernel.phases, strict=True)
    )
    turns = lists.free.sum(axis=1) // TURN, lists.masked.sum(axis=1)
    looping = [phase.step for phase in kernel.phases if phase.step]
    cycles += sum(step * turn for step, turn in zip(looping, turns, strict=True))
    return float(np.repeat(cycles, num_heads).reshape(cores, -1).sum(axis=1).max())


def our_bytes(lists: Lists, work: Workload, blocks: Blocks, *, gradients: bool) -> float:
    stacked, keys = blocks.rows * work.shared, blocks.keys * work.width
    bounds, sums = 2 * FLOAT32 * blocks.rows, FLOAT32 * stacked
    by_row = 2 * BFLOAT16 * stacked * work.width + bounds + (2 if gradients else 1) * sums
    by_key = 2 * (BFLOAT16 + (FLOAT32 if gradients else 0)) * keys
    total = lists.loads(row_block) * by_row + lists.loads(key_block) * by_key
    if gradients:
        total += _query_gradient_bytes(lists, stacked, work)
    return float(total * work.kv_heads)


def _query_gradient_bytes(lists: Lists, stacked: int, work: Workload) -> int:
    """Sums come in at every visit but the first and leave after all but the last."""
    runs = lists.count(words_of.RUN_OPENS).sum()
    first = lists.count(words_of.RUN_OPENS, words_of.FRESH).sum()
    last = lists.count(words_of.RUN_CLOSES, words_of.DONE).sum()
    moved = (2 * runs - first - last) * work.head_dim + last * work.width
    return FLOAT32 * stacked * int(moved)


def our_costs(
    chip: str, program: Program, work: Workload, blocks: Blocks, parts: int, *, dense: bool = False
) -> list[Cost]:
    """Forward and backward."""
    start, stop = jnp.asarray(work.start), jnp.asarray(work.stop)
    if dense:
        start, stop = jnp.zeros_like(start), jnp.full_like(stop, work.num_keys)
    plan = schedule(start, stop, num_keys=work.num_keys, blocks=blocks, parts=parts)
    cores = kernel_cycles.num_cores(chip)
    by_rows = Lists.of(plan, plan.by_rows, plan.num_by_rows, dense=dense)
    by_keys = Lists.of(plan, plan.by_keys, plan.num_by_keys, dense=dense)
    return [
        Cost(
            our_cycles(program.kernel(f"attention_{name}"), lists, work.kv_heads, cores),
            our_bytes(lists, work, blocks, gradients=name == "backward"),
        )
        for name, lists in (("forward", by_rows), ("backward", by_keys))
    ]


def ours(chip: str, work: Workload, *, dense: bool = False) -> Row:
    blocks, parts = our_blocks(chip, work)
    program = our_program(chip, work, blocks, parts)
    ahead, back = our_costs(chip, program, work, blocks, parts, dense=dense)
    name = "ours, every pair masked" if dense else "ours"
    return row(chip, work, name, program, ahead, [back])


def row(chip: str, work: Workload, name: str, program: Program, ahead, back, batch: int = 1) -> Row:
    """program: of `batch` rows; the costs are of one."""
    glue = program.glue // batch
    return Row(chip, work.title, name, ahead, back, glue, program.peak, program.kernels)
