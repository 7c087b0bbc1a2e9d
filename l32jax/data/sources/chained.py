"""Sources of several parts, and what a part is."""

import operator
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from l32jax.data.records import Bad, Record


@runtime_checkable
class Part(Protocol):
    """Records by number; safe in threads and picklable. Only what is opened may be wrong."""

    def __len__(self) -> int: ...

    def read(self, number: int) -> Record | Bad:
        """The record of a number from 0; what is wrong with it is Bad, not raised."""
        ...


class Chained(Sequence[Record | Bad]):
    """The records of all parts, one part after the other."""

    def __init__(self, parts: Sequence[Part]):
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index):
        number = operator.index(index)
        number += len(self) if number < 0 else 0
        if not 0 <= number < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, number, side="right"))
        begin = int(self._ends[part - 1]) if part else 0
        return self._parts[part].read(number - begin)
