"""Safetensors files made odd: mostly well-formed, so that more than the first check is reached."""

import json
from random import Random
from typing import Any

from tests.checkpoint_tests.fuzzing import odd_bytes, odd_json

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2} | {
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F4": 1,
}  # fmt: skip


def mutated(content: bytes, random: Random) -> bytes:
    if random.random() < 0.1:
        return odd_bytes.mutated(content, random, within=random.choice([16, len(content)]))
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    for _ in range(random.choice([1, 1, 2, 3])):
        header, data = _change(header, data, random)
    text = odd_json.text_of(header, random)
    if random.random() < 0.05:
        text = text.ljust(random.choice([len(text) + 1, 5000, 1_000_000]))
    length = len(text) + (random.choice([-1, 1, 8, 2**40, 2**63]) if random.random() < 0.03 else 0)
    return max(length, 0).to_bytes(8, "little") + text + data


def _change(header: Any, data: bytes, random: Random) -> tuple[Any, bytes]:
    names = [name for name in header if name != "__metadata__"] if isinstance(header, dict) else []
    entries = [name for name in names if isinstance(header[name], dict)]
    if not entries:
        return odd_json.mutated(header, random), data
    name = random.choice(entries)
    match random.randrange(8):
        case 0:
            return header | {name: _other_dtype(header[name], random)}, data
        case 1:
            return header | {name: _other_shape(header[name], random)}, data
        case 2:
            return _overlapping(header, name, random.choice(entries)), data
        case 3 if "__metadata__" in header:
            return header | {"__metadata__": _metadata(header["__metadata__"], random)}, data
        case 4:
            changed = dict(header)
            changed[odd_json.odd_key(name, random)] = changed.pop(name)
            return changed, data
        case 5:
            return header, data[: random.randrange(len(data) + 1)]
        case 6:
            return header | {name: odd_json.mutated(header[name], random)}, data
    return odd_json.mutated(header, random), data


def _other_dtype(entry: dict[str, Any], random: Random) -> dict[str, Any]:
    """Mostly with the shape that has the same number of bytes."""
    dtype = random.choice(list(SIZES))
    try:
        begin, end = entry["data_offsets"]
        *rest, last = entry["shape"] or [1]
        last = last * SIZES[entry["dtype"]] // SIZES[dtype]
        return {"dtype": dtype, "shape": [*rest, last], "data_offsets": [begin, end]}
    except (KeyError, TypeError, ValueError):
        return entry | {"dtype": dtype}


def _other_shape(entry: dict[str, Any], random: Random) -> dict[str, Any]:
    """The same numbers in other dimensions."""
    shape = entry.get("shape")
    if not isinstance(shape, list):
        return entry
    flat = 1
    for size in shape:
        flat = flat * size if isinstance(size, int) and abs(size) < 2**20 else flat
    choices = [
        shape[::-1],
        [flat],
        [1, *shape],
        [*shape, 1],
        [flat, 1],
        [0, *shape],
        [2**32, 2**32],
    ]
    return entry | {"shape": random.choice([*choices, [1] * 100 + shape])}


def _overlapping(header: dict[str, Any], name: str, other: str) -> dict[str, Any]:
    offsets = header[other].get("data_offsets")
    return header | {name: header[name] | {"data_offsets": offsets}}


def _metadata(metadata: Any, random: Random) -> Any:
    """What is said beside the tensors; ours has JSON in a string."""
    if not isinstance(metadata, dict):
        return odd_json.odd_value(metadata, random)
    for key, text in metadata.items():
        if isinstance(text, str) and text.startswith("{") and random.random() < 0.9:
            try:
                changed = odd_json.mutated_text(text.encode(), random)
            except (ValueError, RecursionError):  # it was made odd before
                continue
            return metadata | {key: changed.decode(errors="replace")}
    return odd_json.mutated(metadata, random)
