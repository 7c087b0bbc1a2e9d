"""The real programs of a run, compiled for devices that are not here."""

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from l32jax.data.rows import FIELDS, make_row
from l32jax.data.sources.mixture import row_shape
from l32jax.errors import InputError
from l32jax.model.llama import init_params
from l32jax.model.parameters import on_mesh
from l32jax.model.quantise import frozen_as
from l32jax.objective_config import Teacher
from l32jax.run_config import TrainConfig
from l32jax.sharding import activation_spec
from l32jax.train.accumulate import require_even_rows
from l32jax.train.step import abstract_state, stage_step, teachers_of

Shapes = Any  # of jax.ShapeDtypeStruct


class Memory(NamedTuple):
    """Bytes of one device. `peak` has everything, or would have, if it does not fit."""

    params: int
    optimizer: int
    batch: int
    peak: int
    fits: bool

    @property
    def work(self) -> int:
        """Activations, gradients, and what is gathered of other devices' parameters."""
        return self.peak - self.params - self.optimizer - self.batch


class Compiled(NamedTuple):
    text: str
    memory: Memory
    seconds: float


class DoesNotFit(Exception):
    """The compiler needs more memory than a device has."""

    def __init__(self, memory: Memory):
        super().__init__(f"{memory.peak / 2**30:.1f} GiB")
        self.memory = memory


def training_inputs(config: TrainConfig, number: int, mesh: Mesh) -> tuple[Shapes, Shapes]:
    """State and batch of a stage's step, as shapes with shardings."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = abstract_state(config, number, mesh)
    return state, abstract_batch(config, number, mesh)


def abstract_batch(config: TrainConfig, number: int, mesh: Mesh) -> Shapes:
    """What `data.batches.place` puts on the devices for a stage."""
    stage, model = config.stages[number], config.model_of(number)
    data, shape = stage.data, row_shape(stage.data, model, stage.objective)
    row: dict[str, Any] = dict(
        make_row([], length=shape.length, vision=shape.vision, beside=shape.beside)
    )
    if data.features is not None and shape.vision is not None:
        vision = shape.vision
        del row["tiles"]
        kept = (vision.slots * vision.encoder.tokens_per_tile, vision.encoder.feature_dim)
        row["features"] = jax.ShapeDtypeStruct(kept, jnp.dtype(config.dtype))

    def placed(name: str, array: Any) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, activation_spec(FIELDS[name]))
        return jax.ShapeDtypeStruct((data.batch_size, *array.shape), array.dtype, sharding=where)

    return {name: placed(name, array) for name, array in row.items()}


def abstract_teachers(config: TrainConfig, number: int, mesh: Mesh) -> Shapes:
    """The parameters that a stage's steps are given beside its state."""

    def kept(teacher: Teacher) -> Shapes:
        return frozen_as(config.params, init_params(teacher.model, jax.random.key(0)))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        teachers = teachers_of(config.stages[number])
        return tuple(on_mesh(jax.eval_shape(partial(kept, each)), mesh) for each in teachers)


def compile_training(config: TrainConfig, number: int, mesh: Mesh) -> Compiled:
    """The step of a stage, as `train.loop` runs it."""
    require_even_rows(config.stages[number], mesh.shape)
    with _dividing(mesh):
        state, batch = training_inputs(config, number, mesh)
    step, teachers = stage_step(config, number), abstract_teachers(config, number, mesh)
    rate = jax.ShapeDtypeStruct((), np.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    sizes = Memory(
        params=device_bytes((state.params, state.reference, teachers)),
        optimizer=device_bytes((state.opt_state, state.average)),
        batch=device_bytes(batch),
        peak=0,
        fits=True,
    )
    return compile_for(mesh, step, (state, batch, rate, teachers), sizes)


def compile_for(
    mesh: Mesh, function: Any, arguments: tuple, sizes: Memory, **static: Any
) -> Compiled:
    """A jitted function for the devices of a mesh; `sizes` without its peak is what it holds."""
    begin, platform = time.monotonic(), mesh.devices.flat[0].platform
    with _dividing(mesh), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = function.trace(*arguments, **static)
        lowered = traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _does_not_fit(error, sizes) from None
    found: Any = compiled.memory_analysis()
    memory = sizes._replace(peak=found.peak_memory_in_bytes)
    return Compiled(compiled.as_text(), memory, time.monotonic() - begin)


@contextmanager
def _dividing(mesh: Mesh) -> Iterator[None]:
    """JAX's errors about dimensions that the axes do not divide, as ours."""
    try:
        yield
    except (ValueError, TypeError) as error:
        where = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        why = " ".join(str(error).split())[:300]
        raise InputError(f"mesh {where}: {why}; give it other sizes") from error


def _does_not_fit(error: Exception, sizes: Memory) -> Exception:
    """What the compiler says of memory; the error itself if it is about something else."""
    found = re.search(r"[Uu]sed ([\d.]+)([GM]) of|required for .*?\(([\d.]+)([GM])\)", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
        return error
    amount, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    peak = int(float(amount) * {"G": 2**30, "M": 2**20}[unit])
    return DoesNotFit(sizes._replace(peak=peak, fits=False))


def device_bytes(shapes: Shapes) -> int:
    """Of one device's part of the arrays that are in its own memory."""

    def size(leaf: jax.ShapeDtypeStruct) -> int:
        assert isinstance(leaf.sharding, NamedSharding)
        if leaf.sharding.memory_kind == "pinned_host":
            return 0
        bits = 4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize  # NumPy says 8 of int4
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * bits // 8

    return sum(map(size, jax.tree.leaves(shapes)))
