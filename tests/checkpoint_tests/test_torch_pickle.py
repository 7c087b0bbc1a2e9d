"""Pickles in .pth files: what a hostile one would do is seen not to happen."""

import builtins
import collections
import contextlib
import io
import os
import pickle
import struct
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l32jax.checkpoint import torch_file, torch_pickle
from l32jax.errors import InputError


def archive(path: Path, content: bytes, storages=None, *, root: str = "archive") -> Path:
    """A .pth file with this pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{root}/data.pkl", content)
        for key, storage in (storages or {"0": bytes(64)}).items():
            file.writestr(f"{root}/data/{key}", storage)
    return path


class Call:
    """Pickled, it has whoever unpickles it call a function."""

    def __init__(self, function, *arguments):
        self.made_by = function, arguments

    def __reduce__(self):
        return self.made_by


STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"
)
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def attacks(touch: str, python: str) -> dict[str, bytes]:
    """Pickles that run a command when `pickle` reads them."""
    system = Call(os.system, touch)
    shell = f"cposix\nsystem\n({'X'}".encode()[:-1] + text(touch) + b"tR"
    return {
        **{f"system, protocol {p}": pickle.dumps(system, p) for p in range(6)},
        "eval": pickle.dumps(Call(builtins.eval, python), 2),
        "exec": pickle.dumps({"weight": Call(builtins.exec, python)}, 2),
        "popen": pickle.dumps([Call(subprocess.check_call, ["sh", "-c", touch])], 2),
        "in a dict": pickle.dumps(collections.OrderedDict(weight=system), 2),
        "as a name": pickle.dumps({system: 1}, 2),
        "getattr": pickle.dumps(Call(getattr, Call(__import__, "os"), "system"), 2)[:-1]
        + text(touch) + b"\x85R.",
        "INST": b"(S'" + touch.encode() + b"'\niposix\nsystem\n.",
        "OBJ": b"(cposix\nsystem\nS'" + touch.encode() + b"'\no.",
        "before the rest": b"\x80\x02" + shell + b"0ccollections\nOrderedDict\n)R.",
        "in a tensor": b"\x80\x02" + REBUILD + b"(" + STORAGE + b"K\x00" + shell + b"\x85)\x89)tR.",
        "in a storage": b"\x80\x02(X\x07\x00\x00\x00storage" + shell + b"tQ.",
        "as its hooks": b"\x80\x02" + REBUILD
        + b"(" + STORAGE + b"K\x00K\x02\x85K\x01\x85\x89" + shell + b"tR.",
        "as its state": b"\x80\x02ccollections\nOrderedDict\n)R" + shell + b"b.",
    }  # fmt: skip


KINDS = list(attacks("", ""))


class Unpickler(pickle.Unpickler):
    """One that trusts: it shows that an attack is one."""

    def persistent_load(self, identity):
        return identity

    def find_class(self, module, name):
        return print if module.startswith("torch") else super().find_class(module, name)


@pytest.mark.parametrize("kind", KINDS)
def test_attacks_work_on_pickle_and_not_on_us(kind, tmp_path):
    marker = tmp_path / "marker"
    python = f"open({str(marker)!r}, 'w').close()"
    content = attacks(f"touch {marker}", python)[kind]
    try:
        Unpickler(io.BytesIO(content)).load()
    except Exception as error:
        print("after the attack:", error)
    assert marker.exists(), "this is no attack"
    marker.unlink()
    path = archive(tmp_path / "a.pth", content)
    with pytest.raises(InputError, match="nothing of it was executed") as caught:
        torch_file.open_file(path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


DICT = b"ccollections\nOrderedDict\n)R"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cos\nsystem\n.", "asks for 'os.system', which no weights need"),
        (b"ctorch.storage\n_load_from_bytes\n.", "asks for 'torch.storage._load_from_bytes'"),
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "asks for"),
        (b"ccollections\nOrderedDict.__class__\n.", "asks for"),
        (b"ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ"),
        (b"\x82\x01.", "instruction EXT1"),
        (b"Pname\n.", "instruction PERSID"),
        (b"(l(I1\nI2\ntb.", "instruction LIST"),
        (b"\x8b\x04\x00\x00\x00\x01\x02\x03\x04.", "instruction LONG4"),
        (b"K\x01Q.", "refers to something else than a storage"),
        (text("module") + b"Q.", "refers to something else"),
        (STORAGE.replace(b"ctorch\nFloatStorage", b"ccollections\nOrderedDict") + b".", "refers"),
        (STORAGE.replace(b"K\x10", b"\x8a\x01\xff") + b".", "refers to something else"),
        (STORAGE.replace(b"K\x10", b"X\x01\x00\x00\x00a") + b".", "refers to something else"),
        (text("f") + b")R.", "makes something else than tensors"),
        (b"ccollections\nOrderedDict\nK\x05\x85R.", "makes something else than tensors"),
        (b"ctorch\nFloatStorage\n)R.", "makes something else than tensors"),
        (REBUILD + b")R.", "makes something else than tensors"),
        (REBUILD + b"(" + STORAGE + b"tR.", "makes something else than tensors"),
        (STORAGE + b".", "not a dict of tensors by name"),
        (DICT + b"K\x01K\x02s.", "not a dict of tensors by name"),
        (DICT + text("a") + b"K\x02s.", "'a' is not a tensor"),
        (DICT + b"h\x07.", "damaged"),
        (b"t.", "damaged"),
        (b"\x86.", "damaged"),
        (b"R.", "damaged"),
        (b".", "damaged"),
        (b"", "pickle exhausted"),
        (DICT, "pickle exhausted"),
        (b"X\xff\xff\xff\x7fabc", "expected 2147483647 bytes"),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc", "expected 9223372036854775807 bytes"),
        (bytes(torch_pickle.MAX_BYTES + 1), "at most 2097152 are read"),
        (b"\xff.", "opcode"),
    ],
)  # fmt: skip
def test_odd_pickles_are_refused_in_one_line(content, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        torch_file.open_file(archive(tmp_path / "a.pth", content))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_bombs_do_not_go_off(tmp_path):
    """Each would take `pickle`, or who prints or hashes the result, gigabytes or years."""
    memo = DICT + b"r\xff\xff\xff\x7f."
    assert torch_pickle.read(memo) == {}
    nested = DICT + b")" + b"q\x00h\x00\x86" * 60
    for content in (nested + b"K\x01s.", nested + b".", b")" + b"q\x00h\x00\x86" * 60 + b"R."):
        with pytest.raises((InputError, ValueError)):
            torch_pickle.read(content)
    deep = b")" + b"\x85" * 100_000 + b"."
    with pytest.raises(InputError, match="not a dict"):
        torch_pickle.read(deep)


def integer(value: int) -> bytes:
    content = pickle.encode_long(value)
    return b"\x8a" + bytes([len(content)]) + content


def tensor(offset: int, shape, strides) -> bytes:
    """Of the 16 numbers of the storage 0."""
    sizes = [b"(" + b"".join(map(integer, values)) + b"t" for values in (shape, strides)]
    made = REBUILD + b"(" + STORAGE + integer(offset) + b"".join(sizes) + b"\x89" + DICT + b"tR"
    return DICT + text("a") + made + b"s."


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, [17], [1]), (1, [16], [1]), (16, [1], [1]), (0, [4, 4], [5, 1]), (0, [2], [16]),
        (0, [4, 5], [4, 1]), (0, [17], [0]), (0, [2**40], [0]), (0, [2**31, 2**31, 4], [0, 0, 0]),
        (2**63, [1], [1]), (0, [2], [2**63]), (0, [2**64], [1]), (-1, [4], [1]), (0, [-4], [1]),
        (15, [4], [-1]), (0, [4], []), (0, [], [1]), (0, [1] * 9, [1] * 9), (17, [], []),
        (0, [0, 4], [4, 1]), (16, [3, 0], [1, 1]),
    ],
)  # fmt: skip
def test_tensors_beyond_their_storage_are_refused(offset, shape, strides, tmp_path):
    path = archive(tmp_path / "a.pth", tensor(offset, shape, strides))
    if 0 in shape:
        assert torch_file.open_file(path).read("a", slice(None)).size == 0
        return
    with pytest.raises(InputError, match="reaches beyond|no shape"):
        torch_file.open_file(path)


def test_stride_of_one_row_does_not_matter(tmp_path):
    path = archive(tmp_path / "a.pth", tensor(3, [1, 4, 1], [2**61, 2, 7]))
    numbers = np.arange(16, dtype=np.float32)
    archive(tmp_path / "b.pth", tensor(3, [1, 4, 1], [2**61, 2, 7]), {"0": numbers.tobytes()})
    assert torch_file.open_file(path).tensors["a"].shape == (1, 4, 1)
    read = torch_file.open_file(tmp_path / "b.pth").read("a", slice(None))
    np.testing.assert_array_equal(read.ravel(), [3, 5, 7, 9])


ONE = tensor(0, [16], [1])


@pytest.mark.parametrize(
    ("storages", "message"),
    [
        ({"1": bytes(64)}, "has not the 16 numbers of its storage '0'"),
        ({"0": bytes(60)}, "has not the 16 numbers"),
        ({"0": bytes(68)}, "has not the 16 numbers"),
        ({"0/../0": bytes(64)}, "has not the 16 numbers"),
    ],
)
def test_storages_that_are_not_there_are_refused(storages, message, tmp_path):
    with pytest.raises(InputError, match=message):
        torch_file.open_file(archive(tmp_path / "a.pth", ONE, storages))


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_pickles_make_nothing(content):
    with contextlib.suppress(InputError, ValueError):
        torch_pickle.read(b"\x80\x02" + content + b".")
