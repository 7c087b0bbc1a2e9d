import collections
import sys

import numpy as np
import pytest

from l32jax.data import easy_vqa
from l32jax.data.easy_vqa import EasyVqa
from l32jax.data.images import load_image
from l32jax.errors import InputError

SPLITS = [("train", 4_000, 38_575, 21), ("test", 1_000, 9_673, 20)]


@pytest.mark.parametrize(("split", "num_images", "num_questions", "most"), SPLITS)
def test_each_split_has_the_published_size(split, num_images, num_questions, most):
    source = EasyVqa(split)
    counts = [len(source[index].questions) for index in range(len(source))]
    assert (len(source), sum(counts)) == (num_images, num_questions)
    assert (min(counts), max(counts)) == (2, most)
    assert len(easy_vqa.questions(split)) == num_questions


def test_questions_belong_to_the_picture_of_their_record():
    scene = EasyVqa("test")[0]
    assert scene.questions[0] == ("what is the red shape?", "triangle")
    red, green, _ = np.moveaxis(np.asarray(load_image(scene.image), int), -1, 0)
    assert red.shape == (64, 64)
    assert (red - green).max() > 100


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_is_one_of_thirteen(split):
    counts = collections.Counter(question.answer for question in easy_vqa.questions(split))
    assert sorted(counts) == sorted(easy_vqa.answers()) and len(counts) == 13
    assert counts["yes"] + counts["no"] == {"train": 28_407, "test": 7_136}[split]


def test_baselines_without_the_picture():
    assert easy_vqa.majority_accuracy() == pytest.approx(0.3733, abs=5e-5)
    assert easy_vqa.blind_accuracy() == pytest.approx(0.6700, abs=5e-5)


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(InputError, match=r"pip install 'l32jax\[quickstart\]'"):
        EasyVqa("train")
