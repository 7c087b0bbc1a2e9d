"""What devices have to tell each other in a step, by arithmetic."""

from collections.abc import Iterator
from typing import NamedTuple

from l32jax.plan.blocks import Block, Work
from l32jax.plan.network import Network, sent_bytes
from l32jax.plan.tally import Exchange, Sum
from l32jax.run_config import TrainConfig

HALF, WHOLE = 2, 4  # bytes of a number


class Sending(NamedTuple):
    """hides: nothing of the layer at hand waits for it, so a scheduler may run it beside."""

    exchange: Exchange
    sum: Sum
    hides: bool


def exchanges_of(
    config: TrainConfig, number: int, network: Network, work: Work
) -> Iterator[Sending]:
    """Of all devices alike. Parameters are gathered anew for every microbatch and each pass."""
    times = config.stages[number].accumulate
    for block in work.blocks:
        count = times * block.layers
        part = block.weights * HALF / block.share
        yield from _of_weights(network, part, count, block.learns, block.backward)
        yield from _of_heads(network, block, count, config.saved)
        yield from _of_keys(network, block, work.rows, count)
    tables = work.tables
    for weights, flows, learns in (
        (tables.weights * tables.count / work.blocks[0].share, True, tables.learns),
        (float(tables.projector), tables.features_flow, tables.projector_learns),
    ):
        yield from _of_weights(network, weights * HALF, times, learns, flows)


def _of_weights(
    network: Network, size: float, count: int, learns: bool, backward: bool
) -> Iterator[Sending]:
    yield from _sent(network, "all-gather", size, "fsdp", count * (1 + backward), hides=True)
    if not learns:
        return
    # TPUs before the seventh reduce all of a gradient, and keep a part.
    whole = network.chip.platform == "tpu" and network.chip.name != "tpu7x"
    kind = "all-reduce" if whole else "reduce-scatter"
    yield from _sent(network, kind, size, "fsdp", count, hides=True)
    left = size / network.axes["fsdp"]
    for axis in ("context", "data"):
        yield from _sent(network, "all-reduce", left, axis, count, hides=True)


def _of_heads(network: Network, block: Block, count: int, saved: str) -> Iterator[Sending]:
    """Around attention and the MLP tokens come together, and what products leave is summed.

    In float32, and in the backward pass for each product that took the tokens: so XLA has it.
    """
    size = block.tokens * block.width * HALF
    again = saved in ("attention", "nothing") and block.backward
    gathers = 2 * (1 + again + 2 * block.backward)
    yield from _sent(network, "all-gather", size, "tensor", count * gathers)
    sums = 2 + 6 * block.backward
    yield from _sent(network, "reduce-scatter", 2 * size, "tensor", count * sums)


def _of_keys(network: Network, block: Block, rows: float, count: int) -> Iterator[Sending]:
    """Devices that share a row need all of its keys; images are whole on one of them."""
    if block.part == "vision_tower":
        return
    size = 2 * block.projected * network.axes["context"] * block.keyed / block.share * HALF
    yield from _sent(network, "all-gather", size, "context", count * (1 + block.backward))
    if block.backward:
        yield from _sent(network, "reduce-scatter", size, "context", count)


def _sent(
    network: Network, kind: str, size: float, axis: str, count: int, *, hides: bool = False
) -> Iterator[Sending]:
    """An array of so many bytes, between the devices along an axis; slices each by a part of it."""
    if network.axes[axis] == 1:
        return
    inside = network.local[axis]
    outside = network.axes[axis] // inside
    if inside > 1 and count:
        sent = sent_bytes(kind, size, inside)
        seconds = network.seconds(kind, sent, (axis,))
        yield Sending(Exchange(kind, (axis,)), Sum(count, count * sent, count * seconds), hides)
    if outside > 1 and count:
        sent = sent_bytes(kind, size / inside, outside)
        seconds = network.seconds_between_slices(sent)
        name = Exchange(f"{kind} of slices", (axis,))
        yield Sending(name, Sum(count, count * sent, count * seconds), hides)
