import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from l32jax.checkpoint import native, native_write
from l32jax.checkpoint.arrays import named
from l32jax.checkpoint.engine import digests, transfer
from l32jax.checkpoint.engine.manifest import MANIFEST
from l32jax.checkpoint.engine.slices import ALL, Home, Slices, load
from l32jax.checkpoint.formats import open_checkpoint
from l32jax.checkpoint.steps import verify
from l32jax.checkpoint.store import Store
from l32jax.config_text import to_json
from l32jax.errors import InputError
from l32jax.model.parameters import flatten
from l32jax.presets import TINY_TEXT, TINY_VISION
from tests.checkpoint_tests import converting_child
from tests.checkpoint_tests.weights import assert_same, random_params, targets

CONFIG_JSON = f'{{"model": {to_json(TINY_TEXT)}}}'
FILES = {"tokenizer.model": b"words", "tokenizer.json": b"{}"}
EMBEDDING = "decoder/embedding/weight"


@pytest.fixture(scope="module")
def params():
    return random_params(TINY_TEXT)


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Several chunks a tensor and several units, as a real model has."""
    monkeypatch.setattr(native_write, "UNIT_BYTES", 150_000)
    monkeypatch.setattr(native_write, "CHUNK_BYTES", 40_000)


def write(slices: Slices, directory: Path, config: Any = TINY_TEXT) -> None:
    config_json = f'{{"model": {to_json(config)}}}'
    output = native.plan(slices, config_json, FILES, {"format": "native"})
    transfer.write(output, directory)


@pytest.fixture
def directory(params, tmp_path):
    write(Slices.of(params), tmp_path / "native")
    return tmp_path / "native"


@pytest.fixture
def trained(params, tmp_path):
    """What a run on four devices leaves, with its optimizer's state."""
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])

    def place(leaf: jax.Array) -> jax.Array:
        dim = next((i for i, size in enumerate(leaf.shape) if i and size % 4 == 0), None)
        spec = PartitionSpec(*(["fsdp" if i == dim else None for i in range(leaf.ndim)]))
        return jax.device_put(np.asarray(leaf), NamedSharding(mesh, spec))

    placed = jax.tree.map(place, params)
    moments = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    with Store(tmp_path / "trained") as store:
        for step in (1, 2):
            state = {"params": placed, "opt_state": moments, "step": jnp.int32(step)}
            store.save(step, state, config_json=CONFIG_JSON, extra_files=FILES)
    return tmp_path / "trained"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_what_is_written_is_read(params, dtype, tmp_path):
    write(Slices.of(params).as_dtype(dtype), tmp_path / "native")
    store = native.open_store(tmp_path / "native")
    assert store.config == TINY_TEXT
    assert store.files == FILES
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    assert_same(load(store.slices, targets(TINY_TEXT, dtype=dtype)), expected)


def test_a_vision_model_with_its_scalars_survives(tmp_path):
    params = random_params(TINY_VISION)
    write(Slices.of(params), tmp_path / "native", TINY_VISION)
    store = native.open_store(tmp_path / "native")
    assert () in store.slices.shapes.values()
    assert_same(load(store.slices, targets(TINY_VISION)), params)


def restored_by_orbax(directory, wanted):
    """As anybody with Orbax alone would restore the parameters."""
    item = named({"params": wanted})
    how = ocp.checkpoint_utils.construct_restore_args(item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found = checkpointer.restore(
            directory / "0" / "state", args=ocp.args.PyTreeRestore(item=item, restore_args=how)
        )
    return jax.tree.unflatten(jax.tree.structure(wanted), [found[name] for name in item])


def test_orbax_restores_it_onto_several_devices(directory, params):
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), devices=jax.devices()[:4])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec())
        ),
        params,
    )
    restored = restored_by_orbax(directory, wanted)
    assert_same(restored, params)
    assert all(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(restored))
    assert (directory / "0" / "files" / "tokenizer.model").read_bytes() == b"words"


def test_every_digest_and_every_checksum_is_right(directory, params):
    assert verify(directory) == []
    manifest = json.loads((directory / MANIFEST).read_text())
    slices = Slices.of(params)
    assert list(manifest["tensors"]) == [f"params/{home}" for home in slices.homes()]
    for home in slices.homes():
        values = np.asarray(slices.read(home, ALL))
        assert manifest["tensors"][f"params/{home}"] == {
            "shape": list(values.shape),
            "dtype": "float32",
            "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
        }


def test_a_training_store_is_read_without_orbax(trained, params):
    store = native.open_store(trained)
    assert store.slices.where.endswith("2/state")
    assert store.files == FILES
    assert store.slices.shapes.keys() == flatten(params).keys()
    assert_same(load(store.slices, targets(TINY_TEXT)), params)


