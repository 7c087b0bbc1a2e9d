"""Thousands of damaged and malicious checkpoints: each is opened, or refused in one line.

benchmarks/fuzz_checkpoints.py makes the same at random, for as long as one likes.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l32jax.checkpoint.formats import open_checkpoint
from l32jax.errors import InputError
from tests.checkpoint_tests.fuzzing import cases, odd_folders, odd_gguf, opening_child, seeds
from tests.checkpoint_tests.fuzzing.worker import Worker

FEW, MANY = 60, 250  # of each format


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return seeds.make(tmp_path_factory.mktemp("seeds"))


@pytest.fixture(scope="module")
def worker(made, tmp_path_factory):
    """Its seeds are all opened once, so each is known to be fine."""
    worker = Worker(tmp_path_factory.mktemp("worker") / "log", made)
    yield worker
    worker.close()


def fuzz(format, count, made, worker, tmp_path_factory):
    chosen = [seed for seed in made if seed.format == format]

    # The same cases in every run: a failure is due to a change. The benchmark looks for new ones.
    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(number=st.integers(0, 2**64 - 1))
    def odd_checkpoints_are_refused(number):
        folder = tmp_path_factory.mktemp("case")
        path, kind = cases.make(chosen, folder, number)
        outcome = worker.open(path, kind)
        assert outcome.complaint is None, outcome
        shutil.rmtree(folder)

    odd_checkpoints_are_refused()


@pytest.mark.parametrize("format", seeds.FORMATS)
def test_odd_checkpoints(format, made, worker, tmp_path_factory):
    fuzz(format, FEW, made, worker, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("format", seeds.FORMATS)
def test_many_odd_checkpoints(format, made, worker, tmp_path_factory):
    fuzz(format, MANY, made, worker, tmp_path_factory)


# What fuzzing has found, each by itself.


@pytest.fixture
def copy(made, tmp_path):
    def copied(format: str) -> Path:
        seed = next(seed for seed in made if seed.format == format)
        shutil.copytree(seed.path.parent, tmp_path / "copy")
        return tmp_path / "copy" / seed.path.name

    return copied


def assert_refused(path: Path, reason: str, kind: str = "model") -> None:
    with pytest.raises(InputError) as caught:
        opening_child.opened(path, kind)
    assert opening_child.complaint(caught.value, path) is None
    assert reason in str(caught.value)


def change_header(path: Path, change) -> None:
    """Of a safetensors file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    text = change(json.loads(content[8:end])).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def with_config(change):
    def changed(header) -> str:
        config = json.loads(header["__metadata__"]["l32jax_config"])
        change(config["decoder"])
        header["__metadata__"]["l32jax_config"] = json.dumps(config)
        return json.dumps(header)

    return changed


def many_dims(header) -> str:
    entry = next(entry for name, entry in header.items() if name != "__metadata__")
    entry["shape"] = [1] * 70 + entry["shape"]
    return json.dumps(header)


def deep_config(header) -> str:
    header["__metadata__"]["l32jax_config"] = '{"a":' * 100_000
    return json.dumps(header)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (many_dims, "dimensions"),
        (deep_config, "not JSON"),
        (lambda header: '{"x": {"dtype": "\x1b[2J' + "F" * 9000, "download"),
        (with_config(lambda decoder: decoder.update(num_groups=10**9)), "num_groups"),
        (with_config(lambda decoder: decoder.update(embed_dim=10**30)), "embed_dim"),
        (with_config(lambda decoder: decoder.update(num_kv_heads=3)), "num_heads=4 must be"),
        (with_config(lambda decoder: decoder.update({"x" * 9000: 1})), "no field"),
        (with_config(lambda decoder: decoder.update(norm_eps="x" * 9000)), "norm_eps"),
        (
            with_config(lambda decoder: decoder.update(group_pattern=["self"] * 41)),
            "group_pattern of 41",
        ),
    ],
)
def test_headers_of_ours(change, reason, copy):
    path = copy("safetensors")
    change_header(path, change)
    assert_refused(path, reason)


def test_sizes_that_disagree_name_their_file(copy):
    path = copy("hf")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 3}))
    assert_refused(path, "num_heads=4 must be a multiple")


def test_an_index_with_names_that_no_file_can_have(copy):
    path = copy("hf")
    index = path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00003", "x" * 300))
    assert_refused(path, "not the name of a file")


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "config.json", "model-00001-of-00003.safetensors"]
)
def test_links_out_of_a_folder_are_not_followed(name, copy):
    path = copy("hf")
    outside = path.parent / "outside"
    (path / name).rename(outside)
    (path / name).symlink_to(outside)
    assert_refused(path, "links to")


def test_links_into_the_hubs_cache_are_followed(copy, tmp_path):
    path = copy("meta")
    blobs, folder = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc" / "original"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    for file in path.iterdir():
        file.rename(blobs / file.name)
        (folder / file.name).symlink_to(blobs / file.name)
    assert open_checkpoint(folder).format == "meta"


@pytest.mark.parametrize(
    ("format", "name", "kind"),
    [
        ("meta", "consolidated.00.pth", "model"),
        ("peft", "adapter_config.json", "peft-text"),
        ("orbax", "0/config.json", "model"),
    ],
)
def test_nobody_waits_for_a_pipe(format, name, kind, copy):
    path = copy(format)
    (path / name).unlink()
    os.mkfifo(path / name)
    assert_refused(path, name, kind)


def test_a_link_in_a_circle(copy):
    path = copy("orbax") / "0" / "config.json"
    path.unlink()
    path.symlink_to(path.name)
    assert_refused(path.parents[1], "not a regular file")


@pytest.mark.parametrize("name", ["a\0b", "\x1b[2J", "a" * 5000])
def test_digests_of_names_that_no_file_has(name, copy):
    path = copy("orbax")
    sidecar = path / "0" / "digests.sha256"
    _, _, lines = sidecar.read_text().partition("\n")
    odd_folders.write_lines(sidecar, f"{lines}{'0' * 64}  {name}\n")
    assert_refused(path, "digests.sha256 is damaged")


@pytest.mark.parametrize("name", ["\u0663", "00", "9" * 200])
def test_only_what_a_step_is_called_is_one(name, copy):
    path = copy("orbax")
    (path / "0").rename(path / name)
    with pytest.raises(InputError, match="no config.json"):
        open_checkpoint(path)


def test_a_list_in_place_of_a_name(copy):
    path = copy("gguf")
    parts = odd_gguf.taken_apart(path.read_bytes())
    parts.keys = [
        (name, odd_gguf.ARRAY, (4, [1])) if name == "tokenizer.ggml.pre" else (name, kind, value)
        for name, kind, value in parts.keys
    ]
    path.write_bytes(odd_gguf.together(parts))
    assert_refused(path, "pre-tokenizer")
