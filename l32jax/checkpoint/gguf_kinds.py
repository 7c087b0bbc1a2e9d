"""How GGUF packs the numbers of a tensor: 16 and 32-bit floats, and blocks of quantised ones.

Blocks are the business of the package `gguf`, which is asked only if a tensor has some. It unpacks
Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S,
IQ3_XXS, IQ3_S, IQ4_NL, IQ4_XS, TQ1_0, TQ2_0, MXFP4 and NVFP4 (0.19).
"""

import importlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from l32jax.errors import InputError

# The largest numbers that can be packed: the scales of blocks are float16.
LARGEST = {
    "F16": 65504.0,
    "BF16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).max),
    "Q8_0": 127 * 65504.0,
    "Q4_0": 8 * 65504.0,
}


class Kind(NamedTuple):
    """A way to pack: `block` neighbours in a row become `size` bytes; `number` is ggml's.

    `dtype` is that of the values unpacked.
    """

    number: int
    name: str
    dtype: np.dtype
    block: int
    size: int

    def nbytes(self, shape: Sequence[int]) -> int:
        return math.prod(shape) // self.block * self.size

    def unpack(self, stored: np.ndarray) -> np.ndarray:
        """Values of bytes, both with the same leading dims; of floats a view."""
        if self.number in FLOATS:
            return stored.view(self.dtype)
        quants = _package()
        return quants.dequantize(stored, quants.GGMLQuantizationType(self.number))

    def pack(self, values: np.ndarray) -> np.ndarray:
        """Whole rows of values as they are stored. InputError if one is too large."""
        if self.number in FLOATS and values.dtype == self.dtype:
            return values
        wide = values.astype(np.float32, copy=False)
        if self.name in LARGEST and max(wide.max(), -wide.min()) > LARGEST[self.name]:
            raise InputError(
                f"a value is larger than {LARGEST[self.name]:g}, the largest that {self.name} "
                "holds; write F32 or BF16"
            )
        if self.number in FLOATS:
            return wide.astype(self.dtype, copy=False)
        quants = _package()
        return quants.quantize(wide, quants.GGMLQuantizationType(self.number))


F32 = Kind(0, "F32", np.dtype(np.float32), 1, 4)
F16 = Kind(1, "F16", np.dtype(np.float16), 1, 2)
BF16 = Kind(30, "BF16", np.dtype(ml_dtypes.bfloat16), 1, 2)
FLOATS = {kind.number: kind for kind in (F32, F16, BF16)}


def numbered(number: int) -> Kind:
    """ValueError if it cannot be unpacked; InputError if the package for that is missing."""
    if number in FLOATS:
        return FLOATS[number]
    quants = _package()
    try:
        kind = quants.GGMLQuantizationType(number)
        block, size = quants.GGML_QUANT_SIZES[kind]
        quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"numbers packed as kind {number} are not read ({error})") from None
    return Kind(number, kind.name, np.dtype(np.float32), block, size)


def named(name: str) -> Kind:
    """By ggml's name, which must be one."""
    for kind in FLOATS.values():
        if kind.name == name:
            return kind
    return numbered(_package().GGMLQuantizationType[name])


def _package() -> Any:
    try:
        return importlib.import_module("gguf.quants")
    except ImportError:
        raise InputError(
            "quantised weights in a GGUF file: they need the package gguf; "
            "pip install 'l32jax[gguf]'"
        ) from None
