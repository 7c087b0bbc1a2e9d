"""A file mapped into memory, whose pages do not stay this process's memory."""

import mmap
import os
from pathlib import Path

import numpy as np


class Mapped:
    """`content` is every byte of the file, read only, and read when touched."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            # An empty file cannot be mapped.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else None
        self.content = np.frombuffer(self._map or b"", np.uint8)

    def release(self) -> None:
        """Lets go of the pages that were touched; they are read again when they are again.

        They stay in the system's cache. Safe while other threads read.
        """
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
