"""One table per foreign format, read both ways: which tensor of theirs holds which slice of ours.

Our weights are [outs, ins] like torch's, so nearly every entry is a reshape: a view. Loading reads
tensor by tensor into the shards that need it; peak host memory is one stacked parameter.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l32jax.config import BlockKind, DecoderConfig
from l32jax.errors import InputError
from l32jax.model.parameters import Params, flatten, path_name

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """How a tensor of theirs holds a slice of ours: its shape, and the way there and back.

    `read` and `write` take the array and the shape to give it; a view where one is possible.
    """

    their_shape: Callable[[Shape], Shape]
    read: Callable[[np.ndarray, Shape], np.ndarray] = np.reshape
    write: Callable[[np.ndarray, Shape], np.ndarray] = np.reshape


SAME = Layout(lambda shape: shape)
HEADS_OUT = Layout(lambda shape: (shape[0] * shape[1], shape[2]))  # [n h d] as [n*h, d]
HEADS_IN = Layout(lambda shape: (shape[0], shape[1] * shape[2]))  # [d n h] as [d, n*h]
SCALAR = Layout(lambda shape: (1,))


def _halves(theirs: np.ndarray, shape: Shape) -> np.ndarray:
    heads, size, width = shape
    return theirs.reshape(heads, size // 2, 2, width).swapaxes(1, 2).reshape(shape)


def _pairs(ours: np.ndarray, shape: Shape) -> np.ndarray:
    heads, size, width = ours.shape
    return ours.reshape(heads, 2, size // 2, width).swapaxes(1, 2).reshape(shape)


# Queries and keys whose rotary pairs are neighbours (Meta, GGUF), where ours are half a head apart.
ROTARY_PAIRS = Layout(HEADS_OUT.their_shape, _halves, _pairs)


class Part(NamedTuple):
    """A tensor of theirs, and the slice of one of our parameters that it holds.

    `layer` is the place on the stacked axis, None for what is not stacked. Parts that name the
    same tensor are consecutive rows of it, in the order of the table.
    """

    ours: str
    theirs: str
    layout: Layout = SAME
    layer: int | None = None


Table = Sequence[Part]


def placed(rules: Iterable[Part], ours: str, theirs: str, layer: int | None = None) -> list[Part]:
    """Rules about one block, for the block that lives under these two prefixes."""
    return [
        rule._replace(ours=ours + rule.ours, theirs=theirs + rule.theirs, layer=layer)
        for rule in rules
    ]


class Address(NamedTuple):
    """A decoder layer: its flat number, its number among its kind, and where we keep it."""

    layer: int
    kind: BlockKind
    ordinal: int
    group: int
    slot: int


def addresses(config: DecoderConfig) -> Iterator[Address]:
    seen = dict.fromkeys(config.group_pattern, 0)
    for layer in range(config.num_layers):
        group, slot = divmod(layer, len(config.group_pattern))
        kind = config.group_pattern[slot]
        yield Address(layer, kind, seen[kind], group, slot)
        seen[kind] += 1


@dataclass(frozen=True)
class Source:
    """Foreign tensors by name: shapes at once, contents when asked for."""

    where: str
    shapes: Mapping[str, Shape]
    read: Callable[[str], np.ndarray]

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], where: str) -> "Source":
        return cls(where, {name: array.shape for name, array in arrays.items()}, arrays.__getitem__)


class _Piece(NamedTuple):
    """A part with what the shapes of our parameters say about it."""

    part: Part
    shape: Shape  # of the slice of ours
    their_shape: Shape
    rows: slice


def _pieces(table: Table, shapes: Mapping[str, Shape]) -> Iterator[_Piece]:
    used: dict[str, int] = {}
    for part in table:
        shape = shapes[part.ours]
        shape = shape if part.layer is None else shape[1:]
        theirs = part.layout.their_shape(shape)
        begin = used.get(part.theirs, 0)
        used[part.theirs] = begin + theirs[0]
        yield _Piece(part, shape, theirs, slice(begin, used[part.theirs]))


def their_shapes(table: Table, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shape of every tensor of theirs, in the order of the table."""
    return {
        piece.part.theirs: (piece.rows.stop, *piece.their_shape[1:])
        for piece in _pieces(table, shapes)
    }


def load(
    table: Table,
    source: Source,
    targets: Params,
    *,
    ignore: Collection[str] = (),
    repeated: Mapping[str, str] | None = None,
) -> Params:
    """Parameters like `targets`, on the devices and with the dtypes that those say.

    `targets` is a tree of `jax.ShapeDtypeStruct` with shardings on real devices; `ignore` names
    tensors that may be there and are not read, `repeated` those that may be there if they equal
    the first rows of another. InputError if a tensor is missing, too many or of another shape.
    """
    repeated = {new: old for new, old in (repeated or {}).items() if new in source.shapes}
    leaves = flatten(targets)
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    assert {part.ours for part in table} == shapes.keys(), "the table covers other parameters"
    _check(table, shapes, source, {*ignore, *repeated})
    for repetition, original in repeated.items():
        _check_equal(source, repetition, original)
    pieces: dict[str, list[_Piece]] = {}
    for piece in _pieces(table, shapes):
        pieces.setdefault(piece.part.ours, []).append(piece)
    return jax.tree.map_with_path(
        lambda path, target: _assemble(pieces[path_name(path)], source, target), targets
    )


