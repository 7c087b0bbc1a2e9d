"""Parquet files: a record a row, with images in the file, or in files beside it.

A row is read with all of its row group: in order that costs nothing, at random as much as the
group is long. Damage is noticed where pages have checksums, or else if it makes no sense.
"""

from typing import Any

import numpy as np

from l32jax.data.files import File
from l32jax.data.records import Bad, Record
from l32jax.data.sources.columns import (
    Damaged,
    known_fields,
    pyarrow_module,
    reading,
    record_of_row,
)
from l32jax.data.sources.recent import Recent
from l32jax.errors import InputError

MAX_GROUP_BYTES = 4 << 30
# Row groups of this process, whichever sources they are of.
GROUPS = Recent(1 << 30)


class ParquetRows:
    """The rows of a file; of its columns those that are fields of records."""

    def __init__(self, file: File):
        self._file = file
        try:
            opened = _open(file)
            with reading(file):
                columns = opened.schema_arrow.names
        except Damaged as error:
            raise InputError(
                f"source {file.where}: not a whole Parquet file ({error}); copy it again"
            ) from None
        self._columns = known_fields(columns, file)
        self._ends = np.cumsum(_group_sizes(opened.metadata, file), dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, number: int) -> Record | Bad:
        place = f"{self._file.name} row {number}"
        group = int(np.searchsorted(self._ends, number, side="right"))
        begin = int(self._ends[group - 1]) if group else 0
        try:
            rows = GROUPS.get((self._file, group), lambda: self._decode(group))
            if len(rows) != self._ends[group] - begin:
                return Bad(place, "damaged: its row group has another number of rows")
            return record_of_row(rows, number - begin, self._file, place)
        except Damaged as error:
            return Bad(place, f"damaged ({error})")

    def _decode(self, group: int) -> Any:
        with reading(self._file):
            return _open(self._file).read_row_group(group, columns=self._columns)


def _open(file: File) -> Any:
    with reading(file):
        return pyarrow_module("pyarrow.parquet").ParquetFile(
            file.for_arrow(), page_checksum_verification=True
        )


def _group_sizes(metadata: Any, file: File) -> list[int]:
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    sizes = [group.num_rows for group in groups]
    if not sum(sizes) or min(sizes) < 0:
        raise InputError(f"source {file.where}: it has no rows; check the path")
    if (largest := max(group.total_byte_size for group in groups)) > MAX_GROUP_BYTES:
        raise InputError(
            f"source {file.where}: a row group of {largest} bytes, of which at most "
            f"{MAX_GROUP_BYTES} are read at once; write smaller ones"
        )
    return sizes
