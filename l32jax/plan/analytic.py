"""The time and memory of a step by arithmetic alone, in a millisecond and without a compiler.

It ranks what is worth compiling, and stands in for compilers that say no time. Products and kernels
go at a share of the chip's peak, everything between them at passes over memory, collectives as
`network` has it. What TPUs take was fitted to three compiled programs, which the tests list, and
agrees with those within 10 % of the time and 10 % of the memory; there is no more behind it. What
GPUs take is assumed.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from l32jax.objective_config import NextToken, models_beside
from l32jax.plan.blocks import Block, Work, work_of
from l32jax.plan.chips import Chip
from l32jax.plan.exchanges import exchanges_of
from l32jax.plan.footprint import learned_by, memory_of, moment_bytes, saved_bytes, scored
from l32jax.plan.kernels import EDGE, PRODUCTS, SEEN, share_of_peak
from l32jax.plan.network import Network
from l32jax.plan.program import Memory
from l32jax.plan.steptime import HOST_BANDWIDTH
from l32jax.plan.tally import StepTime, Sum
from l32jax.run_config import TrainConfig

LANES = 128  # numbers that a TPU's registers hold side by side: heads of 80 take as many
HALF = 2  # bytes of a bfloat16
UPDATE = 36  # bytes of a parameter that AdamW and the clipping of its gradient read and write
SAVING = 4  # passes over what is saved: put on the stack and taken off it
SCORES = 10  # passes over float32 scores, forward and backward


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a platform's programs take. Passes are over bfloat16 numbers, at HBM's bandwidth.

    products: the share of the peak that matrix products reach by themselves.
    gated, gelu: passes over an MLP's numbers each time they are computed or differentiated. TPUs
      compute them inside the products, once for each tile: their vector units are what takes time.
    heads: passes over queries, with rotations, transposes and residuals, in a forward and backward
      pass.
    hides: collectives of parameters run beside the products, as far as those last.
    """

    products: float
    gated: float
    gelu: float
    heads: float
    hides: bool


RATES = {
    "tpu": Rates(0.95, 24.0, 8.0, 160.0, False),
    # Assumed: what cuBLAS is known to reach within the board's watts; each operation between
    # products a few kernels of its own; XLA's latency-hiding scheduler.
    "gpu": Rates(0.65, 4.0, 4.0, 40.0, True),
}
GPU_KERNELS = (0.40, 0.30)  # share of the peak, forward and backward, of full lanes; assumed


class Estimate(NamedTuple):
    time: StepTime
    memory: Memory


def estimate(
    config: TrainConfig,
    number: int,
    chip: Chip,
    mesh: Mapping[str, int],
    slices: int = 1,
    *,
    shape: tuple[int, ...] = (),
) -> Estimate:
    """Of a stage's step.

    Args:
      mesh: sizes of all axes, outermost first.
      shape: topology of a slice; the most even one if it is not given.
    """
    work, rates = work_of(config, number, mesh), RATES[chip.platform]
    everything = [_OfStage(config, number), *_beside(config, number)]
    time = StepTime()
    for of_one in (work_of(*one, mesh) for one in everything):
        for block in of_one.blocks:
            time.add(_block_time(block, chip, rates, config.saved))
        time.add(_tables_time(of_one, chip, rates, config.saved))
    time = _scaled(time, config.stages[number].accumulate)
    time.other += _update_time(config, number, chip, mesh)
    network = Network(chip, mesh, shape, slices)
    hidden = 0.0
    for one in everything:
        for exchange, each, hides in exchanges_of(*one, network, work_of(*one, mesh)):
            time.exchanges.setdefault(exchange, Sum()).add(each)
            if rates.hides and hides:
                hidden += each.seconds
            else:
                time.exposed += each.seconds
    time.exposed += max(0.0, hidden - time.matmul)
    return Estimate(time, memory_of(config, number, chip, mesh, work))


class _OfStage(NamedTuple):
    config: TrainConfig
    number: int


def _beside(config: TrainConfig, number: int) -> Iterator[_OfStage]:
    """Of each model that the objective has beside, a stage that goes forward alone."""
    stage = config.stages[number]
    forward = dataclasses.replace(stage, trains=(), objective=NextToken())
    for models in models_beside(stage.objective, config.model_of(number)).values():
        for model in models:
            yield _OfStage(dataclasses.replace(config, model=model, stages=(forward,)), 0)


