import contextlib
import logging
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from l32jax.checkpoint.engine import digests
from l32jax.checkpoint.steps import is_store, verify
from l32jax.checkpoint.store import Reader, SaveError, Store
from l32jax.errors import InputError

CHILD = Path(__file__).with_name("saving_child.py")


class State(NamedTuple):
    params: Any
    opt_state: Any
    step: jax.Array
    rng: jax.Array


def make_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
    return jax.make_mesh(shape, names, devices=jax.devices()[: int(np.prod(shape))])


def make_state(seed: int, mesh: Mesh) -> State:
    """Integer keys beyond 9, a frozen None, named tuples, bfloat16, scalars and key data."""
    rng = np.random.default_rng(seed)

    def normal(shape, dtype, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.device_put(jnp.asarray(rng.normal(size=shape), dtype), sharding)

    first = mesh.axis_names[0]
    params = {
        "decoder": {
            "blocks": {n: {"weight": normal((8, 16), jnp.bfloat16, first)} for n in (0, 2, 10)},
            "gate": normal((), jnp.float32),
        },
        "frozen": None,
        "head": normal((16, 8), jnp.float32, None, first),
    }
    everywhere = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.adamw(1e-3).init(params)
    opt_state = jax.tree.map(lambda a: a if a.ndim else jax.device_put(a, everywhere), opt_state)
    key = jax.device_put(jax.random.key_data(jax.random.key(seed)), everywhere)
    return State(params, opt_state, jax.device_put(jnp.int32(seed), everywhere), key)


def target_of(state, mesh: Mesh | None = None):
    """What to restore: as `state` is, or with each dimension that can be over `mesh`'s one axis."""

    def describe(leaf):
        sharding = leaf.sharding
        if mesh is not None:
            spec = PartitionSpec(*mesh.axis_names) if leaf.ndim == 2 else PartitionSpec()
            sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(describe, state)


def assert_same(restored, saved) -> None:
    """Bit for bit, and of the same structure."""
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(store: Store, step: int, state) -> None:
    store.save(
        step,
        state,
        config_json=f'{{"step": {step}}}',
        iterator_state=f"at {step}".encode(),
        extra_files={"tokenizer.model": bytes([step])},
    )


@pytest.fixture
def mesh():
    return make_mesh((8,), ("fsdp",))


@pytest.fixture
def two_steps(tmp_path, mesh):
    """A directory with the steps 1 and 2, closed, and what was saved."""
    states = {step: make_state(step, mesh) for step in (1, 2)}
    with Store(tmp_path / "run") as store:
        for step, state in states.items():
            save(store, step, state)
    return tmp_path / "run", states


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def assert_one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def assert_one_warning(caplog, *parts: str) -> None:
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "\n" not in record.getMessage()
    for part in parts:
        assert part in record.getMessage()


def test_everything_of_a_step_comes_back_bit_for_bit(two_steps):
    directory, states = two_steps
    with Store(directory) as store:
        restored = store.restore(target_of(states[2]))
        assert_same(restored.state, states[2])
        assert (restored.step, restored.config_json) == (2, '{"step": 2}')
        assert restored.iterator_states == (b"at 2",)
        assert store.steps() == [1, 2] and store.latest_step() == 2


def test_one_directory_holds_all_of_a_step(two_steps):
    directory, _ = two_steps
    assert {path.name for path in directory.iterdir()} == {"1", "2", "lock"}
    assert {path.name for path in (directory / "2").iterdir()} == {
        *("state", "iterator", "files", "config.json", digests.SIDECAR)
    }
    assert verify(directory) == []


def test_training_may_donate_the_state_while_it_is_saved(tmp_path, mesh):
    train = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 + 7, s), donate_argnums=0)
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    state = {"w": jax.device_put(jnp.arange(2**20, dtype=jnp.float32), sharding)}
    target, before = target_of(state), np.array(state["w"])
    with Store(tmp_path) as store:
        save(store, 1, state)
        for _ in range(3):
            state = train(state)
        jax.block_until_ready(state)
        restored = store.restore(target).state
    np.testing.assert_array_equal(restored["w"], before)


def test_saving_works_under_the_transfer_guard(tmp_path, mesh):
    state = make_state(1, mesh)
    with Store(tmp_path) as store, jax.transfer_guard("disallow"):
        save(store, 1, state)
        store.wait()


def test_steps_beyond_the_kept_ones_go(tmp_path, mesh):
    state = make_state(1, mesh)
    for keep, left in ((1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])):
        with Store(tmp_path / str(keep), keep=keep) as store:
            for step in range(1, 6):
                save(store, step, state)
            store.wait()
            assert store.steps() == left
        assert verify(tmp_path / str(keep)) == []


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (4, 2), (1, 8)])
def test_another_mesh_restores_the_same_bits(two_steps, shape):
    directory, states = two_steps
    target = target_of(states[2], make_mesh(shape, ("data", "tensor")))
    restored = Reader(directory).restore(target).state
    assert_same(restored, states[2])
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert leaf.sharding == wanted.sharding  # scalars too: they must not sit on one device


