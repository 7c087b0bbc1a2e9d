"""What a stage would need and how fast it would go, on a machine that is not here."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from l32jax.config import LlamaConfig, MeshConfig
from l32jax.plan.kernels import attention_seconds
from l32jax.plan.program import Compiled, DoesNotFit, Memory, compile_training
from l32jax.plan.serving import Phase, Requests, compile_serving
from l32jax.plan.steptime import estimate
from l32jax.plan.tally import StepTime
from l32jax.plan.topology import Topology
from l32jax.plan.workload import flops_by_part, full_rows, visible
from l32jax.presets import mesh_for
from l32jax.run_config import TrainConfig
from l32jax.sharding import make_mesh
from l32jax.train.flops import Counts, step_flops


@dataclass(frozen=True)
class Plan:
    """Of one stage on one machine; all numbers are of a step unless they say more.

    time: None if the program does not fit. flops: useful ones by part, (forward, backward).
    arithmetic: what of it no compiler said, but `analytic`: time, or memory and time.
    """

    stage: str
    topology: str
    chip: str
    devices: int
    mesh: dict[str, int]
    saved: str
    accumulate: int
    counts: Counts
    trains: tuple[str, ...]
    flops: dict[str, tuple[int, int]]
    memory: Memory
    hbm_bytes: int
    peak: float
    watts: int
    compile_seconds: float
    time: StepTime | None
    arithmetic: tuple[str, ...] = ()

    @property
    def seconds(self) -> float | None:
        return None if self.time is None else self.time.seconds

    @property
    def model_flops(self) -> int:
        return sum(map(sum, self.flops.values()))

    @property
    def utilisation(self) -> float | None:
        """Model-FLOPs utilisation: nothing that is computed again counts."""
        seconds = self.seconds
        return None if seconds is None else self.model_flops / (seconds * self.peak * self.devices)

    def campaign(self, steps: int) -> dict[str, float]:
        """Hours, and megawatt-hours at the devices' watts, of so many steps."""
        assert self.seconds is not None
        hours = steps * self.seconds / 3600
        return {"hours": hours, "megawatt_hours": hours * self.devices * self.watts / 1e6}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("counts", "memory", "time")
        }
        found["counts"] = dataclasses.asdict(self.counts)
        found["memory"] = self.memory._asdict() | {"work": self.memory.work}
        if self.time is not None:
            found |= {
                "step_seconds": self.seconds,
                "utilisation": self.utilisation,
                "tokens_per_second": self.counts.tokens / self.time.seconds,
                "images_per_second": self.counts.images / self.time.seconds,
                "time": _parts(self.time),
            }
        return found


def mesh_text(axes: Mapping[str, int]) -> str:
    """In one line, without the axes of one device."""
    return ",".join(f"{axis}={size}" for axis, size in axes.items() if size > 1) or "data=1"


def mesh_of(config: TrainConfig, topology: Topology) -> MeshConfig:
    """The one that the run would have there."""
    devices = len(topology.devices)
    return config.mesh or mesh_for(config.model, topology.chip.platform, devices)


def _parts(time: StepTime) -> dict[str, Any]:
    names = ("matmul", "other", "kernels", "exposed")
    return {name: getattr(time, name) for name in names} | {
        "sent_bytes": {"+".join(axes): sent for axes, sent in time.sent_along.items()},
        "collectives": [
            {"kind": exchange.kind, "axes": exchange.axes, **dataclasses.asdict(one)}
            for exchange, one in time.exchanges.items()
        ],
        "warnings": time.warnings,
    }


def plan_training(config: TrainConfig, number: int, topology: Topology) -> Plan:
    """Compiles the step of a stage, and reckons what it takes.

    Raises:
      InputError: the mesh, or the batch, does not go with the devices.
    """
    mesh = make_mesh(mesh_of(config, topology), topology.devices)
    axes, seconds = dict(mesh.shape), 0.0
    try:
        compiled = compile_training(config, number, mesh)
        memory, time = compiled.memory, _time(compiled, config, number, topology, axes)
        seconds = compiled.seconds
    except DoesNotFit as error:
        memory, time = error.memory, None
    return stage_plan(config, number, topology, axes, memory, time, compile_seconds=seconds)


def stage_plan(
    config: TrainConfig,
    number: int,
    topology: Topology,
    axes: dict[str, int],
    memory: Memory,
    time: StepTime | None,
    *,
    compile_seconds: float = 0.0,
    arithmetic: tuple[str, ...] = (),
) -> Plan:
    """That of a stage whose memory and time are known."""
    stage, model = config.stages[number], config.model_of(number)
    counts = full_rows(stage.data, model)
    parts = flops_by_part(stage, model, counts)
    return Plan(
        stage=stage.name,
        **_machine(topology, axes),
        saved=config.saved,
        accumulate=stage.accumulate,
        counts=counts,
        trains=stage.trains,
        flops={name: (one.forward.useful, one.backward.useful) for name, one in parts.items()},
        memory=memory,
        compile_seconds=compile_seconds,
        time=time,
        arithmetic=arithmetic,
    )


def _machine(topology: Topology, axes: dict[str, int]) -> dict[str, Any]:
    chip = topology.chip
    return {
        "topology": str(topology),
        "chip": chip.name,
        "devices": len(topology.devices),
        "mesh": axes,
        "hbm_bytes": chip.hbm_bytes,
        "peak": chip.peak,
        "watts": chip.watts,
    }


def plan_serving(
    model: LlamaConfig, requests: Requests, phase: Phase, mesh: MeshConfig, topology: Topology
) -> Plan:
    """The same of a step of generation, in bfloat16: whole prompts, or the next token of each."""
    devices = make_mesh(mesh, topology.devices)
    axes = dict(devices.shape)
    counts = requests.counts(phase, model)
    try:
        compiled = compile_serving(model, requests, phase, devices)
        memory, seconds = compiled.memory, compiled.seconds
        kernels = attention_seconds(topology.chip, requests.visible(model))
        time = estimate(compiled.text, topology.chip, axes, kernels, shape=topology.shape)
    except DoesNotFit as error:
        memory, seconds, time = error.memory, 0.0, None
    flops = step_flops(model, (), counts)
    return Plan(
        stage=phase,
        **_machine(topology, axes),
        saved="everything",
        accumulate=1,
        counts=counts,
        trains=(),
        flops={name: (found.useful, 0) for name, found in flops.items()},
        memory=memory,
        compile_seconds=seconds,
        time=time,
    )


def _time(
    compiled: Compiled, config: TrainConfig, number: int, topology: Topology, axes: dict[str, int]
) -> StepTime:
    data, model = config.stages[number].data, config.model_of(number)
    seen = visible(data, model, context=axes["context"])
    kernels = attention_seconds(topology.chip, seen)
    return estimate(compiled.text, topology.chip, axes, kernels, shape=topology.shape)
