"""Which records are near-duplicates of earlier ones, found band by band.

The keys of all bands are cut into parts that are worked on alone, so that any runner will do: a
part groups equal keys by sorting. Records are told by number, and the first in that order stays.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8

from l32jax.data.prepare.config import Duplicates
from l32jax.data.prepare.signatures import similar

BAND = np.dtype([("key", "<u8"), ("row", "<u4")])
# Different records under one key to compare with; a key of more tells nothing.
MAX_FIRST = 1024


def part_of_keys(bands: np.ndarray, part: int, parts: int) -> np.ndarray:
    """Of bands sorted by key, those whose key lies in that part of all keys."""
    bounds = [(1 << 64) * i // parts for i in (part, part + 1)]
    start = np.searchsorted(bands["key"], np.uint64(bounds[0]))
    stop = len(bands) if part + 1 == parts else np.searchsorted(bands["key"], np.uint64(bounds[1]))
    return bands[start:stop]


def groups(keys: np.ndarray, numbers: np.ndarray) -> Iterator[np.ndarray]:
    """Where in `keys` the records of each key stand, by their numbers, if there are several."""
    order = np.lexsort((numbers, keys))
    ends = np.flatnonzero(np.diff(keys[order])) + 1
    for start, stop in zip([0, *ends], [*ends, len(order)], strict=True):
        if stop - start > 1:
            yield order[start:stop]


def later_ones(checks: UInt8[np.ndarray, "n byte"], rules: Duplicates) -> Sequence[int]:
    """Of records in order, those that are similar to one before that is not so itself."""
    first, later = [0], []
    for index in range(1, len(checks)):
        if similar(checks[index], checks[first], rules):
            later.append(index)
        elif len(first) < MAX_FIRST:
            first.append(index)
    return later
