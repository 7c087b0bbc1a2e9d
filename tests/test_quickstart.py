"""The whole road, shortened: every stage for a few steps, then all that `quickstart` leaves."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from l32jax import quickstart
from l32jax.api import load
from l32jax.data import easy_vqa
from l32jax.train.loop import stage_directory

STEPS = 4


@pytest.fixture
def short(monkeypatch):
    """Few steps a stage, and each twentieth test picture."""
    stages = [dataclasses.replace(stage, num_steps=STEPS) for stage in quickstart.stages()]
    monkeypatch.setattr(quickstart, "stages", lambda: tuple(stages))


@pytest.mark.slow
def test_the_road_leaves_a_run_an_export_a_table_and_pictures(
    short, tmp_path, monkeypatch, capsys
):
    accuracy = quickstart.run(tmp_path / "run", seed=3)
    told = capsys.readouterr().out
    assert f"{easy_vqa.majority_accuracy():.1%}" == "37.3%"
    for line in ("37.3%", "67.0%", f"{accuracy:.1%}", "text logits differ by 0 at most"):
        assert line in told, told

    model = load(tmp_path / "run")
    question = "what color is the shape?"
    tokens, _ = model.encode(question)
    ours = model.logits(tokens)
    exported = load(tmp_path / "run" / "hugging_face")
    assert exported.encode(question)[0] == tokens
    np.testing.assert_array_equal(exported.logits(tokens), ours)
    with Image.open(tmp_path / "run" / "answers.png") as picture:
        assert min(picture.size) >= 600

    again = quickstart.run(tmp_path / "run", seed=3)
    assert again == accuracy
    assert "goes on" not in capsys.readouterr().err
