"""Machines that are not here: their devices, for which programs can be compiled."""

import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from jax.experimental import topologies

from l32jax.errors import InputError
from l32jax.plan.chips import Chip, chip_of

LONG_RING = 16  # chips of a 2D slice's side that closes to a ring


class Topology(NamedTuple):
    """shape: chips along each dimension of one slice; of GPUs, (machines, GPUs of each).

    devices: JAX's; of GPUs only their kinds: `cuda.devices_of` has those to compile for.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int
    devices: list[Any]

    def __str__(self) -> str:
        shape = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return shape if self.slices == 1 else f"{self.slices} slices of {shape}"


def open_topology(name: str, slices: int = 1) -> Topology:
    """That of a name like "v5p:8x8x8", or "h100:4x8" for four machines of eight GPUs.

    Raises:
      InputError: there is no such machine, or the compiler for it is not installed.
    """
    chip = chip_of(name)
    sides = name.partition(":")[2]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", sides) or slices < 1:
        raise InputError(
            f"topology {name!r} of {slices} slices: give a chip and the chips along each "
            "dimension, as in v5p:4x4x8, v6e:16x16 or, machines by GPUs, h100:16x8"
        )
    shape = tuple(int(side) for side in sides.split("x"))
    if chip.platform == "gpu":
        return _of_gpus(name, chip, shape, slices)
    devices = _tpu_devices(name, chip, shape, slices)
    return Topology(chip, shape, slices, devices)


def _of_gpus(name: str, chip: Chip, shape: tuple[int, ...], slices: int) -> Topology:
    if len(shape) != 2 or shape[1] > chip.per_host or slices > 1:
        raise InputError(
            f"topology {name!r} of {slices} slices: GPUs are machines by GPUs of each, at most "
            f"{chip.per_host}, and in no slices; give one as {chip.name}:16x{chip.per_host}"
        )
    chip = dataclasses.replace(chip, per_host=shape[1])
    return Topology(chip, shape, slices, [chip.kind] * math.prod(shape))


def _tpu_devices(name: str, chip: Chip, shape: tuple[int, ...], slices: int) -> list[Any]:
    if len(shape) != chip.torus:
        raise InputError(f"topology {name!r}: a slice of {chip.name} has {chip.torus} dimensions")
    options: dict[str, Any] = {"wrap": _rings(chip, shape)}
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    if slices > 1:
        options["num_slices"] = slices
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"
    # Asking for metadata takes minutes where there is no TPU; several processes may plan at once.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    full = name if len(shape) > 1 else f"{name}x1"
    try:
        with _quiet():
            found = topologies.get_topology_desc(platform="tpu", topology_name=full, **options)
    except Exception as error:  # noqa: BLE001  (of no common class)
        why = str(error).splitlines()[0][:200]
        raise InputError(
            f"topology {name!r}: {why}; install the TPU compiler with the extra `tpu`, and name a "
            "slice that exists"
        ) from error
    return list(found.devices)


def _rings(chip: Chip, shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Which dimensions of a slice close to rings: the compiler must be told."""
    if chip.torus == 2:
        return (*(side == LONG_RING for side in shape), False)
    return (all(side % 4 == 0 for side in shape),) * 3


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the TPU library writes to the terminal, whatever it is told."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
