"""Modelled costs of JAX's own TPU kernels, splash and flash attention, on the same workloads.

Their grids run over all pairs of blocks; a causal mask says which of these compute.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from attention_costs import BFLOAT16, FLOAT32, LANES, Cost, Row, Workload, row, shape
from jax.experimental.pallas.ops.tpu import flash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from kernel_cycles import Kernel, Program, compile_for


class Splash(NamedTuple):
    """A configuration of splash attention, with masks that every row has: causal or none.

    batch: rows that are mapped over. Its backward kernels use two cores only if there are two.
    """

    block: int
    fused: bool
    segments: bool = True
    batch: int = 1

    def __str__(self) -> str:
        return (
            f"splash {self.block}{' fused' * self.fused}{'' if self.segments else ', no segments'}"
            f"{f', {self.batch} rows' if self.batch > 1 else ''}"
        )

    def sizes(self, unit: int = 1) -> splash_attention_kernel.BlockSizes:
        block, compute = self.block // unit, 512 // unit
        apart = None if self.fused else block
        return splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=compute,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=compute,
            block_q_dq=apart,
            block_kv_dq=apart,
            use_fused_bwd_kernel=self.fused,
        )

    def kernel(self, work: Workload) -> splash_attention_kernel.SplashAttentionKernel:
        """Made for a sequence 128 times shorter, whose blocks meet in the same way.

        Making the mask of a long one takes minutes: it looks at every element.
        """
        side = work.num_queries // LANES
        mask = splash_attention_mask.FullMask((side, side))
        if work.is_causal:
            mask = splash_attention_mask.CausalMask((side, side))
        small = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * work.num_heads),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=self.sizes(LANES),
        )
        position = jnp.arange(work.num_queries, dtype=jnp.int32) if work.is_causal else None
        kwargs = small.kwargs | {"block_sizes": self.sizes()}
        return splash_attention_kernel.SplashAttentionKernel(
            small.fwd_mask_info._replace(q_sequence=position),
            small.dq_mask_info and small.dq_mask_info._replace(q_sequence=position),
            small.dkv_mask_info and small.dkv_mask_info._replace(q_sequence=position),
            **kwargs,
        )

    def row(self, chip: str, work: Workload) -> Row:
        work = work.padded(self.block)
        kernel = self.kernel(work)
        ids = shape(self.batch, work.num_queries, dtype=jnp.int32)

        def attend(q, k, v, ids):
            segments = splash_attention_kernel.SegmentIds(ids, ids) if self.segments else None
            return kernel(q, k, v, segment_ids=segments)

        program = gradients(chip, work, jax.vmap(attend), ids, batch=self.batch)
        grid = Grid(chip, work, self.block, self.batch, segments=self.segments)
        forward_cost = grid.cost(program.kernel("mha_fwd"), grid.forward_bytes())
        costs = [grid.cost(program.kernel("mha_dkv"), grid.dkv_bytes(self.fused), by_key=True)]
        if not self.fused:
            costs.append(grid.cost(program.kernel("mha_dq"), grid.dq_bytes()))
        return row(chip, work, str(self), program, forward_cost, costs, self.batch)


def gradients(chip: str, work: Workload, attend: Callable, ids, *, batch: int = 1) -> Program:
    """Forward and backward of attention with heads before positions."""
    q = shape(batch, work.num_heads, work.num_queries, work.head_dim)
    k = shape(batch, work.kv_heads, work.num_keys, work.head_dim)

    def step(q, k, v, ids, dout):
        out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, ids), q, k, v)
        return out, *pullback(dout)

    return compile_for(chip, step, q, k, k, ids, q)


class Grid(NamedTuple):
    """All pairs of square blocks, by query head; a causal kernel skips those over the diagonal."""

    chip: str
    work: Workload
    block: int
    batch: int = 1
    segments: bool = True

    @property
    def side(self) -> int:
        return self.work.num_queries // self.block

    @property
    def active(self) -> int:
        pairs = self.side * (self.side + 1) // 2 if self.work.is_causal else self.side**2
        return pairs * self.work.num_heads

    def cost(self, kernel: Kernel, num_bytes: float, *, by_key: bool = False) -> Cost:
        """by_key: gradients of keys are begun and written once for all heads that share them."""
        opens, compute, closes = kernel.expect(3)
        points = self.side**2 * self.work.num_heads
        outputs = self.side * (self.work.kv_heads if by_key else self.work.num_heads)
        cycles = (
            kernel.overhead * points
            + compute.cycles * self.active
            + (opens.cycles + closes.cycles) * outputs
        )
        if not kernel.trips:
            raise ValueError("the grid's length is not a constant: cannot tell how cores share it")
        return Cost(cycles / round(points * self.batch / kernel.trips), num_bytes)

    @property
    def tile(self) -> int:
        """Bytes of a block of one head."""
        return BFLOAT16 * self.block * self.work.width

    @property
    def marks(self) -> int:
        """Bytes of the segment ids of a block of rows, which fill all lanes, and of keys."""
        return FLOAT32 * self.block * (LANES + 8) if self.segments else 0

    def forward_bytes(self) -> float:
        sums = FLOAT32 * self.block * LANES
        outputs = self.side * self.work.num_heads * (2 * self.tile + sums)
        return outputs + self.active * (2 * self.tile + self.marks)

    def dkv_bytes(self, fused: bool) -> float:
        sums = 2 * 8 * FLOAT32 * self.block
        outputs = self.side * self.work.kv_heads * 4 * self.tile
        partial = self.side**2 * self.work.num_heads * self.tile if fused else 0
        return outputs + partial + self.active * (2 * self.tile + sums + self.marks)

    def dq_bytes(self) -> float:
        outputs = self.side * self.work.num_heads * 3 * self.tile
        return outputs + self.active * (2 * self.tile + self.marks)


def flash(chip: str, work: Workload, *, block: int = 512) -> Row:
    """Knows nothing of shared keys: they are repeated for every query head."""
    work = work.padded(block)
    names = [field.name for field in dataclasses.fields(flash_attention.BlockSizes)]
    sizes = flash_attention.BlockSizes(**(dict.fromkeys(names, block) | {"block_b": 1}))

    def attend(q, k, v, ids):
        k, v = (jnp.repeat(x, work.shared, axis=1) for x in (k, v))
        segments = flash_attention.SegmentIds(ids, ids)
        return flash_attention.flash_attention(
            q, k, v, segment_ids=segments, causal=work.is_causal, block_sizes=sizes
        )

    program = gradients(chip, work, attend, shape(1, work.num_queries, dtype=jnp.int32))
    grid = Grid(chip, work._replace(kv_heads=work.num_heads, shared=1), block)
    costs = [
        grid.cost(program.kernel("bwd_dkv"), grid.dkv_bytes(fused=False)),
        grid.cost(program.kernel("bwd_dq"), grid.dq_bytes()),
    ]
    forward_cost = grid.cost(program.kernel("^(?!.*bwd)"), grid.forward_bytes())
    return row(chip, work, f"flash {block}", program, forward_cost, costs)
