"""`l32jax sample`: what it is told, what it says, and that stopping it costs nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from l32jax.__main__ import main
from l32jax.align import output
from l32jax.data.sources.open import open_records, open_source
from l32jax.data.tokenizer import Tokenizer
from tests.align_tests.test_endpoint import answering, serving
from tests.conftest import CACHE
from tests.data_tests.pictures import png

ROOT = Path(__file__).parents[2]
CHILD = "tests.align_tests.sampling_child"
NUMBER, PROMPTS = 4, 12
OPTIONS = ("--answers", NUMBER, "--rows", 8, "--max-new-tokens", 24, "--temperature", 1.0)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(CACHE))


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [{"question": f"{n} and {'x' * 4 * n}?", "answer": f"{n}"} for n in range(PROMPTS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*arguments) -> int:
    return main(["sample", *map(str, arguments)])


def kept(folder: Path) -> list[str]:
    path = folder / "answers.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def read(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in (output.BEST, output.PAIRS)]


def test_a_vision_model_answers_about_pictures(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png(28, 60))
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"question": "What?", "answer": "7", "image": "a.png"}))
    folder, verifier = tmp_path / "out", f"{CHILD}:letters"
    how = ("--model", "tiny-vision", "--verifier", verifier, *OPTIONS[2:], "--answers", 8)
    assert run(source, folder, *how, "--max-new-tokens", 100) == 0
    told = capsys.readouterr()
    assert "is written" in told.out and "share right" in told.out
    tokenizer = Tokenizer.bytes_only().with_image_token()
    samples = open_source(str(folder / output.BEST), tokenizer, with_images=True)
    assert [len(sample.images) for sample in samples] == [1]
    assert json.loads((folder / output.REPORT).read_text())["answers"] == 8


def test_a_folder_of_something_else_is_left_alone(prompts, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "answers.jsonl").write_text("mine\n")
    how = ("--endpoint", "http://localhost:1", "--model", "big", "--verifier", "exact")
    assert run(prompts, folder, *how) == 2
    assert "it holds something else" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["answers.jsonl"]


def test_a_server_answers_in_place_of_a_model(prompts, tmp_path, capsys):
    with serving(answering) as server:
        how = ("--endpoint", server.address, "--model", "big", "--verifier", f"{CHILD}:letters")
        assert run(prompts, tmp_path / "out", *how, *OPTIONS) == 0
        assert len(server.requests) == NUMBER * PROMPTS
        assert run(prompts, tmp_path / "out", *how, *OPTIONS) == 0
        assert len(server.requests) == NUMBER * PROMPTS
    assert len(kept(tmp_path / "out")) == NUMBER * PROMPTS
    best = open_records(str(tmp_path / "out" / output.BEST))
    assert len(best) == PROMPTS


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ((), "give --verifier"),
        (("--verifier", "exakt"), "use exact, number"),
        (("--verifier", "exact", "--temperature", "0"), "all would be equal"),
        (("--verifier", "exact", "--temperature", "-1"), "not negative"),
        (("--verifier", "exact", "--answers", "0"), "at least 1"),
        (("--verifier", "exact", "--mesh", "data=2", "--endpoint", "http://h"), "leave one out"),
        (("--verifier", "exact", "--mesh", "data=3"), "does not cover the 8 devices"),
        (("--verifier", "exact", "--endpoint", "http://h", "--dtype", "float32"), "to the server"),
        (("--verifier", "exact", "--endpoint", "h"), "no address"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(options, why, prompts, tmp_path, capsys):
    assert run(prompts, tmp_path / "out", "--model", "tiny-text", *options) == 2
    told = capsys.readouterr().err
    assert told.startswith("l32jax: error: ") and why in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def start(prompts: Path, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", CHILD, "sample", prompts, folder, "--model", "tiny-text"]
    command += ["--verifier", f"{CHILD}:slowly", *OPTIONS]
    return subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors


@pytest.mark.slow
def test_stopped_or_killed_the_same_command_ends_with_the_same_answers(prompts, tmp_path):
    finish(start(prompts, tmp_path / "whole"))
    whole, folder = sorted(kept(tmp_path / "whole")), tmp_path / "out"
    for count, number, code in ((4, signal.SIGKILL, -signal.SIGKILL), (16, signal.SIGTERM, 75)):
        process = start(prompts, folder)
        while len(kept(folder)) < count and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert code != 75 or "what is done is kept, and the same command goes on" in errors
        assert not (folder / output.REPORT).exists() and len(kept(folder)) < len(whole)
    finish(start(prompts, folder))
    assert sorted(kept(folder)) == whole
    assert read(folder) == read(tmp_path / "whole")
