"""A sheet of rows shows what is in their arrays, right or wrong, and does nothing else."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from l32jax.data.images import choose_grid, fit, load_image, preprocess
from l32jax.data.rows import VisionShape, make_row
from l32jax.data.samples import Document, Sample
from l32jax.data.sheet.drawing import svg
from l32jax.data.sheet.figures import fill_bars, intervals, tile_grid
from l32jax.data.sheet.letters import letters, plainly
from l32jax.data.sheet.look import look
from l32jax.data.sheet.page import page
from l32jax.data.sheet.poster import WIDTH, poster
from l32jax.data.sheet.rows import Sheet, canvas, see_row
from l32jax.data.sheet.segments import segments
from l32jax.data.sources.mixture import open_batches
from l32jax.data.tokenizer import Tokenizer
from l32jax.presets import TINY_TEXT, TINY_VISION
from l32jax.run_config import DataConfig
from tests.data_tests.pictures import png

TOKENIZER = Tokenizer.bytes_only()
IMAGE = TOKENIZER.image_id
BEGIN, END = (TOKENIZER.special(f"<|{name}_of_text|>") for name in ("begin", "end"))
VISION = VisionShape.of(TINY_VISION, max_images=4, max_tiles=4, slots=12)
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "section", "article", "details", "summary"),
    *("h1", "h2", "h3", "dl", "dt", "dd", "ul", "li", "p", "div", "figure", "figcaption", "img"),
    *("a", "b", "i", "bdi", "span", "svg", "polygon", "text"),
}


def document(text: str, images=(), weight: float = 1.0) -> Document:
    words = TOKENIZER.encode(text)
    tokens = [BEGIN, *[IMAGE] * len(images), *words, END]
    unlearned = [0.0] * (1 + len(images))
    return Document(tokens, [*unlearned, *[weight] * len(words), 1.0], images)


def example_row():
    """Two questions about one image, text of half the weight, and two images in one document."""
    asked = Sample((document("what?", (0,)), document("& why?", (0,))), (png(30, 60),))
    halved = Sample((document("half", weight=0.5),))
    several = Sample((document("two <b>", (0, 1)),), (png(28, 28, 1), png(80, 20, 2)))
    return make_row([asked, halved, several], length=64, vision=VISION)


def seen(row):
    return see_row(row, TOKENIZER, TINY_VISION.vision)


def sheet(*rows) -> Sheet:
    named = tuple((f"row {number}", seen(row)) for number, row in enumerate(rows))
    return Sheet("A sheet", (("mixture", "<here>"),), ("skipped x: y",), named)


class Reader(HTMLParser):
    """What a browser finds in a page: elements, their attributes, and text."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.words = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def of_class(self, name: str) -> list[str]:
        return [tag for tag, attrs in self.found if name in (attrs.get("class") or "").split()]


# What is read of the arrays


def test_documents_are_told_apart_and_each_piece_has_its_weight():
    first, second, half, several = seen(example_row()).passages
    assert [piece.text for piece in first.pieces if piece.kind == "text"] == ["what?"]
    assert [(piece.kind, piece.weight) for piece in half.pieces] == [
        ("special", 0.0),
        ("text", 0.5),
        ("special", 1.0),
    ]
    assert (first.images, second.images, half.images, several.images) == ((0,), (0,), (), (1, 2))
    assert [piece.image for piece in several.pieces if piece.kind == "image"] == [1, 2]
    assert (first.begin, second.begin) == (0, first.end)
    assert first.learned == len("what?") + 1


def test_pieces_have_every_token_of_a_document_once():
    for passage in seen(example_row()).passages:
        places = [i for piece in passage.pieces for i in range(piece.begin, piece.end)]
        assert places == list(range(passage.begin, passage.end))


def test_letters_of_several_tokens_are_whole():
    row = make_row([Sample((document("für 日本"),))], length=32)
    (passage,) = see_row(row, TOKENIZER, None).passages
    assert [piece.text for piece in passage.pieces][1] == "für 日本"


