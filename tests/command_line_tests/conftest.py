"""A run to train, a model to load, and what a command has to say."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import l32jax
from l32jax.__main__ import main
from l32jax.checkpoint.hugging_face_config import TokenIds
from tests.checkpoint_tests.weights import export_hugging_face
from tests.conftest import CACHE

CONFIG = """
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig
from l32jax.presets import TINY_TEXT

def config():
    return TrainConfig(
        model=TINY_TEXT,
        stages=(
            StageConfig(
                name="talk",
                num_steps=3,
                trains=("language_model",),
                data=DataConfig(mixture=(("talk.jsonl", 1.0),), batch_size=8, length=64),
                optimizer=OptimizerConfig(peak_lr=1e-3),
            ),
        ),
        directory="run",
    )
"""
TALK = [
    {
        "messages": [
            {"role": "user", "content": f"{number}?"},
            {"role": "assistant", "content": f"{number}."},
        ]
    }
    for number in range(20)
]


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """The working directory, with a config and the conversations that it trains on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in TALK))
    return tmp_path


@pytest.fixture(scope="session")
def hugging_face_folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    model = l32jax.load("tiny-text")
    ids = TokenIds(begin=256, stop=(264, 265), pad=None)
    files = {"tokenizer.model": model.tokenizer.to_bytes()}
    export_hugging_face(
        model.params, model.config, directory, dtype=np.float32, ids=ids, extra_files=files
    )
    return directory


@pytest.fixture
def complaint(capsys):
    """What a command, which must fail for what was put into it, has to say."""

    def run(*arguments: str | Path) -> str:
        assert main(list(map(str, arguments))) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith("l32jax: error: ")
        assert told.err.count("\n") == 1 and told.err.endswith("\n")
        return told.err

    return run


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.full((28, 28, 3), 200, np.uint8)).save(path)
    return path


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """`main` sets variables for jax, which is imported here already, and for children."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(CACHE))


@pytest.fixture
def pipe(monkeypatch):
    """Gives a command its standard input."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))
