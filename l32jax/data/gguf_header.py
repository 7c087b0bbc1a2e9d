"""The key-value header of a GGUF file, from bytes, within bounds.

The `gguf` package reads the same, but it takes seconds for a real vocabulary (an array object per
string), and a header of a hundred bytes that claims 2**40 elements keeps it busy for ever.
"""

import struct
from typing import Any

STRING, ARRAY = 8, 9
MAX_ELEMENTS = 1 << 21  # of an array: seven times the merges of Llama 3
# GGUF's numbering of scalar types; little-endian, as all published files are
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


def read_header(data: bytes, *, prefix: str) -> dict[str, Any]:
    """The entries whose key starts with `prefix`; ValueError if `data` holds no whole header."""
    cursor = _Cursor(data)
    magic, version, _tensors, count = cursor.unpack("<4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("it is not a little-endian GGUF file of version 2 or 3")
    entries = {}
    for _ in range(count):  # each entry takes bytes, so a false count ends in `unpack`
        key, kind = cursor.string(), cursor.unpack("<I")[0]
        value = cursor.value(kind)
        if key.startswith(prefix):
            entries[key] = value
    return entries


class _Cursor:
    """Walks over the bytes; a claimed length allocates nothing that the file does not hold."""

    def __init__(self, data: bytes):
        self.data, self.offset = data, 0

    def unpack(self, layout: str) -> tuple[Any, ...]:
        try:
            values = struct.unpack_from(layout, self.data, self.offset)
        except struct.error as error:
            raise ValueError("its header is cut short") from error
        self.offset += struct.calcsize(layout)
        return values

    def string(self) -> str:
        (length,) = self.unpack("<Q")
        if length > len(self.data) - self.offset:
            raise ValueError("its header is cut short")
        start, self.offset = self.offset, self.offset + length
        return self.data[start : self.offset].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(*self.unpack("<IQ"))
        if kind not in SCALARS:
            raise ValueError(f"its header has a value of the unknown type {kind}")
        return self.unpack("<" + SCALARS[kind])[0]

    def array(self, kind: int, length: int) -> list[Any]:
        if length > MAX_ELEMENTS:
            raise ValueError(f"its header has an array of {length} elements")
        if kind == STRING:
            return [self.string() for _ in range(length)]
        if kind not in SCALARS:
            raise ValueError(f"its header has an array of the type {kind}")
        return list(self.unpack(f"<{length}{SCALARS[kind]}"))