def _check(
    table: Table, shapes: Mapping[str, Shape], source: Source, ignore: Collection[str]
) -> None:
    """InputError unless the names and shapes are those of the table."""
    homes: dict[str, list[str]] = {}
    for part in table:
        home = part.ours if part.layer is None else f"{part.ours}[{part.layer}]"
        homes.setdefault(part.theirs, []).append(home)
    problems = []
    for name, shape in their_shapes(table, shapes).items():
        fills = f"{' and '.join(homes[name])} needs it with shape {list(shape)}"
        if name not in source.shapes:
            problems.append(f"tensor {name!r} is missing: {fills}")
        elif tuple(source.shapes[name]) != shape:
            problems.append(f"tensor {name!r} has shape {list(source.shapes[name])}: {fills}")
    problems += [
        f"tensor {name!r} of shape {list(shape)} has no place in this model"
        for name, shape in source.shapes.items()
        if name not in homes and name not in ignore
    ]
    if problems:
        more = f" (and {len(problems) - 1} more such problems)" if problems[1:] else ""
        raise InputError(
            f"weights in {source.where}: {problems[0]}{more}; check that they belong to the config"
        )


def _check_equal(source: Source, repetition: str, original: str) -> None:
    new, old = source.read(repetition), source.read(original)
    rows = 4096  # at a time
    if (
        new.shape[1:] != old.shape[1:]
        or len(new) > len(old)
        or not all(
            np.array_equal(new[i : i + rows], old[i : min(i + rows, len(new))])
            for i in range(0, len(new), rows)
        )
    ):
        raise InputError(
            f"weights in {source.where}: tensor {repetition!r} differs from {original!r}, though "
            "the config ties them; set tie_word_embeddings to false if that is what the model is"
        )


def _assemble(pieces: list[_Piece], source: Source, target: jax.ShapeDtypeStruct) -> jax.Array:
    """One parameter: a buffer per distinct shard of this process, filled tensor by tensor."""
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
    for piece in pieces:
        values = _read(piece, source)
        for bounds, buffer in buffers.items():
            _copy(values, bounds, buffer, piece.part.layer)
    arrays = [jax.device_put(buffers[bounds], device) for device, bounds in by_device.items()]
    whole = jax.make_array_from_single_device_arrays(target.shape, sharding, arrays)
    return jax.block_until_ready(whole)  # the buffers go before those of the next parameter come


Bounds = tuple[tuple[int, int], ...]  # start and stop in each dimension


def _bounds(index: Any, shape: Shape) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _read(piece: _Piece, source: Source) -> np.ndarray:
    part = piece.part
    try:
        return part.layout.read(source.read(part.theirs)[piece.rows], piece.shape)
    except InputError as error:
        raise InputError(f"tensor {part.theirs!r} in {source.where}: {error}") from None


def _copy(values: np.ndarray, bounds: Bounds, buffer: np.ndarray, layer: int | None) -> None:
    """The part of one layer's values (or of an unstacked parameter's) that this shard holds."""
    if layer is not None:
        start, stop = bounds[0]
        if not start <= layer < stop:
            return
        bounds, buffer = bounds[1:], buffer[layer - start, ...]
    buffer[...] = values[tuple(slice(*b) for b in bounds)]


def unload(table: Table, params: Params, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors in the order of the table, one at a time; by default of our dtypes."""
    leaves = flatten(params)
    assert {part.ours for part in table} == leaves.keys(), "the table covers other parameters"
    by_name: dict[str, list[_Piece]] = {}
    for piece in _pieces(table, {path: leaf.shape for path, leaf in leaves.items()}):
        by_name.setdefault(piece.part.theirs, []).append(piece)
    for name, pieces in by_name.items():
        rows = [
            piece.part.layout.write(
                _slice(leaves[piece.part.ours], piece.part.layer), piece.their_shape
            )
            for piece in pieces
        ]
        whole = rows[0] if len(rows) == 1 else np.concatenate(rows)
        yield name, whole.astype(dtype or whole.dtype, copy=False)


@jax.jit
def _take(leaf: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def _slice(leaf: Any, layer: int | None) -> np.ndarray:
    """On the host: of a stacked parameter only the one layer comes over."""
    if layer is None:
        return np.asarray(leaf)
    return (
        leaf[layer] if isinstance(leaf, np.ndarray) else np.asarray(_take(leaf, jnp.int32(layer)))
    )
