"""One alphabet names array dimensions everywhere: in annotations, einsums and shardings.

  b batch row    t query position    s key position    v vocabulary
  d model width  e width of image features             f feed-forward
  n query heads  k key/value heads                     h head dimension
  g query heads that share a key/value head
  i image        c tile              p token of a tile l stacked layer group
  j image of all rows, one behind the other            r LoRA rank
  z place in the residual stream, which other axes split than a query position
  q comparison of answers                              w word among a teacher's likeliest
  u document of a row

The two tables below are the whole parallelism plan. A letter they lack is not sharded.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Int

from l32jax.config import LlamaConfig, MeshConfig
from l32jax.errors import InputError

CONTEXT_AXIS = "context"
PARAM_AXES = {"d": "fsdp", "f": "tensor", "n": "tensor", "k": "tensor", "v": "tensor"}
ACTIVATION_AXES = {
    "b": ("data", "fsdp"),
    "t": CONTEXT_AXIS,
    "z": (CONTEXT_AXIS, "tensor"),
    "j": ("data", "fsdp", CONTEXT_AXIS),
    "f": "tensor",
    "n": "tensor",
    "k": "tensor",
    "v": "tensor",
}


def param_spec(dims: str) -> PartitionSpec:
    return PartitionSpec(*(PARAM_AXES.get(dim) for dim in dims))


def activation_spec(dims: str) -> PartitionSpec:
    return PartitionSpec(*(ACTIVATION_AXES.get(dim) for dim in dims))


def stream_spec(length: int) -> PartitionSpec:
    """Of the residual stream [b t d] between blocks.

    Devices along the tensor axis share its places, if they divide them: each normalises, adds and
    saves its own, and what products leave to be summed is summed where it is needed.
    """
    axes = jax.sharding.get_abstract_mesh().shape
    shares = math.prod(axes.get(axis, 1) for axis in ACTIVATION_AXES["z"])
    return activation_spec("btd" if length % shares else "bzd")


def make_mesh(
    config: MeshConfig = MeshConfig(),  # noqa: B008  (frozen)
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of all devices, with explicit axes: shardings are part of array types.

    Neighbours along the last axis are neighbours in the machine: on the wires of a TPU slice, in
    one node of GPUs. Slices, which only the network connects, are told apart by the first axes that
    they divide.

    Args:
      devices: those to take; they may be of a machine that is not here.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    types = (AxisType.Explicit,) * len(sizes)
    return Mesh(_arranged(list(sizes.values()), devices), tuple(sizes), axis_types=types)


def _arranged(shape: list[int], devices: Sequence[Any]) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu" or slices == 1:
        return _within(shape, devices)
    outer, left = [], slices
    for size in shape:
        outer.append(math.gcd(size, left))
        left //= outer[-1]
    inner = [size // share for size, share in zip(shape, outer, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )


def _within(shape: list[int], devices: Sequence[Any]) -> np.ndarray:
    """Whole axes of the machine's torus for each of the mesh, where that can be."""
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def row_parts(axes: Mapping[str, int]) -> int:
    """Parts that the rows of a batch are in, on a mesh with axes of these sizes."""
    return math.prod(axes[axis] for axis in ACTIVATION_AXES["b"])


def require_divisible(model: LlamaConfig, name: str, axes: Mapping[str, int]) -> None:
    """InputError unless a mesh with axes of these sizes can divide the model's weights."""
    sizes = {"d": "embed_dim", "f": "mlp_dim", "n": "num_heads", "k": "num_kv_heads"}
    for letter, size in sizes.items():
        axis, found = PARAM_AXES[letter], getattr(model.decoder, size)
        if found % axes[axis]:
            raise InputError(
                f"{size}={found} of {name}: the mesh's axis {axis} of {axes[axis]} devices does "
                "not divide it; choose another size or mesh"
            )


@functools.lru_cache(maxsize=32)  # it looks at every device, and is asked for every batch
def row_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of the rows of a batch this process feeds its devices with, and of how many.

    Processes have the same share if only axes that split rows themselves lie between them.
    """
    processes = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    return _share_of(processes.reshape(row_parts(mesh.shape), -1), jax.process_index())


def _share_of(processes: Int[np.ndarray, "rows devices"], own: int) -> tuple[int, int]:
    held = {
        process: tuple(np.flatnonzero((processes == process).any(axis=1)).tolist())
        for process in np.unique(processes).tolist()
    }
    shares = sorted(set(held.values()))
    if sum(map(len, shares)) != len(processes) or len(set(map(len, shares))) > 1:
        raise InputError(
            f"mesh with rows in {len(processes)} parts over {len(held)} processes: some share a "
            "part of their rows; let data times fsdp be a multiple of the processes, or a divisor"
        )
    return shares.index(held[own]), len(shares)


def single_device_mesh() -> Mesh:
    """The mesh of one device: every sharding is a no-op on it."""
    axes = tuple(field.name for field in dataclasses.fields(MeshConfig))
    return jax.make_mesh((1,) * len(axes), axes, devices=jax.devices()[:1])
