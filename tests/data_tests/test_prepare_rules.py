"""The rules that look at one record, and what makes two of them duplicates."""

import io
import pickle
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from l32jax.data.chat import Image, Message
from l32jax.data.images import load_image, preprocess
from l32jax.data.prepare.config import Duplicates, ImageRules, TextRules
from l32jax.data.prepare.content import Removed, text_of, with_images
from l32jax.data.prepare.duplicates import BAND, groups, later_ones, part_of_keys
from l32jax.data.prepare.language import check_languages, in_languages
from l32jax.data.prepare.pictures import usable_images
from l32jax.data.prepare.quality import good_text
from l32jax.data.prepare.signatures import perceptual_hash, signature, similar
from l32jax.data.records import Record
from l32jax.errors import InputError
from tests.data_tests.small_records import WORDS, some_picture, some_text

PROSE = (
    "The harbour was quiet that morning, and nobody on the quay could say when the boats would "
    "come back. Some had left before dawn with nets and lamps; others waited for the tide, which "
    "turned late at this time of year. A woman sold bread from a cart to the few who had stayed "
    "behind, and talked with them about weather, prices, and a son who had moved to the city."
)


def text(content: str) -> Record:
    return Record("here", (content,))


def encoded(picture: Pillow.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pictured(picture: Pillow.Image | bytes, words: str = "a picture") -> Record:
    data = picture if isinstance(picture, bytes) else encoded(picture)
    return Record("here", (Image(data), words))


@pytest.mark.parametrize(
    "content, why",
    [
        (PROSE, None),
        ("too short", "text length"),
        (PROSE * 3, "text repetition"),
        (PROSE.replace(",", " # #"), "text quality"),
        ("\n".join(f"- {line}" for line in PROSE.split(",")), "text quality"),
        ("\n".join(f"{line}..." for line in PROSE.split(",")), "text quality"),
        (" ".join(map(str, range(100, 200))), "text quality"),
        (" ".join("a" * 30 for _ in range(60)), "text quality"),
        (PROSE + " and so on" * 20, "text repetition"),
        ("\n".join([*PROSE.split(","), *["the same line again"] * 4]), "text repetition"),
    ],
)
def test_prose_is_kept_and_nothing_else(content, why):
    found = good_text(text(content), TextRules())
    assert found == (text(content) if why is None else Removed(why))


def test_captions_and_conversations_are_not_held_to_the_rules_of_prose():
    for record in (
        pictured(some_picture(0)),
        Record("here", messages=(Message("user", "Hi"), Message("assistant", "Hi"))),
    ):
        assert good_text(record, TextRules()) == record


@settings(max_examples=100)
@given(st.text(max_size=300))
def test_any_text_is_judged(content):
    rules = TextRules(min_words=0)
    assert isinstance(good_text(text(content), rules), Record | Removed)
    signature(text(content), Duplicates())


def test_languages():
    pytest.importorskip("py3langid")
    german = "Der Hafen war an diesem Morgen still, und niemand wusste, wann die Boote kommen."
    keep = partial(in_languages, languages=("en",), least=0.5)
    assert pickle.loads(pickle.dumps(keep))(text(PROSE)) == text(PROSE)
    assert keep(text(german)) == Removed("language")
    assert in_languages(text(german), ("en", "de"), 0.5) == text(german)
    assert keep(text("kurz")) == text("kurz")
    with pytest.raises(InputError, match="'english'"):
        check_languages(("english",))


def usable(picture: Pillow.Image | bytes, **rules):
    found = usable_images(pictured(picture), ImageRules(**rules), tile_size=56, max_tiles=4)
    return found if isinstance(found, Removed) else found.images[0]


@pytest.mark.parametrize("size", [(300, 200), (57, 400), (1000, 120), (113, 112), (400, 399)])
def test_large_images_shrink_to_the_same_tiles(size):
    picture = some_picture(1, 30, *size)
    data = usable(picture)
    assert len(data) < len(encoded(picture)) or size == (113, 112)
    assert max(load_image(data).size) <= 224
    for before, after in zip(
        preprocess(picture, tile_size=56), preprocess(load_image(data), tile_size=56), strict=True
    ):
        np.testing.assert_array_equal(before, after)


def test_images_stay_as_they_are_if_they_fit_and_jpeg_stays_jpeg():
    for size in ((56, 56), (30, 40), (112, 112), (224, 56)):
        data = encoded(some_picture(1, 20, *size), "JPEG")
        assert usable(data) == data
    assert usable(encoded(some_picture(1, 20, 300, 300), "JPEG"))[:3] == b"\xff\xd8\xff"
    assert usable(encoded(some_picture(1, 20, 300, 300), "BMP"))[1:4] == b"PNG"


def test_shapes_of_images():
    assert usable(some_picture(0, 20, 20, 200)) == Removed("image shape")
    assert usable(some_picture(0, 20, 40, 410)) == Removed("image shape")
    assert isinstance(usable(some_picture(0, 20, 40, 400)), bytes)
    with pytest.raises(InputError, match="damaged"):
        usable(encoded(some_picture(0))[:500])


def test_images_take_their_places_in_every_kind_of_record():
    record = Record("here", ("a", Image(b"1"), "b", Image(b"2")))
    assert with_images(record, [b"3", b"4"]).parts == ("a", Image(b"3"), "b", Image(b"4"))
    turns = (Message("user", (Image(b"1"), "what?")), Message("assistant", "that"))
    changed = with_images(Record("here", messages=turns), [b"3"])
    assert changed.images == [b"3"] and text_of(changed) == "what?\nthat"


def are_duplicates(a: Record, b: Record, rules: Duplicates | None = None) -> bool:
    """Whether they share a band, and are similar."""
    rules = rules or Duplicates()
    first, second = signature(a, rules), signature(b, rules)
    if first is None or second is None or not set(first.bands) & set(second.bands):
        return False
    return similar(first.check, second.check[None], rules)


def test_the_same_picture_in_another_file():
    for seed in range(6):
        picture = some_picture(seed, 20, 320, 240)
        again = encoded(picture.resize((200 + seed, 130 + 2 * seed)), "JPEG", quality=60)
        assert are_duplicates(pictured(picture), pictured(again, "other words"))
        assert not are_duplicates(pictured(picture), pictured(some_picture(seed + 1)))
    exact = Duplicates(image_distance=0)
    assert are_duplicates(pictured(picture), pictured(picture.copy()), exact)
    assert signature(pictured(picture), Duplicates(image_distance=None)) is None


def test_pictures_that_differ_in_colour_alone_are_different():
    red, blue = Pillow.new("RGB", (64, 64), "white"), Pillow.new("RGB", (64, 64), "white")
    red.paste((200, 0, 0), (10, 10, 50, 50))
    blue.paste((0, 60, 214), (10, 10, 50, 50))
    assert not are_duplicates(pictured(red), pictured(blue))
    assert (perceptual_hash(red) == perceptual_hash(blue)).all()


def test_questions_about_one_picture_are_different():
    def asked(words):
        turns = (Message("user", (Image(encoded(some_picture(1))), words)),)
        return Record("here", messages=turns)

    assert are_duplicates(asked("How many?"), asked("how many"))
    assert not are_duplicates(asked("How many?"), asked("Which colour?"))


def test_texts_with_most_words_in_common():
    import random

    missed = 0
    for seed in range(40):
        rng = random.Random(seed)
        words = some_text(rng, 200).split()
        few, many = list(words), list(words)
        few[rng.randrange(200)] = "changed"  # 5 of 196 sequences
        for _ in range(40):
            many[rng.randrange(200)] = rng.choice(WORDS)
        missed += not are_duplicates(text(" ".join(words)), text(" ".join(few)))
        assert not are_duplicates(text(" ".join(words)), text(" ".join(many)))
    assert missed == 0
    assert are_duplicates(text("Short one"), text("short  one."))
    assert not are_duplicates(text("short one"), text("short two"))
    assert are_duplicates(text("長い文章です" * 5), text("長い文章です。" * 5))


def test_of_a_group_the_first_stays_and_what_is_like_nothing_before():
    rules = Duplicates()
    records = [PROSE, "something else", PROSE + " more", "something else", PROSE, "third"]
    signed = [signature(text(content), rules) for content in records]
    checks = np.stack([each.check for each in signed if each is not None])
    assert later_ones(checks, rules) == [2, 3, 4]


@settings(max_examples=100)
@given(st.lists(st.integers(0, 2**64 - 1)), st.integers(1, 9))
def test_parts_of_keys_are_all_keys_once(keys, parts):
    bands = np.sort(np.array([(key, 0) for key in keys], BAND), order="key")
    found = [part_of_keys(bands, part, parts) for part in range(parts)]
    np.testing.assert_array_equal(np.concatenate(found), bands)


def test_groups_are_in_the_order_of_numbers():
    keys = np.array([5, 3, 5, 3, 9, 5], np.uint64)
    numbers = np.array([4, 3, 1, 9, 0, 2], np.uint64)
    assert [group.tolist() for group in groups(keys, numbers)] == [[1, 3], [2, 5, 0]]
    assert not list(groups(keys[:0], numbers[:0]))
