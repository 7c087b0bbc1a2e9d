"""Hugging Face's format without Hugging Face's code: what is read, refused and written."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l32jax import presets
from l32jax.checkpoint import hugging_face, hugging_face_tiles
from l32jax.checkpoint.engine.slices import load
from l32jax.checkpoint.engine.sources import Source
from l32jax.checkpoint.engine.tables import their_shapes
from l32jax.checkpoint.formats import open_checkpoint
from l32jax.checkpoint.hugging_face_config import read_config
from l32jax.config import MeshConfig
from l32jax.errors import InputError
from l32jax.model.parameters import flatten
from l32jax.sharding import make_mesh
from tests import golden
from tests.checkpoint_tests.weights import (
    IN_USE,
    assert_same,
    export_hugging_face,
    random_params,
    targets,
)

IDS = hugging_face.TokenIds(begin=1, stop=(2,), pad=None)
MODELS = {"text": golden.TEXT, "vision": golden.VISION}
TILES = "vision_model.pre_tile_positional_embedding.embedding.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def params():
    return {name: random_params(config) for name, config in MODELS.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, params):
    """Directories called text and vision, and one of several files called sharded."""
    home = tmp_path_factory.mktemp("saved")
    for name, config in MODELS.items():
        export_hugging_face(params[name], config, home / name, dtype=np.float32, ids=IDS)
    export_hugging_face(
        params["text"],
        golden.TEXT,
        home / "sharded",
        dtype=np.float32,
        ids=IDS,
        max_file_bytes=200_000,
    )
    return home


@pytest.fixture
def copied(saved, tmp_path):
    """A function that copies one of the directories, to damage it."""
    return lambda name: shutil.copytree(saved / name, tmp_path / name)


def load_directory(directory, config=golden.TEXT):
    return load(hugging_face.open_directory(directory, config), targets(config))


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact_on_every_mesh(name, saved, params):
    config = read_config(saved / name)
    assert config == MODELS[name]
    assert_same(load_directory(saved / name, config), params[name])
    wanted = targets(config, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    ours = load(hugging_face.open_directory(saved / name, config), wanted)
    assert_same(ours, params[name])
    for path, leaf in flatten(ours).items():
        assert leaf.sharding == flatten(wanted)[path].sharding, path


def test_meta_and_hugging_face_hold_the_same_model(tmp_path):
    """But for the eight places of the tile grids that are in no aspect ratio."""
    params = golden.load_meta("mllama_tiny_meta", golden.VISION)
    export_hugging_face(params, golden.VISION, tmp_path / "hf", dtype=np.float32, ids=IDS)
    back = flatten(load_directory(tmp_path / "hf", golden.VISION))
    assert open_checkpoint(tmp_path / "hf").notes == (hugging_face_tiles.LOST_TILES,)
    for path, leaf in flatten(params).items():
        ours, theirs = np.asarray(back[path]), np.asarray(leaf)
        if path.startswith("vision/") and ours.shape[:2] == (4, 4):
            assert not ours[~IN_USE].any() and theirs[~IN_USE].any()
            ours, theirs = ours[IN_USE], theirs[IN_USE]
        np.testing.assert_array_equal(ours, theirs, err_msg=path)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.1-8b", 8_030_261_248),
        ("llama3.2-11b-vision", 10_642_941_475),
        ("llama3.2-11b-vision-instruct", 10_670_220_835),
        ("llama3.2-90b-vision", 88_593_355_323),
    ],
)
def test_released_models_have_hugging_faces_parameter_counts(name, count):
    config = presets.preset(name)
    shapes = {path: leaf.shape for path, leaf in flatten(targets(config)).items()}
    theirs = their_shapes(hugging_face.table(config), shapes)
    assert sum(int(np.prod(shape)) for shape in theirs.values()) == count


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_each_dtype_is_written_and_read(dtype, tmp_path, params):
    export_hugging_face(params["vision"], golden.VISION, tmp_path / "x", dtype=dtype, ids=IDS)
    ours = load(
        hugging_face.open_directory(tmp_path / "x", golden.VISION),
        targets(golden.VISION, dtype=dtype),
    )
    assert_same(ours, jax.tree.map(lambda leaf: leaf.astype(dtype), params["vision"]))
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["torch_dtype"] == np.dtype(dtype).name


def test_large_exports_are_several_files_and_an_index(saved, params):
    files = sorted(path.name for path in (saved / "sharded").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert max((saved / "sharded" / file).stat().st_size for file in files) < 220_000
    assert_same(load_directory(saved / "sharded"), params["text"])
    index = json.loads((saved / "sharded" / INDEX).read_text())
    whole = safetensors.numpy.load_file(saved / "text" / WEIGHTS)
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())


def test_rows_of_tile_tables_must_agree(saved):
    arrays = safetensors.numpy.load_file(saved / "vision" / WEIGHTS)

    def load_with(row, tile):
        table = arrays[TILES].reshape(9, 4, -1).copy()
        table[row, tile] += 1
        changed = Source.of({**arrays, TILES: table.reshape(9, -1)}, "memory")
        load(hugging_face.open_tensors(changed, golden.VISION), targets(golden.VISION))

    with pytest.raises(InputError, match=rf"'{TILES}' in memory: its rows disagree.*\(0, 0\)"):
        load_with(row=2, tile=0)
    with pytest.raises(InputError, match="its row for 1x2 tiles has values for tiles beyond"):
        load_with(row=2, tile=3)
    load_with(row=4, tile=3)  # (0, 3) is a cell of 1 x 4 tiles alone
    load_with(row=0, tile=2)  # of absent images, which are never encoded


def test_stored_copy_of_a_tied_head_must_be_one(copied):
    directory = copied("text")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(InputError, match="'lm_head.weight' differs from 'model.embed_tokens"):
        load_directory(directory, read_config(directory))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("model.norm.weight"), "'model.norm.weight' is missing: decoder/final_"),
        (lambda a: a.update({"model.layers.3.x": a["model.norm.weight"]}), "has no place"),
        (lambda a: a.update({"model.norm.weight": np.ones(63, "f4")}), r"has shape \[63\]: dec"),
        (lambda a: a.update({"model.norm.weight": np.ones(64, "i4")}), "dtype I32, expected F32"),
    ],
)
def test_weights_that_do_not_fit_are_one_error(change, message, copied):
    directory = copied("text")
    arrays = safetensors.numpy.load_file(directory / WEIGHTS)
    change(arrays)
    safetensors.numpy.save_file(arrays, directory / WEIGHTS)
    with pytest.raises(InputError, match=message):
        load_directory(directory)


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/passwd", "a\\b", "..", "", "x\n"])
def test_index_cannot_lead_out_of_its_directory(name, copied):
    directory = copied("sharded")
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="is not the name of a file"):
        load_directory(directory)


def test_links_stay_inside_or_in_the_cache_of_hugging_face(saved, tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "1", tmp_path / "models--x" / "blobs"
    for folder in (snapshot, blobs, tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    shutil.copy(saved / "text" / WEIGHTS, blobs / "0")
    (snapshot / WEIGHTS).symlink_to("../../blobs/0")
    load_directory(snapshot)
    (tmp_path / "elsewhere" / WEIGHTS).symlink_to(blobs / "0")
    with pytest.raises(InputError, match="outside of it"):
        load_directory(tmp_path / "elsewhere")


def test_index_and_files_must_agree(copied):
    directory = copied("sharded")
    index = json.loads((directory / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="'model.norm.weight' is in the file or in .* not in both"):
        load_directory(directory)


def test_absent_weights_are_told_as_such(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="no file 'model.safetensors'; only safetensors are read"):
        load_directory(tmp_path)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_file_is_an_input_error_or_loads(data, saved, tmp_path):
    """Truncated anywhere, or with a byte of its header changed."""
    content = bytearray((saved / "text" / WEIGHTS).read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / WEIGHTS).write_bytes(content)
    try:
        load_directory(tmp_path)
    except InputError as error:
        assert "\n" not in str(error)


def test_failed_export_leaves_nothing(tmp_path, params):
    with pytest.raises(OSError, match="too long"):
        export_hugging_face(
            params["text"],
            golden.TEXT,
            tmp_path / "out",
            dtype=np.float32,
            ids=IDS,
            extra_files={"x" * 300: b""},
        )
    assert not list(tmp_path.iterdir())


def test_export_does_not_overwrite_and_takes_plain_names(saved, params, tmp_path):
    def export(directory, **how):
        export_hugging_face(
            params["text"], golden.TEXT, directory, dtype=np.float32, ids=IDS, **how
        )

    with pytest.raises(InputError, match="it exists"):
        export(saved / "text")
    for name in ("../tokenizer.json", "config.json", "model.safetensors"):
        with pytest.raises(InputError, match="not a free name"):
            export(tmp_path / "new", extra_files={name: b"{}"})
    export(tmp_path / "new", extra_files={"tokenizer.json": b"{}"})
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == b"{}"
