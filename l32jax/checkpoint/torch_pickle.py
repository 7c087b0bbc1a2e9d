"""The pickle in a .pth file, read and written without Python's `pickle`, torch or any execution.

A state dict needs a score of the pickle machine's instructions. Those are carried out here on plain
values; the others, and every name but torch's own, are refused. So a file cannot have anything
imported or called, and what it can cost in memory is bounded by its length.
"""

import math
import pickle
import pickletools
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from l32jax.checkpoint.engine.slices import Shape
from l32jax.checkpoint.engine.sources import Tensor
from l32jax.errors import InputError

MAX_BYTES = 2 << 20  # of some 10,000 tensors; 90B has 1,495
MAX_DIMS, MAX_SIZE, MAX_NAME = 8, 1 << 62, 256
STORAGES = {
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch HalfStorage": np.dtype(np.float16),
    "torch FloatStorage": np.dtype(np.float32),
    "torch DoubleStorage": np.dtype(np.float64),
    "torch CharStorage": np.dtype(np.int8),
    "torch ShortStorage": np.dtype(np.int16),
    "torch IntStorage": np.dtype(np.int32),
    "torch LongStorage": np.dtype(np.int64),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
}
STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
DICT = "collections OrderedDict"
TENSOR = "torch._utils _rebuild_tensor_v2"
PARAMETER = "torch._utils _rebuild_parameter"
KNOWN = frozenset({*STORAGES, DICT, TENSOR, PARAMETER})

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = frozenset({"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"})
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Global(NamedTuple):
    """A name as the pickle gives it, "module name"; it stays a name."""

    name: str


class Storage(NamedTuple):
    """Consecutive numbers in the file, under the key that the pickle calls them by."""

    key: str
    dtype: np.dtype
    size: int


class View(NamedTuple):
    """A tensor: part of a storage. Offset and strides count numbers, not bytes."""

    storage: Storage
    offset: int
    shape: Shape
    strides: tuple[int, ...]


def read(content: bytes) -> dict[str, View]:
    """The tensors of a state dict by name; that they are inside of their storages is checked.

    ValueError if the pickle is damaged; InputError, without the file's name, if it wants what a
    state dict does not need.
    """
    if len(content) > MAX_BYTES:
        raise InputError(f"its pickle has {len(content)} bytes, at most {MAX_BYTES} are read")
    try:
        result = _Machine().run(content)
    except (IndexError, KeyError, TypeError, UnicodeError) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from error
    if not isinstance(result, dict):
        raise InputError("it is not a dict of tensors by name")
    for name, value in result.items():
        if not isinstance(value, View):
            raise InputError(f"its entry {name!r} is not a tensor")
    return result


