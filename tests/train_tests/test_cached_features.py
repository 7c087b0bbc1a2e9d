"""Features computed once: the same training, whatever stopped them on the way."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import jax
import numpy as np
import pytest

from l32jax.config import MeshConfig
from l32jax.data import batches as data_batches
from l32jax.data.batches import place
from l32jax.data.feature_parts import Part
from l32jax.data.features import Features
from l32jax.data.packing import RowShape
from l32jax.data.rows import VisionShape
from l32jax.data.sources.open import open_source
from l32jax.data.streams import Rows
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from l32jax.model.llama import Images, abstract_params, bind
from l32jax.model.parameters import combine, flatten, partition, trains
from l32jax.sharding import make_mesh, single_device_mesh
from l32jax.train import features as computing
from l32jax.train import loop
from l32jax.train.features import compute_features, encoder_digest
from l32jax.train.objectives import next_token
from tests.checkpoint_tests.weights import random_params
from tests.train_tests import cached_stage
from tests.train_tests.small import MODEL

TOKENIZER = Tokenizer.bytes_only()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return cached_stage.write_documents(tmp_path_factory.mktemp("documents"))


def compute(source: str, folder: Path, mesh=None, stops=lambda: False, params=None) -> None:
    config, mesh = cached_stage.config(source, str(folder)), mesh or single_device_mesh()
    with jax.set_mesh(mesh):
        params = params or random_params(MODEL, mesh)
        compute_features(config, config.stages[0], TOKENIZER, params, mesh, stops=stops)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "whole"
    compute(source, folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def batches_of(source: str, features: Features | None, count: int) -> list[dict]:
    data = cached_stage.config(source, None).stages[0].data
    vision = VisionShape.of(
        MODEL, max_images=data.max_images, max_tiles=data.max_tiles, slots=data.vision_tiles
    )
    rows = Rows(shape=RowShape(length=data.length, vision=vision), open_rows=3, features=features)
    opened = open_source(source, TOKENIZER, with_images=True)
    made = data_batches.make_batches(
        [opened], [1.0], rows, batch_size=data.batch_size, seed=0, max_bad=data.max_bad
    )
    try:
        found = [next(made) for _ in range(count)]
        assert made.bad > 0, "broken pictures are skipped in both ways"
        return found
    finally:
        made.close()


def start_child(source: str, folder: Path, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.train_tests.features_child", source, folder]
    return subprocess.Popen(
        [*map(str, (*command, *arguments))],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_losses_and_gradients_are_those_of_encoding_in_every_step(devices, source, tmp_path):
    mesh = single_device_mesh() if devices == 1 else make_mesh(MeshConfig(data=2, fsdp=4))
    compute(source, tmp_path / "kept", mesh)
    with jax.set_mesh(mesh):
        trainable, frozen = partition(random_params(MODEL, mesh), trains(("adapter",), MODEL))

        @jax.jit
        def gradient(batch):
            def loss(trainable):
                model = bind(MODEL, combine(trainable, frozen))
                return next_token(model, batch, jax.random.key(0), dtype=np.float32)

            return jax.value_and_grad(loss, has_aux=True)(trainable)

        pairs = zip(
            *(batches_of(source, each, 3) for each in (None, Features(tmp_path / "kept"))),
            strict=True,
        )
        text_alone = 0
        for plain, kept in pairs:
            images = (plain["aspect"].prod(axis=-1) > 0).sum(axis=1)
            assert images.max() > 1, "packed rows"
            text_alone += np.sum((plain["vision_stop"] == 0) & (plain["weights"] > 0))
            (loss, sums), grads = gradient(place(plain, mesh))
            (same, same_sums), same_grads = gradient(place(kept, mesh))
            weight = float(sums["weight"])
            assert weight == same_sums["weight"] > 0
            np.testing.assert_allclose(same / weight, loss / weight, atol=1e-5, rtol=0)
            wanted = flatten(grads)
            for path, leaf in flatten(same_grads).items():
                np.testing.assert_allclose(
                    leaf / weight, wanted[path] / weight, atol=1e-5, rtol=0, err_msg=path
                )
            gates = [leaf for path, leaf in wanted.items() if path.endswith("gate")]
            assert all(np.abs(leaf).min() > 0 for leaf in gates)
        assert text_alone > 0


def test_killed_while_computing_and_resumed_is_byte_for_byte_the_same(source, whole, tmp_path):
    """While images are listed, and between a unit's tiles and the mark that it is done."""
    folder = tmp_path / "killed"
    for lives in (1, 2):
        child = start_child(source, folder, lives)
        _, errors = child.communicate()
        assert child.returncode == -signal.SIGKILL, errors[-3000:]
        assert content(folder) != content(whole)
    (part,) = folder.glob("part-*")
    tiles, units = ({path.name for path in (part / each).iterdir()} for each in ("tiles", "units"))
    assert "c.1.0.0.0" in tiles and "00000001.json" not in units
    compute(source, folder)
    assert content(folder) == content(whole)


