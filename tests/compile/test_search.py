"""What a search lists is what the compiler then makes of it."""

import json

import pytest

from l32jax.cli.plan import plan
from l32jax.plan import search

pytest.importorskip("libtpu")
pytestmark = [pytest.mark.compile, pytest.mark.slow]

CONFIG = """
from dataclasses import replace

from l32jax.presets import LLAMA3_2_1B
from l32jax.recipes import text_pretrain
from l32jax.run_config import DataConfig, TrainConfig

MODEL = replace(LLAMA3_2_1B, decoder=replace(LLAMA3_2_1B.decoder, num_groups=2, vocab_size=4096))


def config():
    data = DataConfig(mixture=(("data", 1.0),), batch_size=4, length=1024)
    stage = text_pretrain(data, num_steps=10, peak_lr=1e-4)
    return TrainConfig(
        model=MODEL, stages=(stage,), directory="", dtype="bfloat16", params="bfloat16"
    )
"""


def test_the_best_is_compiled_and_fits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "BEST", 1)
    config, written = tmp_path / "small.py", tmp_path / "plans.json"
    config.write_text(CONFIG)
    assert plan(config, (), topology="v5e:2x2", search=True, json=written) == 0
    (found,) = json.loads(written.read_text())
    assert found["memory"]["fits"]
    assert not found["arithmetic"]
    assert found["compile_seconds"] > 0
    assert 0.1 < found["utilisation"] < 1
    said = capsys.readouterr()
    assert "compiling 1 of 1 for v5e:2x2" in said.err
    assert "not from the compiled program" not in said.out
