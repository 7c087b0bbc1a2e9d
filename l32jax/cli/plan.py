"""The verb that plans a run for a machine that is not here."""

import dataclasses
import json as json_text
import os
from pathlib import Path
from typing import Literal

from l32jax.cli.runs import File, Overrides, read_config
from l32jax.cli.waiting import waiting
from l32jax.config import MeshConfig
from l32jax.errors import InputError
from l32jax.run_config import TrainConfig


def plan(
    config: File,
    overrides: Overrides = (),
    /,
    *,
    topology: str,
    slices: int = 1,
    mesh: str | None = None,
    stage: int = 1,
    steps: int | None = None,
    serve: Literal["prefill", "decode"] | None = None,
    rows: int = 8,
    length: int = 8192,
    images: int = 0,
    search: bool = False,
    json: Path | None = None,
) -> int:
    """Plans a run for a machine that is not here: does it fit, and how fast does it go?

    Compiles the real step of a stage for a TPU slice, with no TPU present, and reports memory,
    operations, the time that the program should take, what devices send each other, and what a
    stage costs in hours and energy. It takes some minutes.

    Examples:
      l32jax plan configs/vision_90b.py --topology v5p:8x8x8 --mesh data=2,fsdp=256
      l32jax plan configs/text_8b.py stages.0.data.batch_size=128 --topology v5p:4x4x4 saved=dots
      l32jax plan configs/vision_11b.py --stage 2 --topology v6e:16x16 --search
      l32jax plan configs/text_8b.py --topology v5e:16x16 --slices 4 --json plan.json
      l32jax plan configs/vision_11b.py --topology v5e:2x4 --mesh tensor=8 --serve decode --images 1

    Args:
      config: a Python file with a function `config()` that returns a TrainConfig.
      overrides: fields to change, such as saved=dots or stages.0.data.batch_size=256.
      topology: a chip and the chips along each dimension of a slice: v4, v5p and tpu7x have three,
        v5e and v6e two. Or machines by GPUs: h100:16x8, of h100, h200 and b200; their time is
        arithmetic, and their memory too without JAX's CUDA plugin and ptxas (extra `cuda`).
      slices: how many of them, with only the network between.
      mesh: devices along the mesh axes, like data=2,fsdp=256; instead of the config's.
      stage: number of the stage, from 1.
      steps: of the hours and the energy; by default all of the stage.
      serve: instead of training, the reading of whole prompts, or the writing of one token in each
        row, by the model of the last stage in bfloat16.
      rows: prompts that are served at once.
      length: tokens of a prompt, or in its cache.
      images: of a prompt.
      search: tries meshes, what is saved, and parts of a batch, and prints the best that fit.
      json: writes everything there as well.
    """
    chosen = read_config(config, overrides)
    if search and mesh is not None:
        raise InputError(f"--mesh {mesh} with --search, which tries all of them: leave one out")
    if mesh is not None:
        chosen = dataclasses.replace(chosen, mesh=MeshConfig.parse(mesh))
    if not 1 <= stage <= len(chosen.stages):
        raise InputError(f"stage {stage} of {config}: it has the stages 1 to {len(chosen.stages)}")
    # Programs for absent chips cannot be read back from JAX's cache, and no device is needed.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if serve is not None:
        found = _serve(chosen, serve, (rows, length, images), topology, slices)
    else:
        found = (_search if search else _plan)(chosen, stage - 1, topology, slices, steps)
    if json is not None:
        json.write_text(json_text.dumps(found, indent=2))
    return 0


def _plan(
    config: TrainConfig, number: int, topology: str, slices: int, steps: int | None
) -> object:
    from l32jax.plan.gpu import plan_on_gpus
    from l32jax.plan.planning import plan_training
    from l32jax.plan.report import print_plan
    from l32jax.plan.topology import open_topology

    machine = open_topology(topology, slices)
    if machine.chip.platform == "gpu":
        with waiting(f"planning for {machine}, a minute if the CUDA compiler is here"):
            found = plan_on_gpus(config, number, machine)
    else:
        with waiting(f"compiling for {machine}, some two to six minutes"):
            found = plan_training(config, number, machine)
    print_plan(found, num_steps=steps or config.stages[number].num_steps)
    return found.as_dict()


def _serve(
    config: TrainConfig,
    phase: Literal["prefill", "decode"],
    requests: tuple[int, int, int],
    topology: str,
    slices: int,
) -> object:
    from l32jax.plan.planning import mesh_of, plan_serving
    from l32jax.plan.report import print_plan
    from l32jax.plan.serving import Requests
    from l32jax.plan.topology import open_topology

    machine = open_topology(topology, slices)
    if machine.chip.platform == "gpu":
        raise InputError(f"serving on {machine}: of GPUs only training is planned; give a TPU's")
    model = config.model_of(len(config.stages) - 1)
    with waiting(f"compiling for {machine}, some one to three minutes"):
        found = plan_serving(model, Requests(*requests), phase, mesh_of(config, machine), machine)
    print_plan(found, num_steps=1000)
    return found.as_dict()


def _search(
    config: TrainConfig, number: int, topology: str, slices: int, steps: int | None
) -> object:
    """The best by arithmetic, compiled where their compiler is here, as that is what is right."""
    from l32jax.plan.cuda import missing
    from l32jax.plan.gpu import plan_by_arithmetic, plan_on_gpus
    from l32jax.plan.planning import plan_training
    from l32jax.plan.report import print_candidates
    from l32jax.plan.search import MOST_LISTED, compiled, ranked
    from l32jax.plan.topology import open_topology

    machine = open_topology(topology, slices)
    with waiting(f"reckoning ways to run stage {number + 1} on {machine}"):
        choices = ranked(config, number, machine)
    if not choices:
        raise InputError(
            f"stage {number + 1} on {machine}: no mesh, policy and parts of its batch fit, by "
            "arithmetic; take more devices, shorter rows, or offload=optimizer"
        )
    of_gpus = machine.chip.platform == "gpu"
    if of_gpus and missing():
        listed = choices[:MOST_LISTED]
        plans = [plan_by_arithmetic(one.config, number, machine) for one in listed]
    else:
        plan = plan_on_gpus if of_gpus else plan_training
        plans = compiled(choices, number, machine, waiting, plan)
    print_candidates(plans)
    return [plan.as_dict() for plan in plans]
