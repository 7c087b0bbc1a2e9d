"""The whole road, shortened: every stage for a few steps, then all that `quickstart` leaves."""

import dataclasses
import types

import easy_vqa as package
import numpy as np
import pytest
from PIL import Image

from l32jax import quickstart
from l32jax.api import load
from l32jax.data import easy_vqa
from l32jax.errors import InputError
from l32jax.sharding import single_device_mesh


@pytest.fixture
def short(monkeypatch):
    """Two steps a stage, and a few test pictures."""
    stages = tuple(dataclasses.replace(stage, num_steps=2) for stage in quickstart.stages())
    monkeypatch.setattr(quickstart, "stages", lambda: stages)
    monkeypatch.setattr(quickstart, "make_mesh", lambda: single_device_mesh())
    test = [row for row in zip(*package.get_test_questions(), strict=True) if row[2] < 12]
    paths = package.get_test_image_paths()
    few = types.SimpleNamespace(
        get_train_questions=package.get_train_questions,
        get_train_image_paths=package.get_train_image_paths,
        get_test_questions=lambda: tuple(zip(*test, strict=True)),
        get_test_image_paths=lambda: {image: paths[image] for image in range(12)},
        get_answers=package.get_answers,
    )
    monkeypatch.setattr(easy_vqa, "_package", lambda: few)


@pytest.mark.slow
def test_the_road_leaves_a_run_an_export_a_table_and_pictures(short, tmp_path, capsys, caplog):
    accuracy = quickstart.run(tmp_path / "run", seed=3)
    told = capsys.readouterr().out
    for line in (f"{accuracy:.1%}", "text logits differ by 0 at most", "answers.png"):
        assert line in told, told

    model, exported = load(tmp_path / "run"), load(tmp_path / "run" / "hugging_face")
    image = easy_vqa.EasyVqa("test")[0].image
    tokens, images = model.encode("what color is the shape?", [image])
    assert exported.encode("what color is the shape?", [image])[0] == tokens
    scores = model.logits(tokens, images)
    np.testing.assert_array_equal(exported.logits(tokens, images), scores)
    with Image.open(tmp_path / "run" / "answers.png") as picture:
        assert min(picture.size) >= 600

    assert quickstart.run(tmp_path / "run", seed=3) == accuracy
    assert "goes on from" not in caplog.text
    with pytest.raises(InputError, match="seed"):
        quickstart.run(tmp_path / "run", seed=4)
