import collections
import sys

import numpy as np
import pytest

from l32jax.data import easy_vqa
from l32jax.data.easy_vqa import EasyVqa, Question, Scene
from l32jax.data.images import load_image
from l32jax.data.sources.easy_vqa import GUESS_WEIGHT
from l32jax.data.sources.open import open_source
from l32jax.data.tokenizer import Tokenizer
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


@pytest.mark.parametrize(("split", "known"), [("train", 3_542), ("test", 880)])
def test_every_answer_follows_from_the_description(split, known):
    described = [(scene, easy_vqa.description(scene)) for scene in EasyVqa(split)]
    described = [(scene, words) for scene, words in described if words]
    assert len(described) == known
    for scene, words in described:
        for text, answer in scene.questions:
            asked = set(text.rstrip("?").split())
            if answer in easy_vqa.YES_NO:
                is_negated = bool(asked & {"no", "not"})
                assert (answer == "yes") == (bool(asked & set(words.split())) != is_negated)
            else:
                assert answer in words.split()


def test_a_picture_that_its_questions_do_not_give_away_has_no_description():
    asked = (Question("is there a circle?", "no"), Question("is no red shape present?", "no"))
    assert easy_vqa.description(Scene("", asked)) is None
    asked += (Question("is there not a triangle?", "no"),)
    assert easy_vqa.description(Scene("", asked)) == "red triangle"


def test_balanced_questions_hit_as_often_as_half_their_misses():
    hits = misses = 0
    for scene in EasyVqa("train"):
        kept = easy_vqa.balanced(scene)
        assert set(kept) <= set(scene.questions)
        for question in kept:
            if not easy_vqa.is_open(question):
                is_negated = bool(set(question.text.split()) & {"no", "not"})
                hit = (question.answer == "yes") != is_negated
                hits, misses = hits + hit, misses + (not hit)
    assert 1.5 * hits < misses < 2.5 * hits


@pytest.mark.parametrize(
    ("reply", "answer"), [("red circle, not teal. no", "no"), ("teal", "teal"), (" ", ""), ("", "")]
)
def test_the_final_answer_is_the_last_word(reply, answer):
    assert easy_vqa.final_answer(reply) == answer


def test_a_conclusion_tells_whether_the_picture_has_what_was_asked_about():
    assert (
        easy_vqa.conclusion("red circle", Question("is it not blue?", "yes")) == ", not blue. yes"
    )
    assert easy_vqa.conclusion("red circle", Question("is it not red?", "no")) == ". no"
    assert easy_vqa.conclusion("red circle", Question("what is the red shape?", "circle")) == (
        ". circle"
    )
    for scene in EasyVqa("train"):
        shown = easy_vqa.description(scene)
        for question in scene.questions if shown else ():
            told = easy_vqa.conclusion(shown, question)
            is_negated = bool({"no", "not"}.intersection(question.text.split()))
            misses = not easy_vqa.is_open(question) and (question.answer == "yes") == is_negated
            assert told.startswith(", not ") == misses, (shown, question)


def test_sources_tell_what_they_say_they_tell():
    tokenizer = Tokenizer.bytes_only()
    chat = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}what is the blue shape?"
    chat += "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{}rectangle<|eot_id|>"
    image = "<|image|>"
    expected = {
        ("train", True): chat.format(image, ""),
        ("train/reasoned", True): chat.format(image, "blue rectangle. "),
        ("train/reasoned", False): chat.format("", "blue rectangle. "),
        ("train/captions", True): f"<|begin_of_text|>{image}blue rectangle<|end_of_text|>",
        ("train/captions", False): "<|begin_of_text|>blue rectangle<|end_of_text|>",
    }
    for (name, with_images), text in expected.items():
        sample = open_source(f"easy-vqa/{name}", tokenizer, with_images=with_images)[0]
        assert sample.place == f"easy-vqa/{name} picture 0"
        assert len(sample.images) == with_images
        assert tokenizer.decode(sample.documents[0].tokens) == text


def test_what_a_blind_model_could_only_guess_weighs_little():
    tokenizer = Tokenizer.bytes_only()
    for with_images, guess in ((True, 1.0), (False, GUESS_WEIGHT)):
        source = open_source("easy-vqa/train/reasoned", tokenizer, with_images=with_images)
        document = source[0].documents[0]
        begin = document.weights.index(guess)
        words, answer = len("blue rectangle"), len(". rectangle") + 1
        assert list(document.weights[begin:]) == [guess] * words + [1.0] * answer
        assert not any(document.weights[:begin])


def test_an_unknown_part_of_the_data_is_an_error_that_names_the_known_ones():
    with pytest.raises(InputError, match="easy-vqa/train/open.*train/captions"):
        open_source("easy-vqa/train/open", Tokenizer.bytes_only(), with_images=True)


def test_baselines_without_the_picture():
    assert easy_vqa.majority_accuracy() == pytest.approx(0.3733, abs=5e-5)
    assert easy_vqa.blind_accuracy() == pytest.approx(0.6700, abs=5e-5)


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(InputError, match=r"pip install 'l32jax\[quickstart\]'"):
        EasyVqa("train")
