"""Files of torch.save and ours, whole and damaged; of their pickles see test_torch_pickle."""

import collections
import io
import pickletools
import struct
import warnings
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l32jax.checkpoint import torch_file, torch_pickle
from l32jax.checkpoint.engine.flat_files import FlatFiles
from l32jax.checkpoint.engine.sources import Source
from l32jax.checkpoint.engine.transfer import write
from l32jax.errors import InputError
from tests.checkpoint_tests.test_torch_pickle import ONE, archive

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "layers.0.wq.weight": random.standard_normal((6, 4)).astype(np.float32),
        "norm.weight": random.standard_normal(5).astype(BFLOAT16),
        "table": random.standard_normal((2, 3, 1, 4)).astype(np.float16),
        "gate": np.array([0.25], np.float32),
    }


def save(path: Path, tensors) -> Path:
    plan = torch_file.plan_file(Source.of(tensors, "test"), tensors, path.name)
    write(FlatFiles([plan], {}, single=path.name), path, {})
    return path


def read_all(path: Path) -> dict[str, np.ndarray]:
    source = torch_file.open_file(path)
    return {name: source.read(name, slice(None)) for name in source.tensors}


def assert_equal(actual, expected) -> None:
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def as_numpy(tensor) -> np.ndarray:
    torch = pytest.importorskip("torch")
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def test_what_we_write_we_read(tmp_path):
    assert_equal(read_all(save(tmp_path / "a.pth", arrays())), arrays())


@pytest.mark.parametrize("how", [{}, {"mmap": True}, {"weights_only": False}])
def test_torch_reads_what_we_write(how, tmp_path):
    torch = pytest.importorskip("torch")
    loaded = torch.load(save(tmp_path / "a.pth", arrays()), **{"weights_only": True, **how})
    assert isinstance(loaded, collections.OrderedDict)
    assert all(tensor.is_contiguous() for tensor in loaded.values())
    assert_equal({name: as_numpy(tensor) for name, tensor in loaded.items()}, arrays())


def test_any_zip_reader_finds_our_checksums_right(tmp_path):
    with zipfile.ZipFile(save(tmp_path / "a.pth", arrays())) as archive:
        assert archive.testzip() is None
        names = [entry.filename for entry in archive.infolist()]
    assert names[:3] == [f"consolidated/{name}" for name in ("data.pkl", "byteorder", "version")]
    assert names[3:] == [f"consolidated/data/{key}" for key in range(4)]


def test_resuming_makes_the_bytes_of_never_stopping(tmp_path):
    """Checksums of what was there before the stop come from the journal."""
    whole = save(tmp_path / "a.pth", arrays())
    source = Source.of(arrays(), "test")
    broken = {"layers.0.wq.weight"}

    def read(name: str, rows: slice) -> np.ndarray:
        if name in broken:
            raise RuntimeError("stopped")
        return source.read(name, rows)

    plan = torch_file.plan_file(Source("test", source.tensors, read), arrays(), "b.pth")
    output, path = FlatFiles([plan], {}, single="b.pth"), tmp_path / "b.pth"
    with pytest.raises(RuntimeError, match="stopped"):
        write(output, path, {"of": "test"})
    assert not path.exists()
    broken.clear()
    write(output, path, {"of": "test"}, resume=True)
    assert path.read_bytes() == whole.read_bytes()


def test_tensors_are_aligned_and_mapped_without_copies(tmp_path):
    path = save(tmp_path / "a.pth", arrays())
    plan = torch_file.plan_file(Source.of(arrays(), "test"), arrays(), "a.pth")
    assert [place.offset % torch_file.ALIGNMENT for place in plan.places.values()] == [0] * 4
    for array in read_all(path).values():
        assert array.flags.c_contiguous and not array.flags.owndata and not array.flags.writeable


def test_files_beyond_4_gib_are_described_rightly():
    """Nothing is written: the list at the end is read against a file of holes."""
    entries = [
        torch_file._Entry("consolidated/data.pkl", 0, 5),
        torch_file._Entry("consolidated/data/0", 5 << 30, 6 << 30),
    ]
    listed = torch_file._list(entries, [1, 2])
    stream = io.BytesIO(listed)
    found = struct.unpack("<Q", listed[-42 + 8 : -42 + 16])[0]
    assert found == entries[-1].end + sum(len(entry.listed(0)) for entry in entries)
    archive = zipfile.ZipFile(_Moved(stream, entries[-1].end))
    assert [entry.header_offset for entry in archive.infolist()] == [0, 5 << 30]
    assert [entry.file_size for entry in archive.infolist()] == [5, 6 << 30]
    header = entries[1].header(2)
    assert struct.unpack_from("<2H2Q", header, 30 + len(entries[1].name)) == (
        1,
        16,
        6 << 30,
        6 << 30,
    )


class _Moved(io.RawIOBase):
    """A stream as the end of a file that begins with a hole."""

    def __init__(self, stream: io.BytesIO, hole: int):
        self.stream, self.hole, self.at = stream, hole, 0
        self.size = hole + len(stream.getbuffer())

    def seekable(self):
        return True

    def tell(self):
        return self.at

    def seek(self, offset, whence=0):
        self.at = offset + {0: 0, 1: self.at, 2: self.size}[whence]
        return self.at

    def read(self, size=-1):
        self.stream.seek(max(self.at - self.hole, 0))
        content = self.stream.read(size)
        self.at += len(content)
        return content