@pytest.mark.parametrize("where", ["directory", "trained"])
def test_any_rows_are_read_and_indexed_further(where, params, request):
    slices = native.open_store(request.getfixturevalue(where)).slices
    for path, leaf in flatten(params).items():
        (*_, home) = (home for home in slices.homes() if home.path == path)
        whole = np.asarray(leaf if home.layer is None else leaf[home.layer])
        np.testing.assert_array_equal(slices.read(home, ALL), whole)
        half = slice(len(whole) // 2, len(whole))
        np.testing.assert_array_equal(slices.read(home, half), whole[half])
        part = (slice(0, 1), *(slice(1, 2) for _ in whole.shape[1:]))
        np.testing.assert_array_equal(slices.read(home, half)[part], whole[half][part])


def test_a_chunk_of_many_layers_is_decoded_once(trained):
    slices = native.open_store(trained).slices
    path = max(
        (path for path, shape in slices.shapes.items() if "blocks" in path),
        key=lambda path: np.prod(slices.shapes[path]),
    )
    before = read_bytes()
    np.asarray(slices.read(Home(path, 0), ALL))
    once = read_bytes() - before
    np.asarray(slices.read(Home(path, 1), ALL))
    assert once > 0
    assert read_bytes() - before < 1.5 * once


def read_bytes() -> int:
    """By tensorstore, from files."""
    (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metric["values"][0]["value"]


def test_a_step_without_files_has_none(params, tmp_path):
    with Store(tmp_path / "trained") as store:
        store.save(1, {"params": params}, config_json=CONFIG_JSON)
    assert native.open_store(tmp_path / "trained").files == {}


def test_a_flipped_bit_is_refused_or_an_older_step_taken(trained, directory):
    for step in (trained / "2", directory / "0"):
        data = max(step.glob("state/**/d/*"), key=lambda path: path.stat().st_size)
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    assert native.open_store(trained).slices.where.endswith("1/state")
    with pytest.raises(InputError, match="has changed since it was written"):
        native.open_store(directory)
    assert native.open_store(directory, verified=False).config == TINY_TEXT


def test_a_step_can_be_named_and_is_not_replaced_by_another(trained):
    assert open_checkpoint(trained / "1").slices.where.endswith("1/state")
    (trained / "1" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config.json.*use another step"):
        open_checkpoint(trained / "1")


def test_lost_data_is_an_error_of_one_line(directory):
    slices = native.open_store(directory, verified=False).slices
    for data in directory.glob("0/state/ocdbt.process_*/d/*"):
        if data.stat().st_size > 20_000:
            data.unlink()
    with pytest.raises(InputError, match=r"checkpoint in .*/0/state: [A-Z_]+: Error") as error:
        np.asarray(slices.read(Home(EMBEDDING, None), ALL))
    assert "\n" not in str(error.value)


def test_another_models_arrays_are_refused(directory):
    config = directory / "0" / "config.json"
    content = json.loads(config.read_text())
    content["model"]["decoder"]["vocab_size"] += 1
    config.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"the types differ of params/{EMBEDDING} \(saved as"):
        native.open_store(directory, verified=False)


def test_nothing_is_written_any_more_once_a_unit_has_failed(tmp_path, monkeypatch):
    """Else removing it races with tensorstore's threads, and leaves half of it."""
    monkeypatch.setattr(native_write, "CHUNK_BYTES", 32 << 20)
    values = np.ones((4, 1 << 20, 8), np.float32)
    values[3, -1] = np.nan
    slices = Slices.of({"a": values[0] * 1, "b": values[1] * 1, "c": values})
    for i in range(8):
        unit = tmp_path / f"unit_{i}"
        with pytest.raises(InputError, match="NaN or infinite"):
            native_write.write_unit(slices, list(slices.homes()), unit, lambda _: None)
        shutil.rmtree(unit)
        time.sleep(0.1)
        assert not unit.exists()


def test_values_that_are_not_finite_leave_nothing(params, tmp_path):
    slices = Slices.of(jax.tree.map(lambda leaf: leaf * jnp.inf, params))
    with pytest.raises(InputError, match="NaN or infinite"):
        write(slices, tmp_path / "native")
    assert list(tmp_path.iterdir()) == []


def change_header(directory: Path, **changes: Any) -> None:
    """Of the embedding, through OCDBT as its writer would."""
    base = {"driver": "file", "path": f"{directory}/0/state/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    name = f"params/{EMBEDDING}/.zarray"
    header = json.loads(store.read(name).result().value) | changes
    store.write(name, json.dumps(header).encode()).result()


@pytest.mark.parametrize(
    "changes",
    [
        {"chunks": [2**40, 64]},
        {"chunks": [512, 65]},
        {"chunks": [0, 64]},
        {"chunks": [64]},
        {"shape": [2**62, 2**62], "chunks": [2**31, 2**31]},
        {"shape": "many"},
        {"shape": [True, 64]},
        {"dtype": "|O"},
        {"dtype": [["a", "<f4"]]},
        {"filters": [{"id": "pickle"}]},
        {"compressor": {"id": "blosc"}},
        {"zarr_format": 3},
        {"attributes": "x" * 2**17},
    ],
    ids=str,
)
def test_headers_that_nobody_writes_are_refused(directory, changes):
    change_header(directory, **changes)
    with pytest.raises(InputError, match=r"zarray"):
        native.open_store(directory, verified=False)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "[" * 100_000, '{"use_zarr3": true}', "{}", '{"tree_metadata": []}']
    + [
        f'{{"use_ocdbt": true, "use_zarr3": false, "tree_metadata": {tree}}}'
        for tree in ("3", "[]", '{"a": 1}', '{"a": {"key_metadata": [{"key": 7}]}}')
    ],
    ids=range(10),
)
def test_metadata_that_nobody_writes_is_refused(directory, content):
    (directory / "0/state/_METADATA").write_text(content)
    with pytest.raises(InputError, match="0/state"):
        native.open_store(directory, verified=False)


@pytest.mark.parametrize("name", ["0/state/manifest.ocdbt", "0/state/d", "0/files", "0"])
def test_links_out_of_the_checkpoint_are_refused(directory, name, tmp_path):
    shutil.move(directory / name, tmp_path / "elsewhere")
    (directory / name).symlink_to(tmp_path / "elsewhere")
    for verified in (True, False):
        with pytest.raises(InputError, match="outside of the checkpoint"):
            native.open_store(directory, verified=verified)


def test_a_pipe_is_refused_instead_of_waited_for(directory):
    os.mkfifo(directory / "0/files/tokenizer.txt")
    with pytest.raises(InputError, match="not a regular file"):
        native.open_store(directory)


def test_tensorstore_follows_no_reference_out_of_the_folder(tmp_path):
    """What keeps a reference of a hostile OCDBT inside: its base refuses such names."""
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "in" / "d").mkdir(parents=True)
    store = ts.KvStore.open({"driver": "file", "path": f"{tmp_path}/in/"}).result()
    for name in ("../secret", "d/../../secret", "./../secret", str(tmp_path / "secret")):
        with pytest.raises(ValueError, match="Invalid key"):
            store.read(name).result()


