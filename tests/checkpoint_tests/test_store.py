import contextlib
import logging
import os
import random
import resource
import shutil
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

from l32jax.checkpoint import digests
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


def test_everything_of_a_step_comes_back_bit_for_bit(two_steps):
    directory, states = two_steps
    with Store(directory) as store:
        restored = store.restore(target_of(states[2]))
        assert_same(restored.state, states[2])
        assert (restored.step, restored.config_json) == (2, '{"step": 2}')
        assert restored.iterator_states == (b"at 2",)
        assert store.steps() == [1, 2] and store.latest_step() == 2
        assert store.read_file("tokenizer.model") == b"\2"
        assert store.read_config(step=1) == '{"step": 1}'


def test_one_directory_holds_all_of_a_step(two_steps):
    directory, _ = two_steps
    assert {path.name for path in directory.iterdir()} == {"1", "2", "lock"}
    assert {path.name for path in (directory / "2").iterdir()} == {
        *("state", "iterator", "files", "config.json", digests.SIDECAR)
    }
    assert verify(directory) == []


def test_training_may_donate_the_state_while_it_is_saved(tmp_path, mesh):
    train = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 + 7, s), donate_argnums=0)
    state = {"w": jax.device_put(jnp.arange(2**20, dtype=jnp.float32), NamedSharding(mesh, PartitionSpec("fsdp")))}
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


def test_params_alone_can_be_restored(two_steps, mesh):
    directory, states = two_steps
    params = Reader(directory).restore_params(target_of(states[2].params))
    assert_same(params, states[2].params)


def test_a_flipped_bit_in_any_file_falls_back_to_the_step_before(two_steps, caplog):
    directory, states = two_steps
    target, reader = target_of(states[1]), Reader(directory)
    for path in files_of(directory / "2"):
        size = path.stat().st_size * 8
        for bit in {0, size // 2, size - 1, random.randrange(size)}:
            flip(path, bit)
            assert len(verify(directory)) == 1
            flip(path, bit)
        flip(path, random.randrange(size))
        caplog.clear()
        restored = reader.restore(target)
        path.write_bytes(path.read_bytes())
        assert restored.step == 1 and restored.config_json == '{"step": 1}'
        assert_same(restored.state, states[1])
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert path.relative_to(directory / "2").as_posix() in record.getMessage()
        assert str(directory / "2") in record.getMessage() and "\n" not in record.getMessage()
        shutil.rmtree(directory / "2")
        shutil.copytree(directory.with_name("good"), directory / "2")


@pytest.fixture(autouse=True)
def good_copy(request):
    """The flipping test puts back a whole step between two files."""
    if "flipped_bit_in_any" in request.node.name:
        directory, _ = request.getfixturevalue("two_steps")
        shutil.copytree(directory / "2", directory.with_name("good"))
