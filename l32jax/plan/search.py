"""Ways to run a stage on a machine, the fastest first: which of them are worth compiling?"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from l32jax.config import LlamaConfig, MeshConfig
from l32jax.data.sources.mixture import row_shape
from l32jax.plan.analytic import Estimate, estimate
from l32jax.plan.blocks import work_of
from l32jax.plan.chips import Chip
from l32jax.plan.footprint import memory_of
from l32jax.plan.planning import Plan, mesh_of, mesh_text
from l32jax.plan.topology import Topology
from l32jax.run_config import TrainConfig

POLICIES = ("everything", "dots", "attention", "nothing")
MOST_PARTS = 64  # of a batch
BEST = 3  # are compiled, and
MOST_TRIED = 6  # of those that come out too large
MOST_LISTED = 8  # of those that are not compiled


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A run with another mesh, policy and number of microbatches; its batch is the same."""

    config: TrainConfig
    estimate: Estimate

    @property
    def mesh(self) -> MeshConfig:
        assert self.config.mesh is not None, "searches try meshes one by one"
        return self.config.mesh

    @property
    def seconds(self) -> float:
        return self.estimate.time.seconds


def ranked(config: TrainConfig, number: int, topology: Topology) -> list[Candidate]:
    """Those that should fit by arithmetic, the fastest first; of those as fast, the smallest.

    Of a mesh and a policy only the best number of microbatches is listed.
    """
    best: dict[tuple[MeshConfig, str], Candidate] = {}
    for other in variants(config, number, topology.chip, len(topology.devices)):
        one = _candidate(other, number, topology)
        if one is None:
            continue
        key = one.mesh, other.saved
        if key not in best or _order(one) < _order(best[key]):
            best[key] = one
    return sorted(best.values(), key=_order)


def _candidate(config: TrainConfig, number: int, topology: Topology) -> Candidate | None:
    """None if it is too large, by arithmetic."""
    chip, mesh = topology.chip, mesh_of(config, topology).sizes(len(topology.devices))
    if not memory_of(config, number, chip, mesh, work_of(config, number, mesh)).fits:
        return None
    shape = topology.shape if chip.torus else ()
    return Candidate(config, estimate(config, number, chip, mesh, topology.slices, shape=shape))


def compiled(
    choices: list[Candidate],
    number: int,
    topology: Topology,
    saying: Callable[[str], AbstractContextManager[None]],
    plan: Callable[[TrainConfig, int, Topology], Plan],
) -> list[Plan]:
    """Plans of the first that compile and fit, and of those before them that are too large.

    Args:
      saying: shows a text while something goes on.
      plan: how one is compiled.
    """
    plans: list[Plan] = []
    begin = time.monotonic()
    for one in choices[:MOST_TRIED]:
        fitting = sum(each.memory.fits for each in plans)
        if fitting == BEST:
            break
        each = (time.monotonic() - begin) / len(plans) if plans else 0.0
        left = f"about {each * (BEST - fitting) / 60:.0f} minutes left" if each else "minutes each"
        with saying(f"compiling {fitting + 1} of {BEST} for {topology}: {_told(one)}; {left}"):
            plans.append(plan(one.config, number, topology))
    return plans


def _told(one: Candidate) -> str:
    return f"{mesh_text(dataclasses.asdict(one.mesh))} saved={one.config.saved}"


def variants(config: TrainConfig, number: int, chip: Chip, devices: int) -> Iterator[TrainConfig]:
    """All that the model, the batch and the devices allow, whether they fit or not."""
    stage, model = config.stages[number], config.model_of(number)
    for mesh in meshes(model, stage.data.length, devices):
        if chip.platform == "gpu" and mesh.tensor > chip.per_host:
            continue  # each layer would wait several times for the network
        if _spare_images(config, number, mesh):
            continue
        shares = mesh.data * mesh.fsdp
        for parts in _powers(MOST_PARTS):
            if stage.data.batch_size % (shares * parts):
                continue
            stages = list(config.stages)
            stages[number] = dataclasses.replace(stage, accumulate=parts)
            for saved in POLICIES:
                yield dataclasses.replace(config, mesh=mesh, saved=saved, stages=tuple(stages))


def meshes(model: LlamaConfig, length: int, devices: int) -> Iterator[MeshConfig]:
    """Those whose axes divide what they share: heads, widths, words and places of a row."""
    split = _split(model)
    for data, fsdp, context, tensor in _factors(devices, 4):
        whole = split["fsdp"] % fsdp == 0 and split["tensor"] % tensor == 0
        # Each device has a place from the front of a row and its twin from the back.
        if whole and (context == 1 or length % (2 * context) == 0):
            yield MeshConfig(data=data, fsdp=fsdp, context=context, tensor=tensor)


def _split(model: LlamaConfig) -> dict[str, int]:
    """What axes of the mesh must divide."""
    decoder, vision = model.decoder, model.vision
    shared = [decoder.num_heads, decoder.num_kv_heads, decoder.mlp_dim, decoder.vocab_size]
    widths = [decoder.embed_dim]
    if vision is not None:
        shared += [vision.num_heads, vision.mlp_dim]
        widths.append(vision.embed_dim)
    return {"fsdp": math.gcd(*widths), "tensor": math.gcd(*shared)}


def _spare_images(config: TrainConfig, number: int, mesh: MeshConfig) -> bool:
    """Whether some device along the context axis would have an image more than the others."""
    vision = row_shape(config.stages[number].data, config.model_of(number)).vision
    return vision is not None and vision.max_images % mesh.context != 0


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write it as a product, in order."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in _factors(number // first, count - 1))


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length())]


def _order(one: Candidate) -> tuple:
    mesh = dataclasses.astuple(one.mesh)
    return (one.seconds, one.estimate.memory.peak, mesh, one.config.saved)
