"""How the gradient of the queries moves between HBM and the kernel that adds to it.

The backward pass goes along the keys, and comes back to a block of queries once for each block of
keys that it sees. Between the visits the block's sum waits in HBM, as [h, rows]: the layout that
the product with the keys gives. At the last one it is turned and written out for good.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from l32jax.kernels.tpu.layout import Pair
from l32jax.kernels.tpu.schedule import (
    DONE,
    FINAL,
    FRESH,
    RUN_CLOSES,
    RUN_OPENS,
    row_block,
)

# One buffer is being added to, one is filled for the run to come, one empties after the run before.
BUFFERS = 3
RESULT = BUFFERS  # where `pending` tells of the finished block


class Traffic:
    """The copies of one grid point.

    Runs take the buffers in turn. A run's block is fetched during the last pair of the run before,
    and nobody waits for a block on its way out, unless its buffer or the block itself is needed.
    """

    def __init__(self, pair: Pair, words, sums, dq, buffers, turned, slot, pending, reads, writes):
        self.pair, self.sums, self.dq, self.buffers, self.turned = pair, sums, dq, buffers, turned
        self.slot, self.pending, self.reads, self.writes = slot, pending, reads, writes
        self.list, self.head, at = (pl.program_id(axis) for axis in range(3))
        self.next = pair._replace(word=words[self.list, jnp.minimum(at + 1, words.shape[1] - 1)])
        self.begins = at == 0

    @staticmethod
    def sums(lists: int, kv_heads: int, num_blocks: int, stacked: int, head_dim: int):
        shape = (lists, kv_heads, num_blocks, head_dim, stacked)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    @staticmethod
    def scratch(shared: int, rows: int, head_dim: int) -> list:
        return [
            pltpu.VMEM((BUFFERS, head_dim, shared * rows), jnp.float32),
            pltpu.VMEM((shared, rows, head_dim), jnp.float32),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SMEM((BUFFERS + 1,), jnp.int32),  # block + 1 that is on its way out, or 0
            pltpu.SemaphoreType.DMA((BUFFERS,)),
            pltpu.SemaphoreType.DMA((BUFFERS + 1,)),
        ]

    def arrive(self):
        """The buffer that holds this run's block; the next run's is on its way."""

        @pl.when(self.begins)
        def _():
            self.slot[0] = 0
            for place in range(BUFFERS + 1):
                self.pending[place] = 0

        slot, pair = self.slot[0], self.pair

        @pl.when(pair.has(RUN_OPENS) & pair.has(FRESH))
        def _():
            self.buffers[slot] = jnp.zeros(self.buffers.shape[1:], jnp.float32)

        @pl.when(pair.has(RUN_OPENS) & ~pair.has(FRESH))
        def _():
            self._read(pair, slot).wait()

        @pl.when(pair.has(RUN_CLOSES) & ~pair.has(FINAL))
        def _():
            self._fetch_next(slot)

        return slot

    def _fetch_next(self, slot) -> None:
        free, emptying = jax.lax.rem(slot + 1, BUFFERS), jax.lax.rem(slot + 2, BUFFERS)
        self._settle(free)

        @pl.when(~self.next.has(FRESH))
        def _():
            @pl.when(self.pending[emptying] == row_block(self.next.word) + 1)
            def _():
                self._settle(emptying)

            self._read(self.next, free).start()

    def leave(self, slot, scale: float) -> None:
        """At the end of a run its block goes out, at the last visit turned and scaled."""
        pair = self.pair

        @pl.when(pair.has(RUN_CLOSES) & ~pair.has(DONE))
        def _():
            self._write(slot).start()
            self.pending[slot] = row_block(pair.word) + 1

        @pl.when(pair.has(RUN_CLOSES) & pair.has(DONE))
        def _():
            self._settle(RESULT)
            self.turned[...] = (self.buffers[slot] * scale).T.reshape(self.turned.shape)
            self._finish().start()
            self.pending[RESULT] = row_block(pair.word) + 1

        @pl.when(pair.has(RUN_CLOSES))
        def _():
            self.slot[0] = jax.lax.rem(slot + 1, BUFFERS)

        @pl.when(pair.has(FINAL))
        def _():
            for place in range(BUFFERS + 1):
                self._settle(place)

    def _settle(self, place) -> None:
        """What leaves from there has left."""

        @pl.when(self.pending[place] > 0)
        def _():
            copy = self._finish() if place is RESULT else self._write(place)
            copy.wait()
            self.pending[place] = 0

    def _sum(self, block):
        return self.sums.at[self.list, self.head, block]

    def _read(self, pair: Pair, slot):
        block = self._sum(row_block(pair.word))
        return pltpu.make_async_copy(block, self.buffers.at[slot], self.reads.at[slot])

    def _write(self, slot):
        block = self._sum(row_block(self.pair.word))
        return pltpu.make_async_copy(self.buffers.at[slot], block, self.writes.at[slot])

    def _finish(self):
        rows = self.turned.shape[1]
        span = pl.ds(row_block(self.pair.word) * rows, rows)
        block = self.dq.at[self.list, self.head, :, span]
        return pltpu.make_async_copy(self.turned, block, self.writes.at[RESULT])
