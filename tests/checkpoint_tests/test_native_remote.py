import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from l32jax.checkpoint import native, native_write
from l32jax.checkpoint.engine import transfer
from l32jax.checkpoint.engine.digests import SIDECAR
from l32jax.checkpoint.engine.folders import Folder, is_remote
from l32jax.checkpoint.engine.slices import Home, Slices, load
from l32jax.checkpoint.failures import SaveError
from l32jax.config_text import to_json
from l32jax.errors import InputError
from l32jax.presets import TINY_TEXT
from tests.checkpoint_tests.fake_buckets import FakeBuckets
from tests.checkpoint_tests.weights import assert_same, random_params, targets

TASK = {"of": "this test"}
CONFIG_JSON = f'{{"model": {to_json(TINY_TEXT)}}}'


@pytest.fixture(scope="module")
def server():
    with FakeBuckets() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "a")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        patch.setenv("GCE_METADATA_ROOT", "127.0.0.1:1")
        yield server


@pytest.fixture(autouse=True)
def empty(server, tmp_path, monkeypatch):
    """Journals go to the working directory; the objects of other tests are gone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(native_write, "UNIT_BYTES", 100_000)
    monkeypatch.setattr(native_write, "CHUNK_BYTES", 30_000)
    server.objects.clear()
    server.requests.clear()
    server.broken = False


@pytest.fixture(scope="module")
def params():
    return random_params(TINY_TEXT)


def output_of(slices: Slices) -> native.NativeOutput:
    return native.plan(slices, CONFIG_JSON, {"tokenizer.model": b"words"}, {"format": "native"})


class Stopped(Exception):
    pass


def stopping_after(slices: Slices, reads: int) -> Slices:
    """Slices whose source fails after so many reads."""
    left = iter(range(reads))

    def read(home: Home, rows: slice):
        if next(left, None) is None:
            raise Stopped
        return slices.read(home, rows)

    return replace(slices, read=read)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_what_is_written_to_a_bucket_is_read_from_there(scheme, server, params, tmp_path):
    where = f"{scheme}://bucket/some/run"
    seen = []

    def check(address: str) -> None:
        with pytest.raises(InputError, match="no finished step"):
            native.open_store(where)
        seen.append(native.open_store(address).config)

    transfer.write(output_of(Slices.of(params)), where, TASK, check=check)
    store = native.open_store(where)
    assert seen == [TINY_TEXT] == [store.config]
    assert store.files == {"tokenizer.model": b"words"}
    assert_same(load(store.slices, targets(TINY_TEXT)), params)
    last = [name for method, name, _ in server.requests if method == "PUT"][-1]
    assert last == f"bucket/some/run/0/{SIDECAR}"
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_the_bucket_is_a_checkpoint(server, params, tmp_path):
    transfer.write(output_of(Slices.of(params)), "s3://bucket/run", TASK)
    for name, content in server.objects.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    store = native.open_store(tmp_path / "bucket/run")  # verifies every digest
    assert_same(load(store.slices, targets(TINY_TEXT)), params)


def test_a_slice_costs_the_bytes_of_its_chunks(server, params):
    transfer.write(output_of(Slices.of(params)), "s3://bucket/run", TASK)
    slices = native.open_store("s3://bucket/run").slices
    server.requests.clear()
    home = Home("decoder/embedding/weight", None)
    values = np.asarray(slices.read(home, slice(3, 5)))
    np.testing.assert_array_equal(values, params["decoder"]["embedding"]["weight"][3:5])
    ranges = [asked for _, name, asked in server.requests if "/d/" in name and asked]
    sizes = [int(r.split("-")[1]) - int(r.removeprefix("bytes=").split("-")[0]) for r in ranges]
    assert max(sizes) < 2 * native_write.CHUNK_BYTES
    assert len(sizes) <= 3  # two nodes of the tree, one chunk


@pytest.mark.parametrize("reads", [0, 7, 20])
def test_a_stopped_conversion_is_not_a_checkpoint_and_goes_on(reads, server, params):
    where, slices = "s3://bucket/run", Slices.of(params)
    with pytest.raises(Stopped):
        transfer.write(output_of(stopping_after(slices, reads)), where, TASK)
    with pytest.raises(InputError, match="no finished step"):
        native.open_store(where)
    with pytest.raises(InputError):
        transfer.write(output_of(slices), where, TASK)  # without resume
    handed_over = {name for name in server.objects if name.endswith("manifest.ocdbt")}
    transfer.write(output_of(slices), where, TASK, resume=True)
    assert handed_over <= server.objects.keys()
    assert_same(load(native.open_store(where).slices, targets(TINY_TEXT)), params)
    listed = {
        line[66:] for line in server.objects[f"bucket/run/0/{SIDECAR}"].decode().split("\n")[1:-1]
    }
    there = {name.removeprefix("bucket/run/") for name in server.objects}
    assert there == {f"0/{name}" for name in listed} | {f"0/{SIDECAR}", "manifest.json"}


def test_only_the_same_conversion_is_resumed(params):
    slices = Slices.of(params)
    with pytest.raises(Stopped):
        transfer.write(output_of(stopping_after(slices, 7)), "s3://bucket/run", TASK)
    with pytest.raises(InputError, match="remove"):
        transfer.write(output_of(slices), "s3://bucket/run", {"of": "another"}, resume=True)


def test_nothing_there_is_overwritten(server, params):
    server.objects["bucket/run/notes.txt"] = b"mine"
    with pytest.raises(InputError, match="something is there"):
        transfer.write(output_of(Slices.of(params)), "s3://bucket/run", TASK)
    assert list(server.objects) == ["bucket/run/notes.txt"]


def test_a_bad_source_leaves_nothing_in_the_bucket(server, params, tmp_path):
    slices = Slices.of(params)
    *_, last = slices.homes()

    def read(home: Home, rows: slice) -> np.ndarray:
        values = slices.read(home, rows)
        return np.full_like(values, np.nan) if home == last else values

    with pytest.raises(InputError, match="NaN"):
        transfer.write(output_of(replace(slices, read=read)), "s3://bucket/run", TASK)
    assert server.objects == {}
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_refuses_is_one_line(server, params):
    server.broken = True
    with pytest.raises(InputError, match=r"checkpoint in s3://bucket/run: ") as error:
        native.open_store("s3://bucket/run")
    assert "\n" not in str(error.value)
    with pytest.raises(SaveError, match="could not be written"):
        Folder.at("s3://bucket/run").write("a", b"b")


def test_addresses():
    assert is_remote("gs://bucket/run") and is_remote("s3://bucket/run")
    assert not is_remote("runs/s3") and not is_remote("http://host/run")
    assert not is_remote(Path("gs") / "run")
    with pytest.raises(InputError, match="no bucket and prefix"):
        Folder.at("s3://bucket")


def test_large_small_files_are_not_read(server):
    folder = Folder.at("s3://bucket/run")
    server.objects["bucket/run/config.json"] = json.dumps({"a": "b" * 100}).encode()
    assert folder.read("config.json", at_most=200) is not None
    assert folder.read("missing") is None
    with pytest.raises(InputError, match="more than 50 bytes are not read"):
        folder.read("config.json", at_most=50)