def test_a_flipped_bit_in_any_file_falls_back_to_the_step_before(two_steps, caplog):
    directory, states = two_steps
    target, reader = target_of(states[1]), Reader(directory)
    for path in files_of(directory / "2"):
        name, content = path.relative_to(directory / "2").as_posix(), path.read_bytes()
        for bit in {0, len(content) * 4, len(content) * 8 - 1}:
            flip(path, bit)
            (problem,) = verify(directory)
            assert problem.startswith(f"step 2: {name}")
            path.write_bytes(content)
        flip(path, random.randrange(len(content) * 8))
        caplog.clear()
        restored = reader.restore(target)
        path.write_bytes(content)
        assert (restored.step, restored.config_json) == (1, '{"step": 1}')
        assert_same(restored.state, states[1])
        assert_one_warning(caplog, str(directory / "2"), name)
    assert reader.restore(target).step == 2


@pytest.mark.parametrize("kind", ["truncated", "deleted"])
def test_truncated_and_deleted_files_fall_back_too(two_steps, caplog, kind):
    directory, states = two_steps
    target, reader = target_of(states[1]), Reader(directory)
    for path in files_of(directory / "2"):
        content = path.read_bytes()
        if kind == "deleted":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2])
        caplog.clear()
        assert reader.restore(target).step == 1
        assert_one_warning(caplog, str(directory / "2"), path.name)
        path.write_bytes(content)


def test_a_step_without_digests_counts_as_unfinished_and_is_told(two_steps, caplog):
    directory, states = two_steps
    (directory / "2" / digests.SIDECAR).unlink()
    reader = Reader(directory)
    assert reader.latest_step() == 1 and reader.steps() == [1, 2]
    assert reader.restore(target_of(states[1])).step == 1
    assert_one_warning(caplog, "has not finished")


def test_no_usable_step_is_one_line_with_every_reason(two_steps, tmp_path):
    directory, states = two_steps
    flip(directory / "1" / "config.json", 5)
    (directory / "2" / "files" / "tokenizer.model").unlink()
    with pytest.raises(InputError) as error:
        Reader(directory).restore(target_of(states[1]))
    assert_one_line(
        error, str(directory), "step 1: config.json", "step 2: files/tokenizer.model is missing"
    )
    for empty in (tmp_path, tmp_path / "absent"):
        assert Reader(empty).steps() == [] and Reader(empty).latest_step() is None
        with pytest.raises(InputError, match="no step"):
            Reader(empty).restore(target_of(states[1]))


def test_a_damaged_step_makes_way_when_training_reaches_it_again(two_steps, mesh):
    directory, states = two_steps
    flip(directory / "2" / "config.json", 0)
    again = make_state(22, mesh)
    with Store(directory) as store:
        assert store.restore(target_of(states[1])).step == 1
        save(store, 2, again)
        store.wait()
        assert verify(directory) == []
        assert_same(store.restore(target_of(again)).state, again)


def test_a_step_that_is_there_is_never_overwritten(two_steps):
    directory, states = two_steps
    with Store(directory) as store:
        for step in (1, 2):
            with pytest.raises(InputError) as error:
                save(store, step, states[1])
            assert_one_line(error, "step 2 is there already")
        assert_same(store.restore(target_of(states[2])).state, states[2])


def test_missing_extra_and_differing_arrays_are_named_in_one_line(two_steps):
    directory, states = two_steps
    reader, target = Reader(directory), target_of(states[2])
    head = target.params["head"]

    def refuse(params, *parts):
        with pytest.raises(InputError) as error:
            reader.restore(target._replace(params=params))
        assert_one_line(error, str(directory / "2"), *parts)

    def with_head(shape, dtype):
        leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=head.sharding)
        return target.params | {"head": leaf}

    refuse(target.params | {"lora": head}, "lacks params/lora")
    refuse(target.params | {"head": None}, "not the model, params/head")
    types = "params/head (saved as float32[16,8], needed as "
    refuse(with_head((16, 8), jnp.bfloat16), types + "bfloat16[16,8])")
    refuse(with_head((16, 16), jnp.float32), types + "float32[16,16])")


def test_a_store_is_recognised_by_its_content(two_steps, tmp_path):
    directory, _ = two_steps
    assert is_store(directory)
    (tmp_path / "other" / "1").mkdir(parents=True)
    for other in (tmp_path / "other", tmp_path / "absent", directory / "2" / "config.json"):
        assert not is_store(other)
        with pytest.raises(InputError, match="no step"):
            verify(other)