class _Machine:
    """A stack, the marks on it, and a memo: what the instructions of a pickle work on."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(content):
            self._step(opcode.name, argument)
        return self.stack.pop()

    def _step(self, opcode: str, argument: Any) -> None:
        match opcode:
            case "PROTO" | "STOP":
                pass
            case "GLOBAL":
                self.stack.append(_known(argument))
            case "MARK":
                self.marks.append(len(self.stack))
            case "EMPTY_DICT":
                self.stack.append({})
            case "TUPLE":
                self.stack.append(tuple(self._since_mark()))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "BINPERSID":
                self.stack.append(_storage(self.stack.pop()))
            case "REDUCE":
                arguments, function = self.stack.pop(), self.stack.pop()
                self.stack.append(_made(function, arguments))
            case "SETITEM":
                self._set_items(self._last(2))
            case "SETITEMS":
                self._set_items(self._since_mark())
            case "BUILD":
                self.stack.pop()  # attributes of an OrderedDict: its `_metadata`
            case _ if opcode in CONSTANTS:
                self.stack.append(CONSTANTS[opcode])
            case _ if opcode in LITERALS:
                self.stack.append(argument)
            case _ if opcode in TUPLES:
                self.stack.append(tuple(self._last(TUPLES[opcode])))
            case _:
                raise InputError(f"its pickle has the instruction {opcode}, which no weights need")

    def _last(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise IndexError
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _since_mark(self) -> list[Any]:
        begin = self.marks.pop()
        values = self.stack[begin:]
        del self.stack[begin:]
        return values

    def _set_items(self, values: list[Any]) -> None:
        """Names only: the hash of nested tuples takes time exponential in their depth."""
        target = self.stack[-1]
        for name, value in zip(values[::2], values[1::2], strict=True):
            if not (isinstance(target, dict) and isinstance(name, str) and len(name) <= MAX_NAME):
                raise InputError("it is not a dict of tensors by name")
            target[name] = value


def _known(name: str) -> Global:
    if name not in KNOWN:
        raise InputError(
            f"its pickle asks for {name.replace(' ', '.')[:80]!r}, which no weights need"
        )
    return Global(name)


def _storage(identity: Any) -> Storage:
    match identity:
        case ("storage", Global(name), str(key), str(), int(size)) if name in STORAGES:
            if _are_sizes((size,)):
                return Storage(key, STORAGES[name], size)
    raise InputError("its pickle refers to something else than a storage")


def _made(function: Any, arguments: Any) -> Any:
    """What a call of one of the known functions gives."""
    match function, arguments:
        case Global(name), () if name == DICT:
            return {}
        case Global(name), (Storage() as storage, offset, shape, strides, *_) if name == TENSOR:
            return _view(storage, offset, shape, strides)
        case Global(name), (View() as tensor, *_) if name == PARAMETER:
            return tensor
    raise InputError("its pickle makes something else than tensors")


def _view(storage: Storage, offset: Any, shape: Any, strides: Any) -> View:
    """InputError unless every number of it is in the storage, which it does not repeat."""
    if not (len(shape) == len(strides) <= MAX_DIMS and _are_sizes((offset, *shape, *strides))):
        raise InputError("its pickle has a tensor whose shape is no shape")
    # A dimension of one has no use for its stride, which may be any number.
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > storage.size or (0 not in shape and last >= storage.size):
        raise InputError(
            f"its pickle has a tensor of shape {list(shape)} that reaches beyond the "
            f"{storage.size} numbers stored for it"
        )
    return View(storage, offset, tuple(shape), strides)


def _are_sizes(numbers: tuple[Any, ...]) -> bool:
    return all(type(number) is int and 0 <= number < MAX_SIZE for number in numbers)


def write(tensors: Mapping[str, Tensor]) -> bytes:
    """The pickle of a state dict; the n-th tensor is all of the storage whose key is n."""
    items = b"".join(
        _text(name) + _tensor(str(key), tensor)
        for key, (name, tensor) in enumerate(tensors.items())
    )
    return pickle.PROTO + b"\x02" + _EMPTY + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def _global(name: str) -> bytes:
    return pickle.GLOBAL + name.replace(" ", "\n").encode() + b"\n"


_EMPTY = _global(DICT) + pickle.EMPTY_TUPLE + pickle.REDUCE


def _tensor(key: str, tensor: Tensor) -> bytes:
    strides = np.cumprod([1, *tensor.shape[:0:-1]], dtype=np.int64)[::-1] if tensor.shape else ()
    storage = _tuple(
        _text("storage"),
        _global(STORAGE_NAMES[tensor.dtype]),
        _text(key),
        _text("cpu"),
        _integer(tensor.nbytes // tensor.dtype.itemsize),
    )
    arguments = _tuple(
        storage + pickle.BINPERSID,
        _integer(0),
        _tuple(*map(_integer, tensor.shape)),
        _tuple(*map(_integer, strides)),
        pickle.NEWFALSE,  # no gradient
        _EMPTY,  # no hooks
    )
    return _global(TENSOR) + arguments + pickle.REDUCE


def _tuple(*values: bytes) -> bytes:
    return pickle.MARK + b"".join(values) + pickle.TUPLE


def _text(value: str) -> bytes:
    content = value.encode()
    return pickle.BINUNICODE + len(content).to_bytes(4, "little") + content


def _integer(value: Any) -> bytes:
    content = pickle.encode_long(int(value))
    return pickle.LONG1 + bytes([len(content)]) + content
