"""How long devices take to exchange arrays, and along which axes of the mesh they do it.

The model is ideal: links carry what `chips` says, all of those along an axis at once, and every
hop takes a microsecond. A device sends a ring's share of an array to each of its neighbours.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from l32jax.plan.chips import Chip
from l32jax.plan.hlo import Instruction

_MESH = re.compile(
    r"replica_groups=mesh\[(?P<mesh>.*?)\](?:, device_ids=\((?P<ids>.*?)\))? \{(?P<axes>.*?)\}"
)
HOP = 1e-6  # seconds; assumed, as in jax-ml's scaling book

Side = tuple[int, bool]  # devices along a dimension of the torus, and whether it closes to a ring


def default_shape(chips: int, dims: int) -> tuple[int, ...]:
    """The most even topology of so many chips, like 4x4x8, ascending."""
    if dims == 1:
        return (chips,)
    near = [n for n in range(1, chips + 1) if chips % n == 0 and n**dims <= chips]
    return (near[-1], *default_shape(chips // near[-1], dims - 1))


def sides_of(chip: Chip, shape: Sequence[int]) -> tuple[Side, ...]:
    """A 3D slice closes where it is made of whole cubes of 64 chips, a 2D one along whole pods."""
    if chip.torus == 3:
        closed = all(size % 4 == 0 for size in shape)
        return tuple((size, closed) for size in shape)
    return tuple((size, size == 16) for size in shape)


@dataclasses.dataclass(frozen=True)
class Network:
    """The mesh of a program on its chips.

    axes: sizes of the whole mesh, outermost first. Slices, if there are several, are along the
      outermost axes.
    shape: the topology of a slice; () for the most even one.
    slices: how many; the programs of a slice number its own devices only.
    """

    chip: Chip
    axes: Mapping[str, int]
    shape: tuple[int, ...] = ()
    slices: int = 1

    @property
    def devices(self) -> int:
        """Of one slice."""
        return math.prod(self.axes.values()) // self.slices

    @functools.cached_property
    def local(self) -> dict[str, int]:
        """The axes' sizes inside a slice."""
        left, found = self.slices, {}
        for axis, size in self.axes.items():
            outside = math.gcd(left, size)
            found[axis], left = size // outside, left // outside
        return found

    @functools.cached_property
    def sides(self) -> dict[str, tuple[Side, ...]]:
        """Which sides of the torus each axis runs along: the innermost axis chooses first.

        As `jax.experimental.mesh_utils` does it, but that an axis may take a part of a side.
        """
        chips = max(1, self.devices // self.chip.per_chip)
        free = [*sides_of(self.chip, self.shape or default_shape(chips, self.chip.torus))]
        left, found = self.chip.per_chip, {}
        for axis, size in reversed(self.local.items()):
            within = math.gcd(left, size)  # devices of one chip are next to each other
            left //= within
            found[axis] = _take(free, size // within)
        return found

    def spanned(self, group: Sequence[int]) -> tuple[str, ...]:
        """The axes along which the devices of a group, numbered in their slice, differ."""
        coordinates = np.unravel_index(np.asarray(group), tuple(self.local.values()))
        return tuple(
            axis
            for axis, along in zip(self.local, coordinates, strict=True)
            if (along != along[0]).any()
        )

    @functools.cached_property
    def between_slices(self) -> tuple[str, ...]:
        return tuple(axis for axis, size in self.axes.items() if size != self.local[axis])

    def seconds(self, kind: str, sent: float, axes: Sequence[str]) -> float:
        """Of a collective in which every device sends so many bytes, inside a slice."""
        if not self.chip.torus:
            return self._switched(sent, axes)
        sides = [side for axis in axes for side in self.sides[axis]] or [(2, False)]
        link = self.chip.link / self.chip.per_chip
        if kind == "collective-permute":
            return sent / link + HOP
        hops = sum(size // 2 if ring else size - 1 for size, ring in sides)
        if kind in ("all-to-all", "ragged-all-to-all"):
            longest = max(size / (8 if ring else 4) for size, ring in sides)
            return sent * longest / link + hops * HOP
        links = sum(2 if ring else 1 for _, ring in sides)
        return sent / (links * link) + (2 if kind == "all-reduce" else 1) * hops * HOP

    def _switched(self, sent: float, axes: Sequence[str]) -> float:
        """Inside a host over its switch; between hosts over the networks of all that take part."""
        left, here = self.chip.per_host, 1
        for axis, size in reversed(self.local.items()):
            within = math.gcd(left, size)
            left //= within
            here *= within if axis in axes else 1
        if here == math.prod(self.local[axis] for axis in axes):
            return sent / self.chip.link
        return max(sent / self.chip.link, sent / (here * self.chip.network))

    def seconds_between_slices(self, sent: float) -> float:
        return sent / self.chip.network


def _take(free: list[Side], size: int) -> tuple[Side, ...]:
    """Whole sides that make up the size, as many as can be; else parts, which are no rings."""
    if size == 1:
        return ()
    for count in range(len(free), 0, -1):
        for some in itertools.combinations(free, count):
            if math.prod(side for side, _ in some) == size:
                for side in some:
                    free.remove(side)
                return some
    taken = []
    for place, (side, ring) in enumerate(free):
        part = math.gcd(side, size)
        if part > 1:
            taken.append((part, ring and part == side))
            free[place], size = (side // part, False), size // part
    return (*taken, (size, False)) if size > 1 else tuple(taken)


def sent_bytes(kind: str, array: float, devices: int) -> float:
    """What each of a group's devices sends, of an array that is gathered, reduced or exchanged."""
    if kind == "collective-permute":
        return array
    return array * (devices - 1) / devices * (2 if kind == "all-reduce" else 1)


def group_of(instruction: Instruction, devices: int) -> list[int] | None:
    """The first group of devices that exchange something, or the first pair of a permutation.

    All of them if the instruction names none; None if it names them in a way that is not known.
    Known are lists, "[2,4]<=[8]", "[4,2]<=[2,4]T(1,0)", and axes of a mesh, "mesh['a'=2,'b'=4]
    {'b'}" and "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}".
    """
    text = instruction.attributes.partition(", metadata=")[0]
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        numbers = [[*map(int, pair)] for pair in re.findall(r"(\d+),(\d+)", pairs[1])]
        return next((pair for pair in numbers if pair[0] != pair[1]), [0])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [*map(int, listed[1].split(","))]
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\S+)", text):
        return _order(tiled[3]).reshape(int(tiled[1]), int(tiled[2]))[0].tolist()
    if mesh := _MESH.search(text):
        return _group_of_mesh(mesh["mesh"], mesh["ids"], mesh["axes"])
    named = "replica_groups=" in text and "replica_groups={}" not in text
    return None if named else [*range(devices)]


def _order(text: str) -> np.ndarray:
    """The numbers that "[2,4]T(1,0)" stands for: those below 8, in rows of 4, read by columns."""
    lists = [[*map(int, one.split(","))] for one in re.findall(r"[\[(]([\d,]+)[\])]", text)]
    dims, order = lists[0], lists[1] if len(lists) > 1 else range(len(lists[0]))
    return np.arange(math.prod(dims)).reshape(dims).transpose(order)


def _group_of_mesh(mesh: str, numbers: str | None, axes: str) -> list[int]:
    """A part of an axis is written 'a':(4)2: of those 2 behind the first 4."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = np.arange(math.prod(sizes.values()))
    if numbers:
        listed = "[" not in numbers
        ids = np.array([*map(int, numbers.split(","))]) if listed else _order(numbers)
    ids, names = ids.reshape([*sizes.values()]), [*sizes]
    picked: list = [0] * len(names)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        size = sizes[name]
        step = size // (int(before) * int(part)) if part else 1
        picked[names.index(name)] = slice(0, step * int(part) if part else size, step)
    return ids[tuple(picked)].reshape(-1).tolist()


def heads_up(instruction: Instruction) -> bool:
    """Of a permutation: whether most devices send to one with a higher number."""
    pairs = instruction.attribute(r"source_target_pairs=\{(.*?)\}\}") or ""
    steps = [int(there) > int(here) for here, there in re.findall(r"(\d+),(\d+)", pairs)]
    return 2 * sum(steps) >= len(steps)