def test_two_writers_exclude_each_other_and_readers_do_not_care(two_steps):
    directory, states = two_steps
    with Store(directory):
        with pytest.raises(InputError) as error:
            Store(directory)
        assert_one_line(error, "another process is writing there", str(directory))
        assert Reader(directory).restore(target_of(states[2])).step == 2
    Store(directory).close()


def test_leftovers_of_killed_saves_and_removals_go_at_the_start(two_steps):
    directory, _ = two_steps
    for name in ("3.unfinished/state.orbax-checkpoint-tmp", "1.removed/state"):
        (directory / name).mkdir(parents=True)
        (directory / name / "data").write_bytes(bytes(1000))
    (directory / "notes.unfinished").mkdir()  # not ours
    Store(directory).close()
    assert {path.name for path in directory.iterdir()} == {"1", "2", "lock", "notes.unfinished"}


@contextlib.contextmanager
def files_limited_to(size: int):
    """The kernel refuses to write beyond: what a full disk does, without a disk to fill."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 200, 20_000])
def test_a_failed_save_is_one_error_leaves_nothing_and_the_next_one_works(
    two_steps, mesh, limit, capfd
):
    directory, states = two_steps
    rng = np.random.default_rng(0)
    noise = jnp.asarray(rng.normal(size=10_000), jnp.float32)  # does not compress
    state = states[2]._replace(rng=jax.device_put(noise, NamedSharding(mesh, PartitionSpec())))
    with Store(directory) as store:
        with files_limited_to(limit), pytest.raises(SaveError) as error:
            save(store, 3, state)
            store.wait()
        assert_one_line(error, "step 3", str(directory), "File too large")
        assert {path.name for path in directory.iterdir()} == {"1", "2", "lock"}
        assert_same(store.restore(target_of(states[2])).state, states[2])
        with files_limited_to(limit):
            save(store, 4, state)
            assert store._saving and store._saving[1].exception()
        with pytest.raises(SaveError, match="step 4"):
            save(store, 5, state)
        store.wait()
        assert store.steps() == [1, 2, 5]
        assert_same(store.restore(target_of(state)).state, state)
    assert verify(directory) == []
    assert "Traceback" not in capfd.readouterr().err


@contextlib.contextmanager
def nursery(directory: Path):
    """The pipes of a process that forks a saving process for every line."""
    environment = os.environ | {"PYTHONPATH": str(CHILD.parents[2])}
    command = [sys.executable, str(CHILD), str(directory)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as parent:
        assert parent.stdin and parent.stdout
        yield parent.stdin, parent.stdout
        parent.stdin.close()


def assert_newest_step_is_right(directory: Path) -> int:
    everywhere = NamedSharding(make_mesh((2,), ("fsdp",)), PartitionSpec())
    blocks = {n: jax.ShapeDtypeStruct((64, 257), jnp.int32, sharding=everywhere) for n in range(4)}
    reader = Reader(directory)
    restored = reader.restore({"params": {"blocks": blocks}})
    assert restored.step == reader.steps()[-1]
    assert restored.config_json == str(restored.step)
    assert restored.iterator_states == (restored.config_json.encode(),)
    for n, block in restored.state["params"]["blocks"].items():
        np.testing.assert_array_equal(block, restored.step + n)
    return restored.step


def kill_and_restore(directory: Path, times: int, caplog) -> None:
    """Each run goes on from the step before, is killed somewhere, and must have got further."""
    newest = 0
    with nursery(directory) as (ask, answer):
        for _ in range(times):
            print(file=ask, flush=True)
            process = int(answer.readline())
            while not any(step > newest for step in Reader(directory).steps()):
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.5))
            os.kill(process, signal.SIGKILL)
            assert answer.readline() == "ended\n"
            step = assert_newest_step_is_right(directory)
            assert step > newest
            newest = step
    assert not caplog.records and verify(directory) == []


def test_the_newest_step_survives_every_kill(tmp_path, caplog):
    kill_and_restore(tmp_path, 5, caplog)


@pytest.mark.slow
def test_the_newest_step_survives_fifty_kills(tmp_path, caplog):
    kill_and_restore(tmp_path, 50, caplog)


def test_two_processes_save_agree_and_restore_and_one_process_can_read_it(tmp_path):
    child = CHILD.with_name("two_processes_child.py")
    environment = os.environ | {"PYTHONPATH": str(CHILD.parents[2])}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(child), str(tmp_path / "run"), str(port)]
    children = [subprocess.Popen([*command, str(n)], env=environment) for n in range(2)]
    assert [child.wait(timeout=300) for child in children] == [0, 0]

    sharding = NamedSharding(make_mesh((8,), ("fsdp",)), PartitionSpec("fsdp"))
    target = {"weight": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
    restored = Reader(tmp_path / "run").restore(target)
    assert restored.step == 2 and len(restored.iterator_states) == 2
    np.testing.assert_array_equal(restored.state["weight"], np.arange(8.0) * 20)
    assert verify(tmp_path / "run") == []
