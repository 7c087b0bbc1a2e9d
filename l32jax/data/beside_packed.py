"""What is beside targets as bytes of a record: only of tokens that are learned, in few bits.

Log-probabilities are float32, bfloat16, or a byte each, in 255 steps between the least and the
greatest of a token's words. Words take three bytes.
"""

from collections.abc import Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Int32, UInt8

from l32jax.data.beside import DTYPES
from l32jax.data.samples import Document

LogKind = Literal["float32", "bfloat16", "int8"]
WORDS, LOGS = "teacher_words", "teacher_logs"
STEPS = 255


def packed(document: Document, logs: LogKind) -> dict[str, list[Any]]:
    """By name: how it is packed, its shape for one token, and the bytes."""
    learned = np.asarray(document.weights) > 0
    found = {name: array[learned] for name, array in document.beside.items()}
    return {name: _packed(name, array, logs) for name, array in found.items()}


def unpacked(
    content: Mapping[str, list[Any]], weights: Float32[np.ndarray, "t"]
) -> dict[str, np.ndarray]:
    """`Document.beside` again, with zeros where nothing is learned; ValueError if it is none."""
    learned = weights > 0
    found = {}
    for name, (kind, shape, data) in content.items():
        if name not in DTYPES or kind not in _UNPACKED or len(shape) > 1:
            raise ValueError(f"{name!r:.40} in {kind!r:.40}")
        values = _UNPACKED[kind](data, int(learned.sum()), *shape)
        array = np.zeros((len(weights), *values.shape[1:]), DTYPES[name])
        array[learned] = values
        found[name] = array
    return found


def _packed(name: str, array: np.ndarray, logs: LogKind) -> list[Any]:
    shape = list(array.shape[1:])
    if name == WORDS:
        return ["words", shape, array.astype("<i4")[..., None].view("u1")[..., :3].tobytes()]
    if name != LOGS or logs == "float32":
        return ["float32", shape, array.astype("<f4").tobytes()]
    if logs == "bfloat16":
        return ["bfloat16", shape, array.astype(ml_dtypes.bfloat16).tobytes()]
    low = array.min(axis=-1, keepdims=True, initial=np.inf)
    high = array.max(axis=-1, keepdims=True, initial=-np.inf)
    step = np.maximum(high - low, np.finfo(np.float32).tiny) / STEPS
    codes = np.round((array - low) / step).astype("u1")
    bounds = np.stack([low, high]).astype("<f4")
    return ["int8", shape, bounds.tobytes() + codes.tobytes()]


def _words(data: bytes, count: int, *shape: int) -> Int32[np.ndarray, "n *w"]:
    low: UInt8[np.ndarray, "n w 3"] = np.frombuffer(data, "u1").reshape(count, *shape, 3)
    whole = np.zeros((count, *shape, 4), "u1")
    whole[..., :3] = low
    return whole.view("<i4")[..., 0]


def _float32(data: bytes, count: int, *shape: int) -> np.ndarray:
    return np.frombuffer(data, "<f4").reshape(count, *shape)


def _bfloat16(data: bytes, count: int, *shape: int) -> np.ndarray:
    return np.frombuffer(data, ml_dtypes.bfloat16).reshape(count, *shape).astype(np.float32)


def _int8(data: bytes, count: int, *shape: int) -> np.ndarray:
    low, high = np.frombuffer(data[: 8 * count], "<f4").reshape(2, count, 1)
    codes = np.frombuffer(data[8 * count :], "u1").reshape(count, *shape)
    return low + codes * ((high - low) / STEPS)


_UNPACKED = {"words": _words, "float32": _float32, "bfloat16": _bfloat16, "int8": _int8}