def test_digests_of_files_elsewhere_are_not_computed(directory):
    sidecar = directory / "0" / digests.SIDECAR
    for name in ("../../../../../../../../dev/zero", "/dev/zero"):
        body = f"{'0' * 64}  {name}\n"
        digest = hashlib.sha256(body.encode()).hexdigest()
        sidecar.write_text(f"{digests.HEADER}{digest}\n{body}")
        assert digests.problems(directory / "0") == [f"{digests.SIDECAR} is damaged"]


@given(st.integers(1, 5000), st.integers(1, 300), st.sampled_from([2, 4]))
def test_chunks_cover_the_rows_and_are_not_too_large(rows, width, itemsize):
    chunk, _ = native_write.chunk_of((rows, width), itemsize)
    assert 1 <= chunk <= rows
    assert chunk == 1 or (chunk - 1) * width * itemsize <= native_write.CHUNK_BYTES
    padding = -rows % chunk
    assert padding * 2 <= rows or rows < 4


def test_units_are_runs_of_all_homes(params):
    slices = Slices.of(params)
    runs = native_write.units_of(slices)
    assert [home for run in runs for home in run] == list(slices.homes())
    sizes = [sum(map(slices.nbytes, run)) for run in runs]
    assert len(runs) > 2
    assert all(
        size <= native_write.UNIT_BYTES or len(run) == 1
        for size, run in zip(sizes, runs, strict=True)
    )


@pytest.fixture
def child(tmp_path):
    command = [sys.executable, converting_child.__file__, str(tmp_path / "native")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.stdin.close()


def run_child(child: subprocess.Popen, *, resume: bool, kill_after: float | None = None) -> float:
    """Seconds until it ended."""
    child.stdin.write("resume\n" if resume else "begin\n")
    child.stdin.flush()
    process, begin = int(child.stdout.readline()), time.monotonic()
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    assert child.stdout.readline() == "ended\n"
    return time.monotonic() - begin


def test_a_killed_conversion_is_resumed_to_the_same_result(child, tmp_path):
    slices, random_ = converting_child.slices(), random.Random()
    destination = tmp_path / "native"
    took = run_child(child, resume=False)
    expected = json.loads((destination / MANIFEST).read_text())
    shutil.rmtree(destination)
    for attempt in range(3):
        moment = random_.uniform(0, took / 4)
        run_child(child, resume=attempt > 0, kill_after=moment)
        assert not destination.exists(), f"{attempt}: killed after {moment} of {took}"
    run_child(child, resume=True)

    assert json.loads((destination / MANIFEST).read_text()) == expected
    assert verify(destination) == []
    device = jax.devices()[0]
    target = {
        path: jax.ShapeDtypeStruct(
            shape, ml_dtypes.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device)
        )
        for path, shape in slices.shapes.items()
    }
    restored = restored_by_orbax(destination, target)
    for home in slices.homes():
        leaf = np.asarray(restored[home.path])
        values = leaf if home.layer is None else leaf[home.layer]
        np.testing.assert_array_equal(values, slices.read(home, ALL))
    assert list(tmp_path.iterdir()) == [destination]