@pytest.mark.parametrize(("height", "width"), [(28, 28), (10, 90), (90, 10), (56, 50), (1, 300)])
def test_tiles_are_joined_to_the_picture_that_was_cut(height, width):
    image = load_image(png(height, width))
    tiles, grid = preprocess(image, tile_size=28)
    assert grid == choose_grid(height, width, tile_size=28, max_tiles=4)
    new_height, new_width = fit(height, width, grid, tile_size=28)
    whole = Image.new("RGB", (grid[1] * 28, grid[0] * 28))
    whole.paste(image.resize((new_width, new_height), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(canvas(tiles, grid), np.asarray(whole))


def test_pictures_of_a_row_are_those_of_its_samples_with_their_places():
    first, second, third = seen(example_row()).pictures
    assert (first.grid, first.slots) == ((1, 2), (0, 1))
    assert (second.grid, second.slots) == ((1, 1), (2,))
    assert (third.grid, third.slots) == ((3, 1), (3, 4, 5))
    tiles, grid = preprocess(load_image(png(80, 20, 2)), tile_size=28)
    np.testing.assert_array_equal(third.canvas, canvas(tiles, grid))


def test_a_text_row_has_no_vision():
    row = see_row(make_row([Sample((document("a"),))], length=8), TOKENIZER, None)
    assert (row.used, row.pictures, row.owners, row.tiles) == (3, (), (), ())


# What is wrong is seen


def test_a_target_that_is_not_the_next_token_is_shown():
    row = example_row()
    row["targets"][1] = ord("Z")
    (stray,) = [piece for piece in seen(row).passages[0].pieces if piece.kind == "stray"]
    assert (stray.text, stray.weight, stray.end) == ("Z", 1.0, 2)
    assert "learned, but not next: Z" in page(sheet(row))


def test_learned_padding_is_shown():
    row = example_row()
    row["weights"][-3], row["targets"][-3] = 1.0, ord("Z")
    padding = seen(row).passages[-1]
    assert padding.is_padding and padding.begin == len(row["tokens"]) - 3
    assert "padding that is learned" in page(sheet(row))


def test_an_image_token_that_sees_nothing_is_shown():
    row = example_row()
    row["vision_stop"][:] = 0
    assert "image, none seen" in page(sheet(row))


def test_a_tile_that_is_not_on_the_axis_is_shown():
    row = example_row()
    row["tile_index"][0] = 15
    assert seen(row).pictures[0].slots == (None, 1)
    assert "on the vision axis at none, 1" in page(sheet(row))


def test_an_unused_tile_that_is_seen_is_shown():
    row = example_row()
    row["vision_stop"][:] = len(row["tile_index"]) * TINY_VISION.vision.tokens_per_tile
    shapes = intervals(seen(row), 800).shapes
    assert any(shape.colour == "wrong" for shape in shapes)
    assert all(shape.colour != "wrong" for shape in intervals(seen(example_row()), 800).shapes)


def test_a_token_that_is_not_the_models_is_shown():
    row = example_row()
    row["tokens"][1] = 9999
    assert "token 9999" in page(sheet(row))


# Intervals


def covered(found, num_tokens: int, num_keys: int) -> np.ndarray:
    sees = np.zeros((num_tokens, num_keys), bool)
    for segment in found:
        grows = segment.end - segment.begin > 1 and segment.last_stop > segment.first_stop
        for token in range(segment.begin, segment.end):
            stop = segment.first_stop + grows * (token - segment.begin)
            sees[token, int(segment.start) : int(stop)] = True
    return sees


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_segments_are_the_intervals(pairs):
    start, stop = np.array(pairs, np.int32).T
    keys = np.arange(5)
    expected = (keys >= start[:, None]) & (keys < stop[:, None])
    np.testing.assert_array_equal(covered(segments(start, stop), len(pairs), 5), expected)


def test_a_packed_row_has_one_segment_a_document():
    row = seen(example_row())
    assert [(s.begin, s.end) for s in row.keys] == [(p.begin, p.end) for p in row.passages]


def test_tiles_are_seen_by_the_tokens_whose_interval_has_them():
    row = example_row()
    size = TINY_VISION.vision.tokens_per_tile
    for slot, found in enumerate(seen(row).tiles):
        expected = (row["vision_start"] <= slot * size) & (row["vision_stop"] > slot * size)
        told = {token for segment in found for token in range(segment.begin, segment.end)}
        assert told == set(np.flatnonzero(expected).tolist())


def test_drawings_are_well_formed_and_keep_inside_their_edges():
    row = seen(example_row())
    grids = [tile_grid(picture, 100, 150) for picture in row.pictures]
    for drawing in (fill_bars(row, 700), intervals(row, 700), *grids):
        corners = np.array([corner for shape in drawing.shapes for corner in shape.corners])
        assert (corners >= -1e-6).all()
        assert (corners <= np.array([drawing.width, drawing.height]) + 1e-6).all()
        ElementTree.fromstring(svg(drawing, "a & b"))


# The page


def test_the_page_has_what_is_in_its_rows():
    text = page(sheet(example_row()))
    read = Reader(text)
    words = "".join(read.words)
    assert all(told in words for told in ("what?", "& why?", "two <b>", "<|begin_of_text|>"))
    assert "two &lt;b&gt;" in text
    assert read.of_class("part").count("bdi") == 1  # the text of half the weight
    assert read.of_class("w1").count("bdi") == 3
    assert read.of_class("mark").count("a") == 4
    links = {attrs["href"] for tag, attrs in read.found if tag == "a"}
    assert links == {f"#{attrs['id']}" for tag, attrs in read.found if tag == "figure"}
    assert "image 3: 3 x 1 tiles, on the vision axis at 3, 4, 5" in words
    assert "text 53%" in words and "vision 50%" in words
    assert "skipped x: y" in words


def test_pictures_of_the_page_are_the_canvases_enlarged():
    row = example_row()
    data = re.findall(r'src="data:image/png;base64,([^"]+)"', page(sheet(row)))
    for picture, encoded in zip(seen(row).pictures, data, strict=True):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
        scale = shown.shape[0] // picture.canvas.shape[0]
        np.testing.assert_array_equal(shown[::scale, ::scale], picture.canvas)


def test_a_page_needs_no_other_file_and_runs_nothing():
    text = page(sheet(example_row()))
    read = Reader(text)
    assert {tag for tag, _ in read.found} <= ALLOWED | {"title"}
    sources = [attrs[name] for _, attrs in read.found for name in ("src", "href") if name in attrs]
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</p></style><svg onload=alert(1)>",
    "\x00\x07\x1b[31m\r\n\ttab",
    "\u0301 \u0301",
    "abc\u202egnp.exe\u2066 שלום \u200f",
    "&lt;&#0;&amp;",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_inert(text):
    row = make_row([Sample((document(text),))], length=128, vision=VISION)
    told = sheet(row)
    told = dataclasses.replace(told, title=text, facts=((text, text),), messages=(text,))
    written = page(told)
    assert all(letter.isprintable() or letter == "\n" for letter in written)
    read = Reader(written)
    assert {tag for tag, _ in read.found} <= ALLOWED
    assert not [name for _, attrs in read.found for name in attrs if name.startswith("on")]
    assert "".join(read.words).replace("\n", "").count(plainly(text)) >= 3
    poster(told)


@settings(max_examples=50)
@given(st.text(max_size=40))
def test_any_text_is_shown_as_text(text):
    row = make_row([Sample((document(text),))], length=200)
    told = Sheet(text, (), (), (("row", see_row(row, TOKENIZER, None)),))
    poster(told)
    read = Reader(page(told))
    assert {tag for tag, _ in read.found} <= ALLOWED
    assert plainly(text) in "".join(read.words).replace("\n", "")


def test_signs_stand_for_what_would_not_be_seen():
    assert list(letters("a\nb\u202e ü")) == [
        ("a", False),
        (r"\n", True),
        ("b", False),
        (r"\u202e", True),
        (" ü", False),
    ]


# The picture


def test_the_picture_opens_and_tells_weights_apart():
    def drawn(row) -> bytes:
        file = io.BytesIO()
        poster(sheet(row)).save(file, "PNG")
        file.seek(0)
        opened = Image.open(file)
        assert opened.width == WIDTH
        return opened.tobytes()

    row, other = example_row(), example_row()
    assert drawn(row) == drawn(other)
    other["weights"][row["weights"] == 0.5] = 0.6
    assert drawn(row) != drawn(other)


def test_the_picture_of_a_long_row_is_cut():
    def height(*texts: str) -> int:
        row = make_row([Sample((document(text),)) for text in texts], length=16384)
        return poster(Sheet("t", (), (), (("r", see_row(row, TOKENIZER, None)),))).height

    assert height("word " * 2000) == height("word " * 3000) > height("word " * 200)
    assert height(*["word"] * 20) == height(*["word"] * 90) > height(*["word"] * 12)


# The rows of a stage


def write_records(folder, number_bad: int):
    """Captions of pictures, and lines that are broken."""
    (folder / "picture.png").write_bytes(png(40, 70))
    good = [{"image": "picture.png", "text": f"a picture, number {i}"} for i in range(12)]
    lines = [*map(json.dumps, good), *["{broken"] * number_bad]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return str(folder / "data.jsonl")


def vision_data(source: str, **changes) -> DataConfig:
    options = dict(batch_size=6, length=128, max_images=2, packing_rows=2) | changes
    return DataConfig(mixture=((source, 1.0),), **options)


def test_rows_are_those_that_training_begins_with(tmp_path):
    data = vision_data(write_records(tmp_path, 0))
    told = look(data, TINY_VISION, TOKENIZER, seed=3, count=4, title="t")
    place = dict(process_index=0, process_count=1)
    batches = open_batches(data, TINY_VISION, TOKENIZER, seed=3, **place)
    steps = [next(batches) for _ in told.rows]
    batches.close()
    assert [name for name, _ in told.rows] == [f"row 1 of step {step}" for step in (1, 2, 3, 4)]
    for (_, found), batch in zip(told.rows, steps, strict=True):
        expected = seen({name: array[0] for name, array in batch.items()})
        assert (found.passages, found.keys) == (expected.passages, expected.keys)
        for one, other in zip(found.pictures, expected.pictures, strict=True):
            np.testing.assert_array_equal(one.canvas, other.canvas)


def test_skipped_records_are_told_with_their_places(tmp_path):
    data = vision_data(write_records(tmp_path, 6), packing="none")
    told = look(data, TINY_VISION, TOKENIZER, seed=0, count=24, title="t")
    assert any("data.jsonl line 13" in message for message in told.messages)
    assert "24 in these rows" in dict(told.facts)["samples"]


def test_more_bad_records_than_training_puts_up_with_are_told(tmp_path):
    data = vision_data(write_records(tmp_path, 6), packing="none", max_bad=0.0)
    told = look(data, TINY_VISION, TOKENIZER, seed=0, count=24, title="t")
    assert "more than max_bad=0.0" in dict(told.facts)["samples"]


def test_the_share_of_rows_that_is_used_is_told(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "12345678"}\n')
    data = DataConfig(
        mixture=((str(tmp_path / "text.jsonl"), 2.0),), batch_size=2, length=40, packing="none"
    )
    told = look(data, TINY_TEXT, TOKENIZER, seed=0, count=2, title="t")
    facts = dict(told.facts)
    assert facts["packing"] == "none: 25.0% of the tokens of these rows are used"
    assert facts["learned"] == "18 of 20 tokens"
    assert facts["mixture"].endswith("text.jsonl (100%)")
