"""GGUF files made odd by their grammar: counts, kinds, lengths, values, offsets."""

import struct
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.checkpoint_tests.fuzzing import odd_bytes, odd_json

STRING, ARRAY = 8, 9
LAYOUTS = {
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
ALIGNMENT = 32


@dataclass
class Parts:
    """A file taken apart. `raw` has what is written in place of a key's kind and value."""

    version: int = 3
    keys: list[tuple[str, int, Any]] = field(default_factory=list)
    tensors: list[tuple[str, list[int], int, int]] = field(default_factory=list)
    data: bytes = b""
    counts: tuple[int, int] = (0, 0)  # added to the true ones
    raw: dict[str, bytes] = field(default_factory=dict)


class _Reader:
    def __init__(self, content: bytes):
        self.content, self.at = content, 0

    def scalar(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self.content, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        self.at += size
        return self.content[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            return inner, [self.value(inner) for _ in range(count)]
        return self.string() if kind == STRING else self.scalar(LAYOUTS[kind])


def taken_apart(content: bytes) -> Parts:
    reader = _Reader(content)
    assert reader.scalar("I") == int.from_bytes(b"GGUF", "little")
    version, num_tensors, num_keys = reader.scalar("I"), reader.scalar("Q"), reader.scalar("Q")
    keys = []
    for _ in range(num_keys):
        name, kind = reader.string(), reader.scalar("I")
        keys.append((name, kind, reader.value(kind)))
    tensors = []
    for _ in range(num_tensors):
        name = reader.string()
        shape = [reader.scalar("Q") for _ in range(reader.scalar("I"))]
        tensors.append((name, shape, reader.scalar("I"), reader.scalar("Q")))
    begin = -(-reader.at // ALIGNMENT) * ALIGNMENT
    return Parts(version, keys, tensors, content[begin:])


def _string(text: str) -> bytes:
    content = text.encode(errors="replace")
    return len(content).to_bytes(8, "little") + content


def _value(kind: int, value: Any) -> bytes:
    if kind == ARRAY:
        inner, items = value if isinstance(value, tuple) else (4, [value])
        head = struct.pack("<IQ", inner, len(items))
        return head + b"".join(_value(inner, item) for item in items)
    if kind == STRING:
        return _string(str(value))
    try:
        return struct.pack(f"<{LAYOUTS.get(kind, 'Q')}", value)
    except (struct.error, OverflowError, TypeError):
        return b"\xff" * struct.calcsize(f"<{LAYOUTS.get(kind, 'Q')}")


def _word(number: int) -> bytes:
    return (int(number) % 2**64).to_bytes(8, "little")


def together(parts: Parts) -> bytes:
    counts = len(parts.tensors) + parts.counts[0], len(parts.keys) + parts.counts[1]
    head = b"GGUF" + parts.version.to_bytes(4, "little") + _word(counts[0]) + _word(counts[1])
    for name, kind, value in parts.keys:
        plain = struct.pack("<I", kind % 2**32) + _value(kind, value)
        head += _string(name) + parts.raw.get(name, plain)
    for name, shape, kind, offset in parts.tensors:
        head += _string(name) + struct.pack("<I", len(shape)) + b"".join(map(_word, shape))
        head += struct.pack("<I", kind % 2**32) + _word(offset)
    return head + b"\0" * (-len(head) % ALIGNMENT) + parts.data


def mutated(content: bytes, random: Random, prefix: str = "") -> bytes:
    """`prefix` is that of the keys to change, by preference."""
    if random.random() < 0.08:
        return odd_bytes.mutated(content, random, within=random.choice([32, 20_000, len(content)]))
    parts = taken_apart(content)
    for _ in range(random.choice([1, 1, 2, 3])):
        if random.random() < (0.8 if prefix else 0.5):
            _change_key(parts, random, prefix)
        else:
            _change_tensor(parts, random)
    if random.random() < 0.04:
        parts.counts = random.choice([(1, 0), (0, 1), (-1, 0), (0, -1), (2**40, 0), (0, 2**40)])
    if random.random() < 0.02:
        parts.version = random.choice([0, 1, 2, 4, 3 << 24])
    return together(parts)


def _change_key(parts: Parts, random: Random, prefix: str) -> None:
    at = [i for i, (name, *_) in enumerate(parts.keys) if name.startswith(prefix)]
    if not at:
        return
    place = random.choice(at)
    name, kind, value = parts.keys[place]
    match random.randrange(9):
        case 0:
            del parts.keys[place]
        case 1:
            parts.keys.insert(random.randrange(len(parts.keys) + 1), parts.keys[place])
        case 2:
            parts.keys[place] = (odd_json.odd_key(name, random), kind, value)
        case 3:
            parts.keys[place] = (name, random.choice([*range(14), 2**32 - 1]), value)
        case 4:
            parts.raw[name] = _raw_value(random)
        case 5 | 6 if kind == ARRAY and isinstance(value, tuple):
            parts.keys[place] = (name, kind, _other_items(*value, random))
        case 7:
            known = ("general.alignment", 4, random.choice([0, 1, 8, 64, 2**20, 2**31]))
            split = ("split.count", 2, random.choice([0, 1, 2]))
            vocab = ("llama.vocab_size", 4, random.choice([1, 511, 512, 2**31]))
            experts = ("llama.expert_count", 4, random.choice([0, 8]))
            parts.keys.append(random.choice([known, split, vocab, experts]))
        case _ if kind != ARRAY:
            parts.keys[place] = (name, kind, _scalar(value, random))


def _scalar(old: Any, random: Random) -> Any:
    new = odd_json.odd_value(old, random)
    return odd_json.RAW.get(new, new) if isinstance(new, str) else new


def _other_items(inner: int, items: list[Any], random: Random) -> tuple[int, list[Any]]:
    changed = list(items)
    at = random.randrange(len(changed) + 1)
    match random.randrange(6):
        case 0:
            return inner, changed[:at]
        case 1:
            return inner, changed + changed[:at]
        case 2:
            return random.choice([*LAYOUTS, ARRAY]), [1] * random.choice([0, 1, 10])
        case 3:
            return inner, []
        case 4 if changed:
            changed[at - 1] = changed[random.randrange(len(changed))]
        case _ if changed:
            changed[at - 1] = _scalar(changed[at - 1], random)
    return inner, changed


def _raw_value(random: Random) -> bytes:
    """Claims of lengths that nothing backs, and arrays in arrays in arrays."""
    count = random.choice([0, 1, 2**16, 2**21, 2**21 + 1, 2**32, 2**60, 2**64 - 1])
    nested = struct.pack("<IQ", ARRAY, 1) * random.choice([1, 2, 5000])
    return random.choice([
        struct.pack("<IQ", STRING, count),
        struct.pack("<IIQ", ARRAY, random.choice([0, 4, 8, 9, 10]), count),
        struct.pack("<I", ARRAY) + nested + struct.pack("<IQ", 4, 0),
        struct.pack("<IIQ", ARRAY, STRING, 3) + b"\0" * 24,
        struct.pack("<IQ", STRING, 2) + b"\xff\xfe",
    ])  # fmt: skip


def _change_tensor(parts: Parts, random: Random) -> None:
    if not parts.tensors:
        return
    place = random.randrange(len(parts.tensors))
    name, shape, kind, offset = parts.tensors[place]
    match random.randrange(9):
        case 0:
            del parts.tensors[place]
        case 1:
            parts.tensors.append(parts.tensors[place])
        case 2:
            name = odd_json.odd_key(name, random)
        case 3:
            kind = random.choice([*range(45), 2**32 - 1])
        case 4:
            offset += random.choice([-32, -1, 1, 4, 32, 2**40, 2**63])
        case 5:
            offset = random.choice(parts.tensors)[3]
        case 6:
            shape = random.choice(
                [shape[::-1], [*shape, 1], [1, *shape], [], [0], [1] * 5, [2**32] * 2]
            )
        case 7 if shape:
            at = random.randrange(len(shape))
            shape = [
                *shape[:at],
                random.choice([0, 1, shape[at] * 2, shape[at] + 1, 2**63]),
                *shape[at + 1 :],
            ]
        case 8:
            parts.data = parts.data[: random.randrange(len(parts.data) + 1)]
    if place < len(parts.tensors):
        parts.tensors[place] = (name, shape, kind, offset)
