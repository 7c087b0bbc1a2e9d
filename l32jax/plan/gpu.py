"""Machines with GPUs: XLA's compiler for CUDA says what a step needs, but not how long it takes.

The time is arithmetic; so is the memory where that compiler is not installed.
"""

import dataclasses
import os

from l32jax.plan.analytic import estimate
from l32jax.plan.cuda import GPUS, devices_of, missing, tell_xla
from l32jax.plan.planning import Plan, mesh_of, stage_plan
from l32jax.plan.program import compile_training
from l32jax.plan.topology import Topology
from l32jax.run_config import TrainConfig
from l32jax.sharding import make_mesh
from l32jax.train.accumulate import require_even_rows


def plan_on_gpus(config: TrainConfig, number: int, topology: Topology) -> Plan:
    """What a stage needs by the compiler, if it is here, and how fast it should go.

    Raises:
      InputError: the mesh, or the batch, does not go with the devices.
    """
    if missing():
        return plan_by_arithmetic(config, number, topology)
    plan = _estimated(config, number, topology)
    # Whether a product is Triton's or cuBLAS' is found out on a card; unmeasured, Triton's fail for
    # some of ours.
    tell_xla(os.environ, "--xla_gpu_enable_triton_gemm=false")
    machines, each = topology.shape
    devices = devices_of(GPUS[topology.chip.name], machines, each)
    compiled = compile_training(config, number, make_mesh(mesh_of(config, topology), devices))
    # Unlike that of TPUs, it compiles what is too large.
    memory = compiled.memory._replace(fits=compiled.memory.peak <= topology.chip.hbm_bytes)
    return dataclasses.replace(
        plan,
        memory=memory,
        time=plan.time if memory.fits else None,
        compile_seconds=compiled.seconds,
        arithmetic=("time",),
    )


def plan_by_arithmetic(config: TrainConfig, number: int, topology: Topology) -> Plan:
    """What a stage should need and how fast it should go, on GPUs or on TPUs.

    Raises:
      InputError: the mesh, or the batch, does not go with the devices.
    """
    plan = _estimated(config, number, topology)
    return plan if plan.memory.fits else dataclasses.replace(plan, time=None)


def _estimated(config: TrainConfig, number: int, topology: Topology) -> Plan:
    """With a time even if it is too large."""
    chip, mesh = topology.chip, mesh_of(config, topology).sizes(len(topology.devices))
    require_even_rows(config.stages[number], mesh)
    shape = topology.shape if chip.torus else ()
    found = estimate(config, number, chip, mesh, topology.slices, shape=shape)
    both = ("memory", "time")
    return stage_plan(config, number, topology, mesh, found.memory, found.time, arithmetic=both)
