import itertools
import pickle
import random
import re
import sys

import numpy as np
import pytest

from l32jax.config import VisionConfig
from l32jax.data.charts import baselines, typefaces
from l32jax.data.charts.draw import draw
from l32jax.data.charts.looks import SEEN, UNSEEN
from l32jax.data.charts.questions import final_answer, questions, reply
from l32jax.data.charts.scenes import LARGE, SIZES, TINY, WORDS, Charts, Scene, description
from l32jax.data.charts.source import SPLITS, open_charts
from l32jax.data.charts.strokes import GLYPHS
from l32jax.data.charts.typefaces import SEEN_FACES, UNSEEN_FACES, Face, text_mask
from l32jax.data.rows import VisionShape, make_row
from l32jax.data.sources.easy_vqa import GUESS_WEIGHT
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError

SOME = 200


def some(scenes: Charts, count: int) -> list[Scene]:
    return list(itertools.islice(scenes, count))


@pytest.mark.parametrize("difficulty", [TINY, LARGE], ids=["tiny", "large"])
def test_a_record_depends_on_seed_split_and_number_alone(difficulty):
    forward = [Charts("train", difficulty)[index] for index in range(20)]
    backward = [Charts("train", difficulty)[index] for index in reversed(range(20))]
    assert forward == backward[::-1] == some(Charts("train", difficulty), 20)
    assert np.array_equal(draw(forward[3]), draw(backward[-4]))
    others = [some(Charts("test", difficulty), 20), some(Charts("train", difficulty, seed=1), 20)]
    assert all(other[index] != forward[index] for other in others for index in range(20))


def test_records_stay_the_same_from_release_to_release():
    told = [description(scene) for scene in some(Charts("train"), 4)]
    assert told == [
        "table: sale2, lamp7",
        "bars lamp: orange8, blue7, red3",
        "table: open9, soup1, tea7",
        "table: bus7, rice1",
    ]


@pytest.mark.parametrize("split", SIZES)
def test_a_split_has_its_size_and_no_more(split):
    scenes = Charts(split)
    assert len(scenes) == SIZES[split] and scenes[-1] == scenes[len(scenes) - 1]
    with pytest.raises(IndexError):
        scenes[len(scenes)]


def test_what_is_held_out_is_never_seen_in_training():
    for name in SEEN:
        assert name == "way" or not set(SEEN[name]) & set(UNSEEN[name]), name
    assert not {face.family for face in SEEN_FACES} & {face.family for face in UNSEEN_FACES}
    for split, choices in (("train", SEEN), ("test", SEEN), ("test-unseen", UNSEEN)):
        looks = [scene.look for scene in some(Charts(split), SOME)]
        for name, values in choices.items():
            assert {getattr(look, name) for look in looks} == set(values)


@pytest.mark.parametrize("difficulty", [TINY, LARGE], ids=["tiny", "large"])
def test_every_answer_follows_from_the_description(difficulty):
    for scene in some(Charts("test", difficulty), SOME):
        shown = description(scene)
        for question in questions(scene):
            assert question.answer == answer_from(shown, question.text), (shown, question)
            assert final_answer(reply(shown, question)) == question.answer


def answer_from(shown: str, asked: str) -> str:
    """By another way than the generator's: from words alone."""
    head, _, body = shown.partition(": ")
    rows = [re.findall(r"[a-z]+|\d+", row) for row in body.split(", ")]
    goods = [(name, row) for name, *row in rows if row and name != "total"]
    numbers = {name: int(row[0]) for name, row in goods if row[0].isdigit()}
    if asked == "what does the sign say?":
        return body
    if asked == "what color is the sign?":
        return head.split()[0]
    if asked == "what is the title?":
        return head.split()[1]
    if asked == "what comes after total?":
        return rows[-1][1]
    if asked.startswith("how many"):
        return str(len(body.split()) if "sign" in head else len(rows))
    if match := re.search(r"(?:row|line) (\d)\?", asked):
        return rows[int(match[1]) - 1][0]
    if match := re.match(r"what is (a|b) of (\w+)\?", asked):
        return next(row for name, *row in rows if name == match[2])["ab".index(match[1])]
    named = [word for word in re.findall(r"\w+", asked.removeprefix("is a of")) if word in numbers]
    if re.search("^(is|does) ", asked):
        return "yes" if numbers[named[-2]] > numbers[named[-1]] else "no"
    if re.search("most|highest", asked):
        return max(numbers, key=numbers.__getitem__)
    if re.search("least|lowest", asked):
        return min(numbers, key=numbers.__getitem__)
    return str(numbers[named[-1]])


def test_yes_is_as_common_as_no():
    asked = baselines.asked(Charts("train"), 3_000)
    comparisons = [question.answer for question in asked if question.kind.endswith("compare")]
    assert comparisons.count("yes") / len(comparisons) == pytest.approx(0.5, abs=0.03)


def test_questions_alone_give_little_away(monkeypatch):
    monkeypatch.setattr(baselines, "COUNTED", 3_000)
    guesses = baselines.majority_answers(TINY)
    asked = baselines.asked(Charts("test"), 1_000)
    blind = sum(guesses.get(q.text, "") == q.answer for q in asked) / len(asked)
    majority = sum(guesses[""] == q.answer for q in asked) / len(asked)
    assert blind == pytest.approx(0.20, abs=0.03) and majority == pytest.approx(0.09, abs=0.02)


