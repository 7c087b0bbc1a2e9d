"""Meta's checkpoints in several files: each rank's has its part of the large tensors."""

from collections.abc import Callable, Sequence

import numpy as np

from l32jax.checkpoint.engine.slices import ALL
from l32jax.checkpoint.engine.sources import Source, Tensor
from l32jax.checkpoint.engine.transfer import as_bytes, slabs
from l32jax.errors import InputError

# The dimension that the ranks share. Each has all of what is not listed: norms, gates, tables.
SPLIT = {
    0: (
        ".tok_embeddings.weight", ".learnable_embedding.weight", ".output.weight",
        ".wq.weight", ".wk.weight", ".wv.weight", ".w1.weight", ".w3.weight",
        ".conv1._linear.weight", ".c_fc.weight", ".c_fc.bias",
        ".vision_projection.weight", ".vision_projection.bias",
    ),
    1: (".wo.weight", ".w2.weight", ".c_proj.weight"),
}  # fmt: skip


def split_dim(name: str, tensor: Tensor) -> int | None:
    """Which dimension of a tensor the ranks share."""
    dims = (dim for dim, suffixes in SPLIT.items() if f".{name}".endswith(suffixes))
    return next((dim for dim in dims if dim < len(tensor.shape)), None)


def joined(sources: Sequence[Source], where: str) -> Source:
    """The whole tensors of all ranks' files, given in order.

    InputError if the files have not the same tensors, or differ in one that each has whole.
    """
    first = sources[0]
    if len(sources) == 1:
        return first
    for source in sources[1:]:
        _require_alike(first, source)
    dims = {name: split_dim(name, tensor) for name, tensor in first.tensors.items()}

    def read(name: str, rows: slice) -> np.ndarray:
        match dims[name]:
            case None:
                return first.read(name, rows)
            case 0:
                return _read_rows(sources, name, rows)
            case _:
                return np.concatenate([source.read(name, rows) for source in sources], axis=1)

    def release() -> None:
        for source in sources:
            source.release()

    tensors = {
        name: _resized(tensor, dims[name], lambda size: size * len(sources))
        for name, tensor in first.tensors.items()
    }
    return Source(where, tensors, read, release)


def _resized(tensor: Tensor, dim: int | None, change: Callable[[int], int]) -> Tensor:
    shape = tuple(change(size) if i == dim else size for i, size in enumerate(tensor.shape))
    return tensor._replace(shape=shape)


def _read_rows(sources: Sequence[Source], name: str, rows: slice) -> np.ndarray:
    size = max(1, sources[0].tensors[name].shape[0])
    begin, end, _ = rows.indices(size * len(sources))
    parts = [
        sources[rank].read(name, slice(max(begin - rank * size, 0), end - rank * size))
        for rank in range(begin // size, -(-end // size))
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _require_alike(first: Source, other: Source) -> None:
    if missing := first.tensors.keys() ^ other.tensors.keys():
        raise InputError(
            f"weights in {other.where}: tensor {min(missing)!r} is in this file or in "
            f"{first.where}, not in both; download the two again"
        )
    for name, tensor in first.tensors.items():
        new = other.tensors[name]
        if (tensor.shape, tensor.dtype) != (new.shape, new.dtype):
            raise InputError(
                f"tensor {name!r} in {other.where}: it is {new.dtype.name}{list(new.shape)}, and "
                f"{tensor.dtype.name}{list(tensor.shape)} in {first.where}; download the two again"
            )
        if split_dim(name, tensor) is None and not equal(first, name, other, name):
            raise InputError(
                f"tensor {name!r} in {other.where}: it differs from that in {first.where}, though "
                "every rank has all of it; download the two again"
            )


def equal(source: Source, name: str, other: Source, other_name: str) -> bool:
    """Whether two tensors have the same bytes; reads until they differ."""
    tensor, new = source.tensors[name], other.tensors[other_name]
    if (tensor.shape, tensor.dtype) != (new.shape, new.dtype):
        return False
    for rows in slabs(tensor) if tensor.shape else [ALL]:
        values, others = source.read(name, rows), other.read(other_name, rows)
        if not np.array_equal(as_bytes(values), as_bytes(others)):
            return False
        source.release()
        other.release()
    return True


def shard(source: Source, rank: int, ranks: int) -> Source:
    """What the file of one rank has of whole tensors. InputError if a tensor has no even parts."""
    if ranks == 1:
        return source
    dims = {name: split_dim(name, tensor) for name, tensor in source.tensors.items()}
    tensors = {}
    for name, tensor in source.tensors.items():
        dim = dims[name]
        if dim is not None and tensor.shape[dim] % (ranks * (1 if dim else tensor.step)):
            raise InputError(
                f"{ranks} ranks: tensor {name!r} of shape {list(tensor.shape)} has no {ranks} "
                "even parts; choose a smaller number"
            )
        tensors[name] = _resized(tensor, dim, lambda size: size // ranks)

    def read(name: str, rows: slice) -> np.ndarray:
        dim, shape = dims[name], tensors[name].shape
        if dim is None:
            return source.read(name, rows)
        begin, end, _ = rows.indices(shape[0])
        if dim == 0:
            return source.read(name, slice(rank * shape[0] + begin, rank * shape[0] + end))
        columns = slice(rank * shape[1], (rank + 1) * shape[1])
        return _read_columns(source, name, (begin, end), columns, ranks)

    return Source(source.where, tensors, read, source.release)


def _read_columns(
    source: Source, name: str, rows: tuple[int, int], columns: slice, ranks: int
) -> np.ndarray:
    """A few rows at a time: whole ones are `ranks` times as large as what is asked for."""
    begin, end = rows
    tensor = source.tensors[name]
    result = np.empty((end - begin, columns.stop - columns.start), tensor.dtype)
    size = max(1, (end - begin) // (ranks * tensor.step)) * tensor.step
    for row in range(begin, end, size):
        piece = slice(row, min(row + size, end))
        result[row - begin : piece.stop - begin] = source.read(name, piece)[:, columns]
    return result
