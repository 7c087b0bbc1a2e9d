"""The engine that writes checkpoints: whole or not at all, and again after every kind of stop."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from l32jax.checkpoint import own_safetensors
from l32jax.checkpoint.engine import manifest, workplace
from l32jax.checkpoint.engine.slices import Slices, load
from l32jax.checkpoint.engine.sources import Source, Tensor
from l32jax.checkpoint.engine.transfer import (
    BLOCK_BYTES,
    SLAB_BYTES,
    read_slabs,
    require_finite,
    slabs,
    write,
)
from l32jax.checkpoint.engine.workplace import Workplace
from l32jax.checkpoint.failures import SaveError
from l32jax.errors import InputError
from l32jax.model.parameters import flatten
from tests import golden
from tests.checkpoint_tests.weights import assert_same, random_params, targets

TASK = {"of": "vision"}


@pytest.fixture(scope="module")
def params():
    return random_params(golden.VISION)


@pytest.fixture(scope="module")
def slices(params):
    return Slices.of(params)


def output_of(slices):
    return own_safetensors.plan(slices, golden.VISION, about={"format": "safetensors"})


def failing(slices: Slices, error: BaseException, after: int) -> Slices:
    """Reads well so many times, and then not."""
    reads = iter(range(after))

    def read(home, rows):
        if next(reads, None) is None:
            raise error
        return slices.read(home, rows)

    return replace(slices, read=read)


def test_our_own_file_has_our_names_and_comes_back(slices, params, tmp_path):
    path = tmp_path / "model.safetensors"
    write(output_of(slices), path)
    arrays = safetensors.numpy.load_file(path)
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(arrays[name], np.asarray(leaf), err_msg=name)
        assert arrays[name].shape == leaf.shape
    config, back = own_safetensors.open_model(path)
    assert config == golden.VISION
    assert_same(load(back, targets(config)), params)
    assert manifest.problems(manifest.beside(path)) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model.safetensors",
        "model.safetensors.manifest.json",
    ]


def test_manifest_finds_the_tensor_that_changed(slices, tmp_path):
    path = tmp_path / "model.safetensors"
    write(output_of(slices), path)
    listing = manifest.manifest_of(path)
    assert listing is not None
    tensors = json.loads(listing.read_text())["tensors"]
    name = random.Random(0).choice(sorted(tensors))
    with path.open("r+b") as file:
        file.seek(tensors[name]["offset"] + tensors[name]["bytes"] - 1)
        file.write(b"\xff")
    (problem,) = manifest.problems(listing)
    assert repr(name) in problem
    path.write_bytes(path.read_bytes()[:-1])
    assert manifest.problems(listing)


def test_killed_three_times_and_resumed_it_is_the_same_file(slices, tmp_path):
    write(output_of(slices), tmp_path / "whole")
    command = [sys.executable, "-m", "tests.checkpoint_tests.killed_child", tmp_path / "killed"]
    moments, num_done = random.Random(1), []
    for kill in range(3):
        child = subprocess.Popen([*command, *["resume"] * bool(kill)], stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline() == b"begun\n"
        time.sleep(moments.uniform(0.05, 0.25))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert not (tmp_path / "killed").exists()
        journal = tmp_path / "killed.unfinished" / workplace.JOURNAL
        num_done.append(journal.read_bytes().count(b"\n") if journal.exists() else 0)
    assert num_done == sorted(num_done) and num_done[-1] > 1, "the kills hit no work"
    subprocess.run([*command, "resume"], check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "killed.unfinished").exists()


def test_what_was_done_is_not_done_again(slices, tmp_path):
    path, half = tmp_path / "x", len(list(slices.homes())) // 2
    with pytest.raises(OSError, match="cable"):
        write(output_of(failing(slices, OSError("cable"), after=half)), path, TASK)
    with pytest.raises(InputError, match="go on with it by --resume"):
        write(output_of(slices), path, TASK)
    with pytest.raises(InputError, match=r"has of 'vision', this is 'text'"):
        write(output_of(slices), path, {"of": "text"}, resume=True)
    with pytest.raises(OSError, match="cable"):  # nothing was lost by asking
        write(output_of(failing(slices, OSError("cable"), after=half)), path, TASK, resume=True)
    write(output_of(failing(slices, OSError("cable"), after=half)), path, TASK, resume=True)
    write(output_of(slices), tmp_path / "y")
    assert path.read_bytes() == (tmp_path / "y").read_bytes()


def test_resume_begins_where_there_is_nothing_and_forgets_half_a_line(slices, tmp_path):
    path = tmp_path / "x"
    with pytest.raises(OSError, match="cable"):
        write(output_of(failing(slices, OSError("cable"), after=30)), path, TASK, resume=True)
    with (tmp_path / "x.unfinished" / workplace.JOURNAL).open("ab") as file:
        file.write(b'{"unit": "model.safete')
    write(output_of(slices), path, TASK, resume=True)
    assert path.exists()


def test_a_damaged_journal_is_said(slices, tmp_path):
    with pytest.raises(OSError, match="cable"):
        write(output_of(failing(slices, OSError("cable"), after=3)), tmp_path / "x", TASK)
    (tmp_path / "x.unfinished" / workplace.JOURNAL).write_bytes(b"\x00\n")
    with pytest.raises(InputError, match="damaged"):
        write(output_of(slices), tmp_path / "x", TASK, resume=True)


def test_ctrl_c_keeps_what_is_done(slices, tmp_path):
    class Impatient:
        def begin(self, what: str, total: int) -> None:
            self.left = 20

        def advance(self, amount: int) -> None:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)

    def read(home, rows):
        time.sleep(0.002)
        return slices.read(home, rows)

    # Shells let what they start in the background ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        slow = replace(slices, read=read)
        write(output_of(slow), tmp_path / "x", TASK, progress=Impatient())
    signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "x").exists()
    write(output_of(slices), tmp_path / "x", TASK, resume=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_values_that_are_no_numbers_are_refused_and_nothing_is_written(bad, dtype, tmp_path):
    params = jax.tree.map(lambda leaf: np.array(leaf), random_params(golden.TEXT))
    params["decoder"]["groups"]["blocks"][0]["mlp"]["up"]["weight"][1, 2, 3] = bad
    slices = Slices.of(params).as_dtype(dtype)
    output = own_safetensors.plan(slices, golden.TEXT, about={})
    with pytest.raises(InputError, match=r"'decoder/groups/blocks/0/mlp/up/weight' .* NaN or inf"):
        write(output, tmp_path / "x", TASK)
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=40), st.booleans())
def test_finite_is_what_numpy_says(bits, wide):
    dtype = np.dtype(np.float16 if wide else jnp.bfloat16)
    values = np.array(bits, np.uint16).view(dtype)
    try:
        require_finite(values, "x", "y")
        assert np.isfinite(values.astype(np.float32)).all()
    except InputError:
        assert not np.isfinite(values.astype(np.float32)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("at", [0, 1, BLOCK_BYTES, -1])
def test_one_number_among_many_is_found(dtype, at):
    values = np.zeros((3, BLOCK_BYTES + 7), dtype).T
    require_finite(values, "x", "y")
    require_finite(np.zeros((0, 3), dtype), "x", "y")
    values[at, 1] = np.nan
    for one in (values, values[at, 1]):
        with pytest.raises(InputError, match="NaN or infinite"):
            require_finite(np.asarray(one), "x", "y")


@given(
    st.integers(0, 5000),
    st.integers(1, 20),
    st.sampled_from([1, 3, 64, 4096, SLAB_BYTES // 2, SLAB_BYTES]),
)
def test_slabs_are_whole_steps_that_cover_each_row_once(steps, step, row_bytes):
    tensor = Tensor((steps * step, row_bytes), np.dtype(np.uint8), step)
    parts = list(slabs(tensor))
    rows = [row for part in parts for row in range(part.start, part.stop)]
    assert rows == list(range(steps * step))
    for part in parts:
        assert part.start % step == part.stop % step == 0
        assert part.stop - part.start == step or (part.stop - part.start) * row_bytes <= SLAB_BYTES


def test_slabs_are_read_and_their_pages_released_in_turn():
    values = np.arange(SLAB_BYTES // 2, dtype=np.float32).reshape(-1, 1024)
    log = []

    def read(name, rows):
        log.append(rows)
        return values[rows]

    tensors = {"x": Tensor(values.shape, values.dtype)}
    source = Source("memory", tensors, read, lambda: log.append("released"))
    parts = list(read_slabs(source, "x"))
    assert np.array_equal(np.concatenate(parts), values)
    assert len(parts) == 2 and [entry == "released" for entry in log] == [False, True] * 2


def test_room_is_looked_for_before_anything_is_written(slices, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(workplace.shutil, "disk_usage", lambda _: usage(0, 0, 1000))
    with pytest.raises(InputError, match=r"it needs 0\.0 GiB, .* make room"):
        write(output_of(slices), tmp_path / "x", TASK)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    with pytest.raises(OSError, match="cable"):
        write(output_of(failing(slices, OSError("cable"), after=30)), tmp_path / "x", TASK)
    monkeypatch.setattr(workplace.shutil, "disk_usage", lambda _: usage(0, 0, 1000))
    with pytest.raises(SaveError, match="make room"):  # and keeps what was done
        write(output_of(slices), tmp_path / "x", TASK, resume=True)
    monkeypatch.undo()
    write(output_of(slices), tmp_path / "x", TASK, resume=True)


def test_one_writer_at_a_time_and_no_overwriting(slices, tmp_path):
    with (
        Workplace(tmp_path / "x", TASK),
        pytest.raises(InputError, match="another process is writing there"),
    ):
        write(output_of(slices), tmp_path / "x", TASK, resume=True)
    (tmp_path / "y").write_text("mine")
    with pytest.raises(InputError, match="it exists"):
        write(output_of(slices), tmp_path / "y", TASK)
    assert (tmp_path / "y").read_text() == "mine"