def test_a_bar_is_as_high_as_its_number():
    upright = (
        scene
        for scene in Charts("test")
        if scene.picture == "bars" and scene.look.way == "up" and not scene.title
    )
    for scene in itertools.islice(upright, 10):
        pixels = np.asarray(draw(scene)).reshape(64, 64, 3)
        heights = [
            (np.abs(pixels - np.array(color)).sum(axis=-1) == 0).any(axis=1).sum()
            for color in scene.colors
        ]
        numbers = list(scene.firsts.values())
        assert np.ptp(np.divide(heights, numbers)) < 1.6 / min(numbers)


@pytest.mark.parametrize("split", ["test", "test-unseen"])
@pytest.mark.parametrize("difficulty", [TINY, LARGE], ids=["tiny", "large"])
def test_pictures_have_the_size_of_the_difficulty_and_show_something(split, difficulty):
    for scene in some(Charts(split, difficulty), 25):
        image = draw(scene)
        assert image.mode == "RGB" and image.size == scene.size
        for length, (least, most) in zip(
            image.size, (difficulty.width, difficulty.height), strict=True
        ):
            assert least <= length <= most
        paper = np.asarray(image).reshape(-1, 3) == scene.look.paper
        assert paper.all(axis=1).mean() < 0.98


@pytest.mark.parametrize("face", [*SEEN_FACES, *UNSEEN_FACES], ids=str)
def test_every_face_tells_all_words_apart(face):
    masks = {text_mask(face, word, 14).tobytes() for word in [*WORDS, *"0123456789abcdef"]}
    assert len(masks) == len(WORDS) + 16


def test_masks_have_the_height_asked_for():
    for face, height in itertools.product([*SEEN_FACES, *UNSEEN_FACES], [9, 14, 60]):
        mask = text_mask(face, "rice", height)
        assert mask.mode == "L" and mask.height == height
        ink = np.asarray(mask) > 127
        assert 0.05 < ink.mean() < 0.7
        assert text_mask(face, "forest", height).width > mask.width


def test_strokes_have_every_letter_and_figure():
    assert set("".join(WORDS) + "abcdef0123456789total ") <= set(GLYPHS)
    shapes = [shape for letter, shape in GLYPHS.items() if letter != " "]
    assert len(set(shapes)) == len(shapes)
    assert set("".join(shapes)) <= set("abcdefghijklmno ")


def test_typefaces_that_are_not_installed_are_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    typefaces._matplotlib_fonts.cache_clear()
    typefaces._font.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'l32jax\[quickstart\]'"):
        text_mask(Face("DejaVuSerif"), "tea", 12)
    for scene in some(Charts("train"), 10):
        draw(scene)


def test_sources_tell_what_they_say_they_tell():
    tokenizer = Tokenizer.bytes_only()
    chat = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}how high is orange?"
    chat += "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{}8<|eot_id|>"
    shown, image = "bars lamp: orange8, blue7, red3", "<|image|>"
    expected = {
        ("train", True): chat.format(image, ""),
        ("train/reasoned", True): chat.format(image, f"{shown}. orange8. "),
        ("train/reasoned", False): chat.format("", f"{shown}. orange8. "),
        ("train/captions", True): f"<|begin_of_text|>{image}{shown}<|end_of_text|>",
        ("train/captions", False): f"<|begin_of_text|>{shown}<|end_of_text|>",
    }
    for (kind, with_images), text in expected.items():
        sample = open_charts(kind, tokenizer, with_images)[1]
        assert len(sample.images) == with_images
        assert tokenizer.decode(sample.documents[0].tokens) == text


def test_what_a_blind_model_could_only_guess_weighs_little():
    tokenizer = Tokenizer.bytes_only()
    shown = len("bars lamp: orange8, blue7, red3")
    for with_images, guess in ((True, 1.0), (False, GUESS_WEIGHT)):
        document = open_charts("train/reasoned", tokenizer, with_images)[1].documents[0]
        begin = document.weights.index(guess)
        assert list(document.weights[begin:]) == [guess] * shown + [1.0] * (len(". orange8. 8") + 1)
        assert not any(document.weights[:begin])


@pytest.mark.parametrize("kind", [*SPLITS, "large/train", "large/test-unseen"])
def test_samples_become_rows(kind):
    source = open_charts(kind, Tokenizer.bytes_only(), True)
    encoder = VisionConfig(image_size=32, patch_size=8)
    vision = VisionShape(encoder=encoder, image_id=512, max_images=1, slots=4, max_tiles=4)
    sample = pickle.loads(pickle.dumps(source[random.Random(kind).randrange(len(source))]))
    length = sum(len(document.tokens) for document in sample.documents)
    row = make_row([sample], length=length, vision=vision)
    assert row["weights"].sum() >= len(sample.documents)
    assert (row["aspect"][0].prod() == 4) or kind.startswith("large")


def test_samples_tell_where_they_are():
    source = open_charts("large/test", Tokenizer.bytes_only(), True)
    assert source[17].place == "charts/large/test picture 17"
    assert source[-1].place == f"charts/large/test picture {len(source) - 1}"


def test_an_unknown_kind_is_an_error_that_names_the_known_ones():
    for kind in ("train/open", "valid", "", "large/large/train"):
        with pytest.raises(InputError, match="train/captions.*test-unseen"):
            open_charts(kind, Tokenizer.bytes_only(), True)
