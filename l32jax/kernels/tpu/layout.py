"""How arrays are cut into blocks along a schedule."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from l32jax.kernels.intervals import Hulls, clip
from l32jax.kernels.padding import pad
from l32jax.kernels.tpu.chips import block_sizes, fit_scalar_memory, num_parts
from l32jax.kernels.tpu.schedule import Blocks, Schedule, key_block, row_block, schedule

TURN = 2  # steps of a turn of the loop: one alone cannot overlap with anything
LOG2_E = 1.4426950408889634  # the chip has 2^x and not e^x: scores are in units of log 2
Interpret = bool | pltpu.InterpretParams


def make_plan(
    start: Int[Array, "b t"],
    stop: Int[Array, "b t"],
    q: Any,
    k: Any,
) -> Schedule:
    """The schedule for these intervals on the present chip: once a step, for every layer.

    Of q [b k g t h] and k [b k s h] only shapes and dtypes matter.
    """
    blocks = block_sizes(
        queries=q.shape[3], keys=k.shape[2], shared=q.shape[2], float32=q.dtype == jnp.float32
    )
    blocks = fit_scalar_memory(blocks, batch=q.shape[0], queries=q.shape[3], keys=k.shape[2])
    few = min(pl.cdiv(q.shape[3], blocks.rows), pl.cdiv(k.shape[2], blocks.keys))
    parts = num_parts(q.shape[0] * q.shape[1], most=few)
    return schedule(start, stop, num_keys=k.shape[2], blocks=blocks, parts=parts)


class Operands(NamedTuple):
    """Inputs whose lengths are multiples of their blocks: rows that are added see nothing."""

    q: Float[Array, "b k g t h"]
    k: Float[Array, "b k s h"]
    v: Float[Array, "b k s h"]
    bounds: Int[Array, "b 2 t"]  # one array: each one costs cycles at every grid point

    @classmethod
    def padded(cls, q, k, v, start, stop, blocks: Blocks) -> "Operands":
        start, stop = clip(start, stop, k.shape[2])
        return cls(
            pad(q, 3, blocks.rows),
            pad(k, 2, blocks.keys),
            pad(v, 2, blocks.keys),
            pad(jnp.stack([start, stop], axis=1), 2, blocks.rows),
        )


class Specs(NamedTuple):
    """The block of each kind of array that a grid point (list, key head, place) works on."""

    queries: pl.BlockSpec
    keys: pl.BlockSpec
    bounds: pl.BlockSpec
    sums: pl.BlockSpec  # log-sum-exp
    row_values: pl.BlockSpec  # two numbers per row

    @classmethod
    def of(cls, operands: Operands, plan: Schedule) -> "Specs":
        shared, head_dim = operands.q.shape[2], operands.q.shape[4]
        rows, keys, _ = plan.blocks

        def spec(shape, place):
            def index(which, head, at, words, *_):
                return place(which // plan.parts, head, words[which, at])

            return pl.BlockSpec(shape, index)

        return cls(
            spec((1, 1, shared, rows, head_dim), lambda b, k, word: (b, k, 0, row_block(word), 0)),
            spec((1, 1, keys, head_dim), lambda b, k, word: (b, k, key_block(word), 0)),
            spec((1, 2, rows), lambda b, k, word: (b, 0, row_block(word))),
            spec((1, 1, shared, rows), lambda b, k, word: (b, k, 0, row_block(word))),
            spec((1, 1, 2, shared, rows), lambda b, k, word: (b, k, 0, 0, row_block(word))),
        )


class Kernel(NamedTuple):
    """What a kernel must know when it is built."""

    shared: int
    blocks: Blocks
    parts: int
    scale: float
    precision: jax.lax.Precision | None

    @classmethod
    def of(cls, operands: Operands, plan: Schedule, scale: float) -> "Kernel":
        """float32 arrays get float32 products, which take the chip several bfloat16 ones."""
        exact = jax.lax.Precision.HIGHEST if operands.q.dtype == jnp.float32 else None
        return cls(operands.q.shape[2], plan.blocks, plan.parts, scale, exact)


class Pair(NamedTuple):
    """Where a kernel stands: the word of its pair of blocks, and the steps that matter there.

    Steps of keys [begin, end) hold some that some row sees; all rows see all of [whole, broken),
    which are whole turns.
    """

    word: Any
    first_key: Any  # of the block, in the row
    begin: Any
    whole: Any
    broken: Any
    end: Any

    @classmethod
    def here(cls, words, seen: Hulls, kernel: Kernel) -> "Pair":
        which, at = pl.program_id(0), pl.program_id(2)
        word = words[which, at]
        row, block = which // kernel.parts, row_block(word)
        _, keys, step = kernel.blocks
        offset = key_block(word) * keys

        def steps(edge, more=0):
            return (jnp.clip(edge[row, block] - offset, 0, keys) + more) // step

        begin, end = steps(seen.first), steps(seen.last, step - 1)
        whole = steps(seen.every_first, step - 1)
        broken = whole + jnp.maximum(steps(seen.every_last) - whole, 0) // TURN * TURN
        return cls(word, offset, begin, whole, broken, end)

    def has(self, flag: int):
        return (self.word & flag) != 0


def product(kernel: Kernel, a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """a @ b over one dimension of each, accumulated in float32."""
    return jax.lax.dot_general(
        a,
        b,
        ((contract[:1], contract[1:]), ((), ())),
        precision=kernel.precision,
        preferred_element_type=jnp.float32,
    )