@pytest.mark.slow
def test_two_processes_share_the_work(source, whole, tmp_path):
    """Each writes units of its own, and nothing else differs but the last bits of features."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start_child(source, tmp_path / "kept", 99, port, each) for each in (0, 1)]
    for child in children:
        _, errors = child.communicate()
        assert child.returncode == 0, errors[-3000:]
    mine, theirs = content(tmp_path / "kept"), content(whole)
    assert mine.keys() == theirs.keys()
    listed = {name for name in mine if not name.startswith("features.json") and "/c." not in name}
    assert all(mine[name] == theirs[name] for name in listed)
    paths = list(Path(source).parent.glob("1*.png"))
    features = [Features(each) for each in (tmp_path / "kept", whole)]
    read = [each.read([each.find(path) for path in paths], 4 * len(paths)) for each in features]
    np.testing.assert_allclose(*read, atol=1e-5)


def test_stopped_after_a_unit_it_goes_on_with_the_next(source, whole, tmp_path):
    def stops() -> bool:
        return any(tmp_path.glob("kept/part-*/images.npy"))

    with pytest.raises(computing.Stopped):
        compute(source, tmp_path / "kept", stops=stops)
    (units,) = tmp_path.glob("kept/part-*/units")
    assert len(list(units.iterdir())) == 1
    compute(source, tmp_path / "kept")
    assert content(tmp_path / "kept") == content(whole)


def test_what_is_there_is_not_computed_again(source, whole, tmp_path, monkeypatch):
    """Neither at a second start, nor for another source with some of the images."""
    folder = shutil.copytree(whole, tmp_path / "kept")
    monkeypatch.setattr(computing, "list_images", None)
    compute(source, folder)
    assert content(folder) == content(whole)
    monkeypatch.undo()
    lines = Path(source).read_text().splitlines()
    other = Path(source).with_name("others.jsonl")
    other.write_text("\n".join(lines[:30]) + "\n")
    compute(str(other), folder)
    stored = [each.relative_to(folder) for each in folder.glob("part-*/tiles/c.*")]
    added = [each for each in stored if not (whole / each).exists()]
    assert added == []
    kind = Features(folder).kind
    assert all(Part(each, kind).done.all() for each in folder.glob("part-*"))


def test_another_encoder_is_refused_and_another_adapter_is_not(source, whole):
    with jax.set_mesh(single_device_mesh()):
        params, other = random_params(MODEL), random_params(MODEL, seed=2)
        digest = encoder_digest(MODEL, params)
        assert digest != encoder_digest(MODEL, other)
        assert digest == encoder_digest(MODEL, other | {"vision": params["vision"]})
    with pytest.raises(InputError, match="they are of encoder=[0-9a-f]{12} instead of"):
        compute(source, whole, params=other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_have_the_dtype_of_their_pixels_whatever_the_parameters(dtype):
    """Through the global blocks too, before which a table of the parameters' dtype is added."""
    pixels = jax.ShapeDtypeStruct((1, 1, 4, 3, 28, 28), dtype)
    aspect, index = (jax.ShapeDtypeStruct(shape, "int32") for shape in ((1, 1, 2), (1, 0)))

    def encode(params, *images):
        return bind(MODEL, params).features(Images(*images))

    with jax.set_mesh(single_device_mesh()):
        params = abstract_params(MODEL)
        found = jax.eval_shape(encode, params, pixels, aspect, index)
    assert {leaf.dtype.name for leaf in flatten(params).values()} == {"float32"}
    assert found.dtype == dtype


def test_the_digest_does_not_depend_on_the_mesh():
    with jax.set_mesh(single_device_mesh()):
        params = random_params(MODEL)
        digest = encoder_digest(MODEL, params)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        spread = random_params(MODEL, mesh)
        assert encoder_digest(MODEL, spread) == digest


def test_sizes_are_told_and_a_disk_without_room_is_refused(source, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="and 1 kB are free") as error:
        compute(source, tmp_path / "kept")
    assert "\n" not in str(error.value)
    assert "vision features of 40 images, 116 tiles: 148 kB, 3.71 kB an image" in (
        capsys.readouterr().err
    )
    assert not list(tmp_path.glob("kept/part-*/tiles/*"))


def losses(config) -> list[float]:
    loop.train(config, TOKENIZER, random_params(MODEL), single_device_mesh())
    lines = (Path(config.directory) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_run_with_features_learns_what_one_without_does(source, tmp_path, monkeypatch):
    given = []

    def witnessed(batch, mesh):
        given.append({"tiles", "features"} & batch.keys())
        return place(batch, mesh)

    monkeypatch.setattr(loop, "place", witnessed)
    plain = losses(cached_stage.config(source, None, str(tmp_path / "plain")))
    kept = str(tmp_path / "features")
    found = losses(cached_stage.config(source, kept, str(tmp_path / "kept")))
    assert given == [{"tiles"}] * 4 + [{"features"}] * 4
    np.testing.assert_allclose(found, plain, atol=1e-5, rtol=0)
