"""What the kernels know of each TPU generation: block sizes, vector memory, cores."""

import dataclasses

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from l32jax.kernels.tpu.schedule import Blocks

LANES = 128
MIB = 2**20
MOST_WORDS = 3 * 2**16  # three quarters of the scalar memory of any chip
MOST_KEYS = 4096


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    stacked: rows of a product, those of all query heads that share a key head together.
    keys, step: keys of a block, and of one product. Found by `benchmarks/tune_attention.py`.
    vmem: bytes that a kernel may ask for.
    """

    stacked: int
    keys: int
    step: int
    vmem: int


CHIPS = {
    "TPU v4": Chip(stacked=512, keys=512, step=256, vmem=15 * MIB),
    "TPU v5 lite": Chip(stacked=1024, keys=1024, step=256, vmem=64 * MIB),
    "TPU v5": Chip(stacked=1024, keys=1024, step=256, vmem=48 * MIB),
    "TPU v6 lite": Chip(stacked=1024, keys=1024, step=256, vmem=64 * MIB),
    "TPU7x": Chip(stacked=1024, keys=1024, step=256, vmem=48 * MIB),
}
UNKNOWN = CHIPS["TPU v4"]  # the smallest: it fits anywhere


def block_sizes(*, queries: int, keys: int, shared: int, float32: bool) -> Blocks:
    """For the present chip; lengths shorter than a block are one block of whole lanes."""
    chip = CHIPS.get(_device().device_kind, UNKNOWN)
    rows = _up_to_lanes(max(chip.stacked // shared, LANES) // (2 if float32 else 1))
    rows = min(rows, _up_to_lanes(queries))
    step = min(chip.step, _up_to_lanes(keys))
    block = min(chip.keys // (2 if float32 else 1), -(-keys // step) * step)
    return Blocks(rows, block, step)


def fit_scalar_memory(blocks: Blocks, *, batch: int, queries: int, keys: int) -> Blocks:
    """With larger blocks of keys, if lists of all pairs would not fit: long rows, many at a time.

    Twice the lists are reckoned with, for parts, and a power of two, which is what they take up.
    """
    lists = 1 << (2 * batch - 1).bit_length()
    while lists * pl.cdiv(queries, blocks.rows) * pl.cdiv(keys, blocks.keys) > MOST_WORDS:
        if blocks.keys >= MOST_KEYS:
            raise ValueError(
                f"{batch} rows of {queries} queries and {keys} keys on a device: its scalar memory "
                "cannot hold their pairs of blocks; use fewer rows, or more devices along context"
            )
        blocks = blocks._replace(keys=2 * blocks.keys)
    return blocks


def num_parts(lists: int, *, most: int) -> int:
    """Parts to cut each list of pairs into, so that every core of a device has work.

    lists: of batch rows and key heads. Two cores share an even number of them without cutting.
    """
    cores = getattr(_device(), "num_cores", None) or 1
    return cores if lists % cores and cores <= most else 1


def _device():
    """That of the mesh if there is one: programs are compiled for chips that are not here."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def _up_to_lanes(length: int) -> int:
    return -(-length // LANES) * LANES


def compiler_params() -> pltpu.CompilerParams:
    """Rows and heads may go to either core; the pairs of a list follow each other on one."""
    chip = CHIPS.get(_device().device_kind, UNKNOWN)
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=chip.vmem
    )


def cost(q: Array, k: Array, *, products: int) -> pl.CostEstimate:
    """Of `products` matrix products over all pairs: intervals are not known when XLA asks.

    Half of it if there are as many queries as keys: then rows are causal.
    """
    batch, kv_heads, shared, time, head_dim = q.shape
    pairs = batch * kv_heads * shared * time * k.shape[2]
    pairs = pairs // 2 if time == k.shape[2] else pairs
    arrays = products * q.nbytes + 2 * (products - 1) * k.nbytes
    return pl.CostEstimate(
        flops=2 * products * pairs * head_dim, transcendentals=pairs, bytes_accessed=arrays
    )