def test_views_and_shared_storages_of_torch_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "whole": base,
        "rows": base[1:3],
        "columns": base[:, 2:5],
        "transposed": base.t(),
        "every": base[::2],
        "one": base[2:3, 1:2],
        "none": base[:0],
        "number": base[0, 1],
        "bfloat16": base.bfloat16(),
        "int8": base.to(torch.int8),
        "parameter": torch.nn.Parameter(base * 2),
    }
    torch.save(tensors, tmp_path / "a.pth")
    source = torch_file.open_file(tmp_path / "a.pth")
    assert source.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = as_numpy(tensor.detach())
        assert source.tensors[name][:2] == (expected.shape, expected.dtype)
        if expected.ndim:
            np.testing.assert_array_equal(source.read(name, slice(None)), expected)
            np.testing.assert_array_equal(source.read(name, slice(1, 3)), expected[1:3])


def test_state_dict_of_a_module_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / "a.pth")
    expected = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    assert_equal(read_all(tmp_path / "a.pth"), expected)


def test_format_before_torch_1_6_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="format of torch before 1.6; load it and save it again"):
        torch_file.open_file(tmp_path / "a.pth")


@pytest.mark.parametrize("value", ["text", 3, None, [1], {"a": 1}])
def test_what_is_no_tensor_is_refused(value, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.ones(2), "extra": value}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="'extra' is not a tensor|the instruction"):
        torch_file.open_file(tmp_path / "a.pth")


def test_big_endian_numbers_are_refused(tmp_path):
    path = archive(tmp_path / "a.pth", ONE)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/byteorder", b"big")
    with pytest.raises(InputError, match="big-endian"):
        torch_file.open_file(path)


def patched(path: Path, old: bytes, new: bytes, *, which: int = -1) -> Path:
    """Changes the first or last occurrence of some bytes."""
    content = path.read_bytes()
    at = content.rfind(old) if which else content.find(old)
    path.write_bytes(content[:at] + new + content[at + len(old) :])
    return path


def listed(path: Path, entry: int) -> int:
    """Where the archive's list has an entry."""
    content, at = path.read_bytes(), -1
    for _ in range(entry + 1):
        at = content.index(b"PK\1\2", at + 1)
    return at


def with_field(path: Path, entry: int, offset: int, value: bytes) -> Path:
    content, at = bytearray(path.read_bytes()), listed(path, entry) + offset
    content[at : at + len(value)] = value
    path.write_bytes(content)
    return path


FLAGS, METHOD, PACKED, SIZE, OFFSET = 8, 10, 20, 24, 42


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: with_field(p, 1, FLAGS, b"\1\0"), "encrypted"),
        (lambda p: with_field(p, 1, METHOD, b"\x08\0"), "is compressed"),
        (lambda p: with_field(p, 1, SIZE, b"\xff\xff\xff\x7f"), "is compressed"),
        (lambda p: with_field(p, 1, PACKED, b"\xff\xff\xff\x7f" * 2), "beyond the end"),
        (lambda p: with_field(p, 1, OFFSET, b"\0\0\0\0"), "overlaps another"),
        (lambda p: with_field(p, 1, OFFSET, b"\x90\0\0\0"), "overlaps another|not where"),
        (lambda p: with_field(p, 1, OFFSET, b"\xf0\xff\xff\x7f"), "not where the archive's list"),
        (lambda p: with_field(p, 0, 46, b"archive/data.xyz"), "not one that torch.save wrote"),
        (lambda p: p.write_bytes(p.read_bytes()[:-30]), "not a zip"),
        (lambda p: p.write_bytes(p.read_bytes()[:100]), "not a zip"),
        (lambda p: p.write_bytes(b""), "not a zip"),
        (lambda p: p.write_bytes(b"GGUF" + bytes(100)), "not a zip"),
        (lambda p: p.unlink(), "No such file"),
    ],
)
def test_damaged_archives_are_refused(damage, message, tmp_path):
    path = archive(tmp_path / "a.pth", ONE)
    damage(path)
    with pytest.raises(InputError, match=message) as caught:
        torch_file.open_file(path)
    assert "\n" not in str(caught.value)


def test_compressed_duplicate_and_long_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", ONE)
        file.writestr("a/data/0", bytes(1 << 24))
    with pytest.raises(InputError, match="'a/data.pkl' is compressed"):
        torch_file.open_file(tmp_path / "a.pth")
    path = archive(tmp_path / "b.pth", ONE)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as file:
        warnings.simplefilter("ignore")
        file.writestr("archive/data/0", bytes(64))
    with pytest.raises(InputError, match="'archive/data/0' is there twice"):
        torch_file.open_file(path)


def test_endless_lists_of_entries_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "MAX_INDEX_BYTES", 1 << 17)
    path = archive(tmp_path / "a.pth", ONE, {str(key): b"" for key in range(3000)})
    with pytest.raises(InputError, match="its list of entries exceeds"):
        torch_file.open_file(path)


@settings(
    max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.data())
def test_random_damage_is_an_input_error_or_harmless(tmp_path, data):
    path = tmp_path / "a.pth"
    if not path.exists():
        save(path, arrays())
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "b.pth").write_bytes(content)
    try:
        source = torch_file.open_file(tmp_path / "b.pth")
        for name, tensor in source.tensors.items():
            if tensor.shape:
                assert source.read(name, slice(0, 2)).dtype == tensor.dtype
    except InputError:
        pass


def test_our_pickle_has_only_what_torchs_has():
    ours = torch_pickle.write(Source.of(arrays(), "").tensors)
    names = {opcode.name for opcode, _, _ in pickletools.genops(ours)}
    assert names <= {
        "PROTO", "GLOBAL", "EMPTY_TUPLE", "REDUCE", "MARK", "BINUNICODE", "LONG1", "TUPLE",
        "BINPERSID", "NEWFALSE", "SETITEMS", "STOP",
    }  # fmt: skip
