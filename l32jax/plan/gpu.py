"""Machines with GPUs, for which nothing is compiled: their plans are arithmetic.

XLA's compiler for CUDA says neither a time nor, without a card, whether a program fits.
"""

from jax.sharding import AbstractMesh

from l32jax.plan.analytic import estimate
from l32jax.plan.planning import Plan
from l32jax.plan.topology import Topology
from l32jax.plan.workload import flops_by_part, full_rows
from l32jax.run_config import TrainConfig
from l32jax.train.accumulate import require_even_rows


def plan_by_arithmetic(config: TrainConfig, number: int, topology: Topology) -> Plan:
    """What a stage should need and how fast it should go, on GPUs or on TPUs.

    Raises:
      InputError: the mesh, or the batch, does not go with the devices.
    """
    stage, model, chip = config.stages[number], config.model_of(number), topology.chip
    devices = len(topology.devices)
    mesh = config.mesh.sizes(devices)
    require_even_rows(stage, AbstractMesh(tuple(mesh.values()), tuple(mesh)))
    shape = topology.shape if chip.torus else ()
    found = estimate(config, number, chip, mesh, topology.slices, shape=shape)
    parts = flops_by_part(stage, model, full_rows(stage.data, model))
    return Plan(
        stage=stage.name,
        topology=str(topology),
        chip=chip.name,
        devices=devices,
        mesh=mesh,
        saved=config.saved,
        accumulate=stage.accumulate,
        counts=full_rows(stage.data, model),
        trains=stage.trains,
        flops={name: (one.forward.useful, one.backward.useful) for name, one in parts.items()},
        memory=found.memory,
        hbm_bytes=chip.hbm_bytes,
        peak=chip.peak,
        watts=chip.watts,
        compile_seconds=0.0,
        time=found.time if found.memory.fits else None,
        arithmetic=True,
    )