def _update_time(config: TrainConfig, number: int, chip: Chip, mesh: Mapping[str, int]) -> float:
    learned = learned_by(config, number, mesh)
    waits = 2 * moment_bytes(config.stages[number]) if config.offload == "optimizer" else 0
    return learned * (UPDATE / chip.hbm + waits / HOST_BANDWIDTH)


def _scaled(time: StepTime, times: int) -> StepTime:
    total = StepTime()
    total.add(time, times)
    return total


def runs(block: Block, saved: str) -> float:
    """Times that products of a block's size are computed: forward, again, for two gradients."""
    return 1 + _again(block, saved) + block.learns + block.flows


def _again(block: Block, saved: str) -> float:
    """The last product of what is computed again at once is of no use to a gradient."""
    if saved in ("everything", "dots") or not block.backward:
        return 0.0
    return 1 - block.width * block.mlp / block.weights / block.together


def _block_time(block: Block, chip: Chip, rates: Rates, saved: str) -> StepTime:
    lanes = _lanes(block.head_dim, chip)
    times = runs(block, saved)
    asked = block.width * (2 * block.queried * lanes + block.matrices * block.mlp)
    flops = 2 * (block.tokens * asked + block.projected * 2 * block.width * block.keyed * lanes)
    passes = (rates.gated if block.matrices == 3 else rates.gelu) * times
    between = block.tokens * block.mlp * HALF * passes
    heads = (block.tokens * block.queried + block.projected * block.keyed / 2) * lanes * HALF
    share = (1 if block.backward else 1 / 3) * rates.heads
    kept = saved_bytes(block, saved, chip) * SAVING if block.backward else 0.0
    layers = block.layers / block.share
    products = layers * flops * times / (rates.products * chip.peak)
    # TPUs compute what is between products inside of them; GPUs beside them.
    inside, beside = (between, 0.0) if chip.platform == "tpu" else (0.0, between)
    return StepTime(
        matmul=products + layers * inside / chip.hbm,
        other=(layers * (beside + heads * share) + kept) / chip.hbm,
        kernels=_kernel_time(block, chip, saved),
    )


def _kernel_time(block: Block, chip: Chip, saved: str) -> float:
    """Ours; XLA's sum over a row's keys is no faster."""
    ahead, back = _kernel_shares(block, chip)
    seen = (block.seen + EDGE) * SEEN / (SEEN + EDGE)
    flops = 2 * block.tokens * seen * block.queried * block.layers / block.share
    times = 2 if saved == "nothing" and block.backward else 1
    seconds = flops * PRODUCTS["attention_forward"] * times / (ahead * chip.peak)
    if block.backward:
        seconds += flops * PRODUCTS["attention_backward"] / (back * chip.peak)
    return seconds


def _kernel_shares(block: Block, chip: Chip) -> tuple[float, float]:
    if chip.platform == "tpu":
        return share_of_peak(chip.name, block.head_dim, block.heads // block.kv_heads)
    full = 1 << (block.head_dim - 1).bit_length()  # Triton's blocks are powers of two
    return tuple(share * block.head_dim / full for share in GPU_KERNELS)  # type: ignore[return-value]


def _lanes(head_dim: int, chip: Chip) -> float:
    """How much wider heads are than what is in them. Two of 64 fit."""
    if chip.platform != "tpu" or head_dim <= LANES // 2:
        return 1.0
    return -(-head_dim // LANES) * LANES / head_dim


def _tables_time(work: Work, chip: Chip, rates: Rates, saved: str) -> StepTime:
    """Scores of words, which are computed again for their gradient if it is by chunks; and the
    projector. Embeddings are looked up."""
    tables, share = work.tables, work.blocks[0].share
    flows = any(block.backward for block in work.blocks)
    again = flows and scored(work).chunks > 1
    flops = 2 * tables.weights * tables.tokens / share * (1 + again + tables.learns + flows)
    projecting = 1 + tables.projector_learns + tables.features_flow
    flops += 2 * tables.projector * tables.projected * projecting
    scores = tables.tokens * tables.words / share * 2 * HALF * SCORES
    return StepTime(matmul=flops / (rates.products * chip.peak), other=scores / chip.hbm)
