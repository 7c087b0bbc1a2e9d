"""Machines with GPUs, for which nothing is compiled: their plans are arithmetic.

XLA's compiler for CUDA says neither a time nor, without a card, whether a program fits.
"""

from l32jax.plan.analytic import estimate
from l32jax.plan.planning import Plan, mesh_of, stage_plan
from l32jax.plan.topology import Topology
from l32jax.run_config import TrainConfig
from l32jax.train.accumulate import require_even_rows


def plan_by_arithmetic(config: TrainConfig, number: int, topology: Topology) -> Plan:
    """What a stage should need and how fast it should go, on GPUs or on TPUs.

    Raises:
      InputError: the mesh, or the batch, does not go with the devices.
    """
    chip, mesh = topology.chip, mesh_of(config, topology).sizes(len(topology.devices))
    require_even_rows(config.stages[number], mesh)
    shape = topology.shape if chip.torus else ()
    found = estimate(config, number, chip, mesh, topology.slices, shape=shape)
    time = found.time if found.memory.fits else None
    return stage_plan(config, number, topology, mesh, found.memory, time, arithmetic=True)
