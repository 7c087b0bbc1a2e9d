import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l32jax.checkpoint.engine import digests

CONTENTS = {"a": b"one byte more than none", "deep/er/b.bin": bytes(range(256)) * 64, "empty": b""}


@pytest.fixture
def directory(tmp_path):
    return written(tmp_path / "step", CONTENTS)


def written(directory: Path, contents: dict[str, bytes]) -> Path:
    directory.mkdir()
    for name, content in contents.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    digests.write(directory)
    return directory


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_untouched_files_have_no_problems(directory):
    assert digests.problems(directory) == []
    digests.write(directory)
    assert digests.problems(directory) == []


@settings(max_examples=60)
@given(
    contents=st.dictionaries(
        st.sampled_from(["a", "b.bin", "c/d", "c/e/f", "ünïcode name"]), st.binary(max_size=300)
    ),
    data=st.data(),
)
def test_any_flipped_bit_of_any_file_is_found(contents, data):
    with tempfile.TemporaryDirectory() as root:
        directory = written(Path(root) / "step", contents)
        files = [path for path in directory.rglob("*") if path.is_file() and path.stat().st_size]
        path = data.draw(st.sampled_from(sorted(files)))
        flip(path, data.draw(st.integers(0, path.stat().st_size * 8 - 1)))
        (problem,) = digests.problems(directory)
        assert problem.startswith(path.relative_to(directory).as_posix())


def test_every_bit_of_the_sidecar_counts(directory):
    sidecar = directory / digests.SIDECAR
    for bit in range(sidecar.stat().st_size * 8):
        flip(sidecar, bit)
        assert digests.problems(directory) == [f"{digests.SIDECAR} is damaged"]
        flip(sidecar, bit)
    assert digests.problems(directory) == []


def test_a_truncated_sidecar_is_damage_and_a_missing_one_an_unfinished_save(directory):
    sidecar = directory / digests.SIDECAR
    content = sidecar.read_bytes()
    for length in range(len(content)):
        sidecar.write_bytes(content[:length])
        assert digests.problems(directory) == [f"{digests.SIDECAR} is damaged"]
    sidecar.unlink()
    (problem,) = digests.problems(directory)
    assert "has not finished" in problem


def test_truncated_grown_and_deleted_files_are_found(directory):
    (directory / "a").write_bytes(CONTENTS["a"][:-1])
    (directory / "empty").write_bytes(b"\0")
    (directory / "deep/er/b.bin").unlink()
    assert digests.problems(directory) == [
        "a has changed since it was written",
        "deep/er/b.bin is missing",
        "empty has changed since it was written",
    ]


def test_a_file_in_the_place_of_a_directory_is_damage_not_a_crash(directory):
    shutil.rmtree(directory / "deep")
    (directory / "deep").write_bytes(b"")
    (problem,) = digests.problems(directory)
    assert problem.startswith("deep/er/b.bin cannot be read")


def test_only_the_named_files_are_read(directory):
    flip(directory / "a", 3)
    assert digests.problems(directory, ["empty"]) == []
    assert digests.problems(directory, ["a"]) == ["a has changed since it was written"]


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_sha256sum_reads_the_sidecar(directory):
    check = ["sha256sum", "--check", "--strict", "--quiet", digests.SIDECAR]
    assert subprocess.run(check, cwd=directory, capture_output=True).returncode == 0
    flip(directory / "a", 3)
    assert subprocess.run(check, cwd=directory, capture_output=True).returncode == 1
