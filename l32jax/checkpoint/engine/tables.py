"""One table per foreign format, read both ways: which tensor of theirs holds which slice of ours.

Our weights are [outs, ins] like torch's, so nearly every entry is a reshape: a view. `ours` reads a
foreign checkpoint as our slices, `theirs` our slices as a foreign checkpoint; neither holds more
than the rows that it is asked for.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from l32jax.checkpoint.engine.slices import ALL, Home, Shape, Slices
from l32jax.checkpoint.engine.sources import Source, Tensor
from l32jax.checkpoint.engine.transfer import slabs
from l32jax.config import BlockKind, DecoderConfig
from l32jax.errors import InputError


class Layout(NamedTuple):
    """How a tensor of theirs holds a slice of ours: its shape, and the way there and back.

    `read` and `write` take the array and the shape to give it; a view where one is possible. Each
    row of ours is whole rows of theirs, the same number for all, unless `by_rows` is False.
    """

    their_shape: Callable[[Shape], Shape]
    read: Callable[[np.ndarray, Shape], np.ndarray] = np.reshape
    write: Callable[[np.ndarray, Shape], np.ndarray] = np.reshape
    by_rows: bool = True


SAME = Layout(lambda shape: shape)
HEADS_OUT = Layout(lambda shape: (shape[0] * shape[1], shape[2]))  # [n h d] as [n*h, d]
HEADS_IN = Layout(lambda shape: (shape[0], shape[1] * shape[2]))  # [d n h] as [d, n*h]
SCALAR = Layout(lambda shape: (1,), by_rows=False)


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


def shortest_group(kinds: tuple[BlockKind, ...]) -> tuple[BlockKind, ...]:
    """The shortest group of blocks whose repetition they are."""
    sizes = (size for size in range(1, len(kinds) + 1) if len(kinds) % size == 0)
    return next(kinds[:size] for size in sizes if kinds[:size] * (len(kinds) // size) == kinds)


class _Piece(NamedTuple):
    """A part with what the shapes of our parameters say about it."""

    part: Part
    shape: Shape  # of the slice of ours
    their_shape: Shape
    rows: slice  # of their tensor

    @property
    def step(self) -> int:
        """How many rows of theirs cannot be told apart."""
        if not self.part.layout.by_rows:
            return self.their_shape[0]
        return self.their_shape[0] // self.shape[0]


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


def ours(
    table: Table,
    source: Source,
    shapes: Mapping[str, Shape],
    *,
    ignore: Collection[str] = (),
    repeated: Mapping[str, str] | None = None,
) -> Slices:
    """A foreign checkpoint as our parameters, which have these shapes.

    `ignore` names tensors that may be there and are not read, `repeated` those that may be there if
    they equal the first rows of another. InputError if a tensor is missing, too many, of another
    shape, or not equal.
    """
    repeated = {new: old for new, old in (repeated or {}).items() if new in source.tensors}
    assert {part.ours for part in table} == shapes.keys(), "the table covers other parameters"
    _check(table, shapes, source, {*ignore, *repeated})
    for repetition, original in repeated.items():
        _check_equal(source, repetition, original)
    pieces = {Home(piece.part.ours, piece.part.layer): piece for piece in _pieces(table, shapes)}
    dtypes: dict[str, np.dtype] = {}
    for home, piece in pieces.items():
        dtype = source.tensors[piece.part.theirs].dtype
        dtypes[home.path] = _promoted(dtypes.get(home.path, dtype), dtype)
    return Slices(
        source.where,
        shapes,
        dtypes,
        lambda home, rows: _read(pieces[home], source, rows).astype(dtypes[home.path], copy=False),
        source.release,
    )


def _promoted(*dtypes: np.dtype) -> np.dtype:
    return np.dtype(jnp.result_type(*dtypes))


def _check(
    table: Table, shapes: Mapping[str, Shape], source: Source, ignore: Collection[str]
) -> None:
    """InputError unless the names and shapes are those of the table."""
    homes: dict[str, list[str]] = {}
    for part in table:
        homes.setdefault(part.theirs, []).append(str(Home(part.ours, part.layer)))
    problems = []
    for name, shape in their_shapes(table, shapes).items():
        fills = f"{' and '.join(homes[name])} needs it with shape {list(shape)}"
        if name not in source.tensors:
            problems.append(f"tensor {name!r} is missing: {fills}")
        elif tuple(source.tensors[name].shape) != shape:
            problems.append(
                f"tensor {name!r} has shape {list(source.tensors[name].shape)}: {fills}"
            )
    problems += [
        f"tensor {name!r:.200} of shape {list(tensor.shape)} has no place in this model"
        for name, tensor in source.tensors.items()
        if name not in homes and name not in ignore
    ]
    if problems:
        more = f" (and {len(problems) - 1} more such problems)" if problems[1:] else ""
        raise InputError(
            f"weights in {source.where}: {problems[0]}{more}; check that they belong to the config"
        )


def _check_equal(source: Source, repetition: str, original: str) -> None:
    new, old = source.tensors[repetition].shape, source.tensors[original].shape
    if (
        new[1:] != old[1:]
        or new[0] > old[0]
        or not all(
            _rows_equal(source, repetition, original, rows)
            for rows in slabs(source.tensors[repetition])
        )
    ):
        raise InputError(
            f"weights in {source.where}: tensor {repetition!r} differs from {original!r}, though "
            "the config ties them; set tie_word_embeddings to false if that is what the model is"
        )


def _rows_equal(source: Source, repetition: str, original: str, rows: slice) -> bool:
    equal = np.array_equal(source.read(repetition, rows), source.read(original, rows))
    source.release()
    return equal


def _read(piece: _Piece, source: Source, rows: slice) -> np.ndarray:
    """Rows of ours; from a layout that has none, all of theirs is read."""
    name, layout = piece.part.theirs, piece.part.layout
    begin, end = (0, 1) if not piece.shape else rows.indices(piece.shape[0])[:2]
    try:
        if not layout.by_rows:
            whole = layout.read(source.read(name, piece.rows), piece.shape)
            return whole[begin:end] if piece.shape else whole
        step, first = piece.step, piece.rows.start
        stored = source.read(name, slice(first + begin * step, first + end * step))
        return layout.read(stored, (end - begin, *piece.shape[1:]))
    except InputError as error:
        raise InputError(f"tensor {name!r} in {source.where}: {error}") from None


def theirs(table: Table, slices: Slices) -> Source:
    """Our parameters as a foreign checkpoint's tensors, in the order of the table."""
    assert {part.ours for part in table} == slices.shapes.keys(), (
        "the table covers other parameters"
    )
    by_name: dict[str, list[_Piece]] = {}
    for piece in _pieces(table, slices.shapes):
        by_name.setdefault(piece.part.theirs, []).append(piece)
    tensors = {}
    for name, pieces in by_name.items():
        shape = (pieces[-1].rows.stop, *pieces[-1].their_shape[1:])
        dtype = _promoted(*(slices.dtypes[piece.part.ours] for piece in pieces))
        tensors[name] = Tensor(shape, dtype, math.lcm(*(piece.step for piece in pieces)))

    def read(name: str, rows: slice) -> np.ndarray:
        begin, end, _ = rows.indices(tensors[name].shape[0])
        parts = [_write(piece, slices, begin, end) for piece in by_name[name]]
        parts = [part.astype(tensors[name].dtype, copy=False) for part in parts if len(part)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return Source(slices.where, tensors, read, slices.release)


def _write(piece: _Piece, slices: Slices, begin: int, end: int) -> np.ndarray:
    """What rows begin to end of their tensor have of this piece: whole steps of it."""
    part, step = piece.part, piece.step
    begin, end = max(begin, piece.rows.start), min(end, piece.rows.stop)
    home = Home(part.ours, part.layer)
    if begin >= end:
        return np.empty((0, *piece.their_shape[1:]), slices.dtypes[part.ours])
    if not part.layout.by_rows:
        assert (begin, end) == (piece.rows.start, piece.rows.stop)
        return part.layout.write(np.asarray(slices.read(home, ALL)), piece.their_shape)
    assert (begin - piece.rows.start) % step == (end - piece.rows.start) % step == 0
    first = begin - piece.rows.start
    rows = slice(first // step, (end - piece.rows.start) // step)
    values = np.asarray(slices.read(home, rows))
    return part.layout.write(values, (end - begin, *piece.their_shape[1:]))
