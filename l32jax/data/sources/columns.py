"""What Parquet and Arrow files have in common: columns, and pyarrow's ways to fail."""

import contextlib
import functools
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from l32jax.data.files import File, is_remote, read_beside
from l32jax.data.images import MAX_BYTES
from l32jax.data.records import Bad, Record
from l32jax.data.sources.fields import FIELDS, make_record
from l32jax.errors import InputError, one_line

TROUBLE = ("AWS Error", "google::cloud", "curl")  # of buckets, in what pyarrow says of it


class Damaged(ValueError):
    """What pyarrow finds wrong with a file."""


def pyarrow_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(
            "Parquet and Arrow in this Python: the package pyarrow is not installed; "
            "run pip install 'l32jax[data]'"
        ) from None


@contextlib.contextmanager
def reading(file: File) -> Iterator[None]:
    """Damaged, for what the content makes pyarrow raise; OSError, for a bucket out of reach."""
    errors = (
        pyarrow_module("pyarrow").ArrowException,
        *(OSError, ValueError, KeyError, IndexError, TypeError, MemoryError, OverflowError),
    )
    try:
        yield
    except errors as error:
        if is_remote(file.where) and any(word in str(error) for word in TROUBLE):
            raise OSError(f"source {file.where}: it cannot be read ({one_line(error)})") from error
        raise Damaged(one_line(error)) from None


def known_fields(columns: Sequence[str], file: File) -> list[str]:
    """The columns that are fields of records; InputError if none is."""
    known = [name for name in FIELDS if name in columns]
    if not known:
        raise InputError(
            f"source {file.where}: none of its columns, {', '.join(columns)[:200]}, is a field of "
            f"records; rename them to {', '.join(FIELDS)}"
        )
    return known


def record_of_row(rows: Any, number: int, file: File, place: str) -> Record | Bad:
    """Of a table or batch."""
    with reading(file):
        (fields,) = rows.slice(number, 1).to_pylist()
    find = functools.partial(read_beside, file.folder, at_most=MAX_BYTES)
    return make_record(fields, place, find)
