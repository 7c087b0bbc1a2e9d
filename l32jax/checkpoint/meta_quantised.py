"""Meta's quantised 1B and 3B: int4 in groups, with adapters (QLoRA) or rotations (SpinQuant).

Rows are dequantised as they are read, into what the model computes with float32 weights. Not kept
is that the releases also round activations, to int8 a token.

Formats: llama-models `llama3/quantization/loader.py`; rotations: ExecuTorch's `spin_quant.py`.
"""

import math
from typing import NamedTuple, NoReturn

import numpy as np

from l32jax.checkpoint.engine.slices import ALL
from l32jax.checkpoint.engine.sources import Source, Tensor
from l32jax.checkpoint.fields import Fields
from l32jax.errors import InputError

SCALES, ZEROS = "scales", "zeros"
ADAPTOR_A, ADAPTOR_B = "adaptor.A.weight", "adaptor.B.weight"
ROTATED = "feed_forward.w2."


class Scheme(NamedTuple):
    """How a checkpoint is quantised.

    adaptor: rank and scale of a low-rank matrix beside every one of a block; None without.
    rotated: whether the input of the MLP's second matrix is rotated before it is quantised.
    """

    adaptor: tuple[int, float] | None
    rotated: bool


def scheme(fields: Fields) -> Scheme | None:
    """What params.json says of it; None for a checkpoint that is not quantised."""
    quantisation, adaptor = fields.get("quantization_args"), fields.get("lora_args")
    if quantisation is None:
        fields.only("lora_args", None)
        return None
    args = Fields(quantisation, f"{fields.where}, quantization_args")
    args.only("scheme", "int4_weight_int8_dynamic_activation")
    args.only("spinquant", True, False)
    args.get("group_size")  # llama-models says 256 of files with groups of 32: `scales` know better
    args.close()
    if adaptor is None:  # of the two schemes that were released it is the other
        return Scheme(None, rotated=args.get("spinquant") is not False)
    lora = Fields(adaptor, f"{fields.where}, lora_args")
    size = (lora.size("rank"), lora.number("scale"))
    lora.close()
    return Scheme(size, rotated=args.get("spinquant") is True)


def dequantised(source: Source, scheme: Scheme) -> Source:
    """The same tensors in float32 where they were quantised, with adaptors and rotations merged.

    InputError if a part of a quantised matrix is missing or has another shape than it needs.
    """
    prefixes = [name.removesuffix(SCALES) for name in source.tensors if name.endswith(f".{SCALES}")]
    matrices = {f"{prefix}weight": _Matrix(source, prefix, scheme) for prefix in prefixes}
    parts = {f"{prefix}{part}" for prefix in prefixes for part in (SCALES, ZEROS)}
    parts |= {name for matrix in matrices.values() for name in matrix.adaptor_names}
    tensors = {
        name: Tensor(tensor.shape, np.dtype(np.float32)) if name in matrices else tensor
        for name, tensor in source.tensors.items()
        if name not in parts
    }

    def read(name: str, rows: slice) -> np.ndarray:
        return matrices[name].read(rows) if name in matrices else source.read(name, rows)

    return Source(source.where, tensors, read, source.release)


class _Matrix:
    """A quantised matrix of [outs, ins], by rows.

    Its parts: weight [outs, ins] int8; scales, and maybe zeros, [outs] or [outs, groups], of runs
    of ins; in blocks, if the scheme has adaptors, A [rank, ins] and B [outs, rank].
    """

    def __init__(self, source: Source, prefix: str, scheme: Scheme):
        self._source, self._prefix = source, prefix
        self._rotated = scheme.rotated and prefix.endswith(ROTATED)
        in_block = not prefix.endswith(("tok_embeddings.", "output."))
        self._adaptor = scheme.adaptor if in_block else None
        self._has_zeros = f"{prefix}{ZEROS}" in source.tensors
        self._num_groups = self._check()

    @property
    def adaptor_names(self) -> list[str]:
        parts = (ADAPTOR_A, ADAPTOR_B) if self._adaptor else ()
        return [self._prefix + part for part in parts]

    def read(self, rows: slice) -> np.ndarray:
        values = self._read("weight", rows)
        count, width = values.shape
        groups = values.reshape(count, self._num_groups, width // self._num_groups)
        if self._has_zeros:
            groups -= self._read(ZEROS, rows).reshape(count, self._num_groups, 1)
        groups *= self._read(SCALES, rows).reshape(count, self._num_groups, 1)
        if self._adaptor:
            values += self._adaptor[1] * (self._read(ADAPTOR_B, rows) @ self._read(ADAPTOR_A, ALL))
        return rotated(values) if self._rotated else values

    def _read(self, part: str, rows: slice) -> np.ndarray:
        return self._source.read(self._prefix + part, rows).astype(np.float32)

    def _check(self) -> int:
        """The number of groups in a row. InputError unless the parts fit together."""
        weight, scales = self._tensor("weight"), self._tensor(SCALES)
        if weight.dtype != np.int8 or len(weight.shape) != 2:
            self._refuse("weight", "int8 of two dimensions")
        outs, ins = weight.shape
        num_groups = math.prod(scales.shape[1:])
        if (
            scales.shape[:1] != (outs,)
            or len(scales.shape) > 2
            or not num_groups
            or ins % num_groups
        ):
            self._refuse(SCALES, f"a number for equal parts of each of {outs} rows of {ins}")
        wanted = {ZEROS: scales.shape} if self._has_zeros else {}
        if self._adaptor:
            wanted |= {ADAPTOR_A: (self._adaptor[0], ins), ADAPTOR_B: (outs, self._adaptor[0])}
        for part, shape in wanted.items():
            if self._tensor(part).shape != shape:
                self._refuse(part, f"the shape {list(shape)}")
        if self._rotated and ins & (ins - 1):
            self._refuse("weight", "a power of two of columns, as only those can be rotated")
        return num_groups

    def _tensor(self, part: str) -> Tensor:
        name = self._prefix + part
        if name not in self._source.tensors:
            raise InputError(
                f"weights in {self._source.where}: tensor {name!r} is missing, a part of a "
                "quantised matrix; download the file again"
            )
        return self._source.tensors[name]

    def _refuse(self, part: str, expected: str) -> NoReturn:
        tensor = self._tensor(part)
        raise InputError(
            f"tensor {self._prefix + part!r} in {self._source.where}: it is "
            f"{tensor.dtype.name}{list(tensor.shape)}, expected {expected}; download the file again"
        )


def rotated(values: np.ndarray) -> np.ndarray:
    """Rows times Sylvester's Hadamard matrix H, over the root of its size (a power of two).

    H is symmetric and its own inverse then: a model that multiplies its activations by H, and by
    these weights, is the one that has the rotated weights alone. The order of its rows is the
    natural one, H[i, j] = (-1) ** popcount(i & j), which ExecuTorch's kernel has too. As
    H of a * b is the Kronecker product of those of a and b, two small products do.
    """
    size = values.shape[-1]
    small = 1 << (size.bit_length() // 2)
    large = size // small
    table = (values.reshape(-1, small) @ _sylvester(small)).reshape(-1, large, small)
    table = table.swapaxes(1, 2).reshape(-1, large) @ _sylvester(large)
    table /= np.float32(math.sqrt(size))
    return table.reshape(-1, small, large).swapaxes(1, 2).reshape(values.shape)


def _sylvester(size: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
