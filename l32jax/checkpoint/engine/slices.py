"""A model's parameters wherever they are, read slice by slice: the middle of every conversion.

A slice is some rows of one layer of a stacked parameter, or of an unstacked one. Every format is
read as `Slices` and written from them, so no format knows another; who loads reads just the rows
that its devices hold, who converts holds a few rows at a time.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l32jax.errors import InputError
from l32jax.model.parameters import Params, flatten, is_stacked, path_name

Shape = tuple[int, ...]
ALL = slice(None)


def nothing() -> None:
    """What there is to release of contents that are not mapped."""


class Home(NamedTuple):
    """One layer of a stacked parameter, or all of an unstacked one (`layer` is None)."""

    path: str
    layer: int | None

    def __str__(self) -> str:
        return self.path if self.layer is None else f"{self.path}[{self.layer}]"


@dataclass(frozen=True)
class Slices:
    """Our parameters by path: shapes (layers first) and dtypes at once, rows when asked for.

    Attributes:
      read: gives `rows` of a home's first dim (of a scalar: the scalar), as something that can be
        indexed further before `np.asarray` reads it.
      release: lets go of pages of mapped files, which count as this process's memory; reading goes
        on as before.
    """

    where: str
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, np.dtype]
    read: Callable[[Home, slice], Any]
    release: Callable[[], None] = nothing

    def homes(self) -> Iterator[Home]:
        for path, shape in self.shapes.items():
            yield from homes_of(path, shape)

    def shape(self, home: Home) -> Shape:
        shape = self.shapes[home.path]
        return shape if home.layer is None else shape[1:]

    def nbytes(self, home: Home) -> int:
        return math.prod(self.shape(home)) * self.dtypes[home.path].itemsize

    def as_dtype(self, dtype: Any) -> "Slices":
        """The same values, rounded to `dtype` as they are read.

        Reading is an InputError where a finite value is beyond that dtype.
        """
        dtype = np.dtype(dtype)

        def read(home: Home, rows: slice) -> np.ndarray:
            values = np.asarray(self.read(home, rows))
            with np.errstate(over="ignore"):
                rounded = values.astype(dtype, copy=False)
            if dtype == np.float16 and (np.isinf(rounded) & np.isfinite(values)).any():
                raise InputError(
                    f"values of {home} in {self.where}: some are beyond what float16 can hold; "
                    "choose bfloat16 or float32"
                )
            return rounded

        return replace(self, dtypes=dict.fromkeys(self.shapes, dtype), read=read)

    @classmethod
    def of(cls, params: Params, where: str = "memory") -> "Slices":
        """Of parameters in memory, on the host or on devices."""
        leaves = flatten(params)

        def read(home: Home, rows: slice) -> np.ndarray:
            leaf = leaves[home.path]
            if home.layer is not None:
                on_host = isinstance(leaf, np.ndarray)
                leaf = leaf[home.layer] if on_host else _take(leaf, jnp.int32(home.layer))
            whole = np.asarray(leaf)
            return whole[rows] if whole.ndim else whole

        shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        dtypes = {path: np.dtype(leaf.dtype) for path, leaf in leaves.items()}
        return cls(where, shapes, dtypes, read)


def homes_of(path: str, shape: Shape) -> Iterator[Home]:
    if not is_stacked(path):
        yield Home(path, None)
        return
    yield from (Home(path, layer) for layer in range(shape[0]))


@jax.jit
def _take(leaf: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def load(slices: Slices, targets: Params) -> Params:
    """Parameters like `targets`, on the devices and with the dtypes that those say.

    `targets` is a tree of `jax.ShapeDtypeStruct` with shardings on real devices, of the shapes of
    `slices`. Host memory at the peak: what this process holds of the largest parameter.
    """
    leaves = flatten(targets)
    assert {path: leaf.shape for path, leaf in leaves.items()} == dict(slices.shapes)
    return jax.tree.map_with_path(
        lambda path, target: _assemble(slices, path_name(path), target), targets
    )


Bounds = tuple[tuple[int, int], ...]  # start and stop in each dimension


def _assemble(slices: Slices, path: str, target: jax.ShapeDtypeStruct) -> jax.Array:
    """One parameter: a buffer per distinct shard of this process, filled layer by layer."""
    sharding = target.sharding
    assert sharding is not None
    by_device = {
        device: _bounds(index, target.shape)
        for device, index in sharding.addressable_devices_indices_map(target.shape).items()
    }
    buffers = {
        bounds: np.empty([stop - start for start, stop in bounds], target.dtype)
        for bounds in by_device.values()
    }
    for home in homes_of(path, target.shape):
        _fill(slices, home, buffers)
        slices.release()
    arrays = [jax.device_put(buffers[bounds], device) for device, bounds in by_device.items()]
    whole = jax.make_array_from_single_device_arrays(target.shape, sharding, arrays)
    return jax.block_until_ready(whole)  # the buffers go before those of the next parameter come


def _bounds(index: Any, shape: Shape) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _fill(slices: Slices, home: Home, buffers: Mapping[Bounds, np.ndarray]) -> None:
    """Into every shard, what it holds of this home; rows that several share are read once."""
    by_rows: dict[tuple[int, int] | None, Any] = {}
    for bounds, buffer in buffers.items():
        if home.layer is not None:
            start, stop = bounds[0]
            if not start <= home.layer < stop:
                continue
            bounds, buffer = bounds[1:], buffer[home.layer - start, ...]
        rows = bounds[0] if bounds else None
        if rows not in by_rows:
            by_rows[rows] = slices.read(home, slice(*rows) if rows else ALL)
        rest = (ALL, *(slice(*bound) for bound in bounds[1:])) if bounds else ()
        buffer[...] = np.asarray(by_rows[rows][rest])
