import dataclasses

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax.data.images import choose_grid
from l32jax.data.packing import RowShape, fit, pack
from l32jax.data.rows import make_row
from l32jax.data.samples import Document, Sample
from l32jax.errors import InputError
from tests.data_tests.pictures import IMAGE_ID, VISION, samples

RNG = np.random.default_rng(0)
LENGTH = 16
SHAPE = RowShape(length=LENGTH, vision=dataclasses.replace(VISION, max_images=3, slots=6))
TEXT_ONLY = RowShape(length=LENGTH)


def picture(tiles: int) -> np.ndarray:
    """As many tiles as said, side by side."""
    return np.zeros((28, 28 * tiles, 3), np.uint8)


@st.composite
def documents(draw, *, learned_throughout: bool = True):
    """Text with images anywhere in it, of any length; each token's number tells its place."""
    is_image = draw(st.lists(st.booleans() | st.just(False), min_size=1, max_size=60))
    tokens = [IMAGE_ID if image else 100 + place for place, image in enumerate(is_image)]
    tiles = draw(st.lists(st.integers(1, 4), min_size=sum(is_image), max_size=sum(is_image)))
    weights = [float(not image) for image in is_image]
    weights[0] = 0.0
    if not learned_throughout:
        begin = draw(st.integers(0, len(tokens)))
        weights[:begin] = [0.0] * begin
    return Sample.single(tokens, weights, [picture(number) for number in tiles])


def within(sample: Sample, shape: RowShape) -> bool:
    return all(need <= have for need, have in zip(shape.size_of(sample), shape.size, strict=True))


@given(documents())
def test_pieces_of_a_document_fit_and_hold_all_of_it_in_order(sample):
    pieces = fit(sample, SHAPE, RNG)
    assert all(within(piece, SHAPE) for piece in pieces)
    kept = [token for piece in pieces for token in piece.documents[0].tokens]
    left = [token for token in sample.documents[0].tokens if token != IMAGE_ID]
    # What is left out are pieces in which nothing follows anything that could predict it.
    assert [token for token in kept if token != IMAGE_ID] == [t for t in left if t in kept]
    lost = len(sample.documents[0].tokens) - len(kept)
    assert lost <= 1 + sample.documents[0].tokens.count(IMAGE_ID) + 1
    for piece in pieces:
        (document,) = piece.documents
        assert len(piece.images) == document.tokens.count(IMAGE_ID)
        make_row([piece], length=LENGTH, vision=SHAPE.vision)


@given(documents(learned_throughout=False))
def test_of_a_dialog_that_is_too_long_the_beginning_is_kept(sample):
    pieces = fit(sample, SHAPE, RNG)
    (document,) = sample.documents
    learned = [
        w > 0 for t, w in zip(document.tokens, document.weights, strict=True) if t != IMAGE_ID
    ]
    if within(sample, SHAPE):
        assert pieces == [sample]
    elif not all(learned[1:]):
        assert len(pieces) <= 1
    assert all(within(piece, SHAPE) for piece in pieces)


def test_a_piece_sees_the_images_that_begin_in_it():
    tokens = [1, IMAGE_ID, *range(2, 16), 16, IMAGE_ID, 17, 18]
    images = [picture(1), picture(2)]
    weights = [float(token not in (1, IMAGE_ID)) for token in tokens]
    first, second = fit(Sample.single(tokens, weights, images), SHAPE, RNG)
    assert first.documents[0].tokens == tokens[:16] and second.documents[0].tokens == tokens[16:]
    assert first.images == (images[0],) and second.images == (images[1],)


def test_an_image_that_finds_no_room_begins_a_piece():
    tokens = [1, IMAGE_ID, 2, IMAGE_ID, 3, 4]
    weights = [0.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    sample = Sample.single(tokens, weights, [picture(4), picture(3)])
    pieces = fit(sample, SHAPE, RNG)
    assert [list(p.documents[0].tokens) for p in pieces] == [tokens[:3], tokens[3:]]


def test_of_documents_over_one_image_as_many_are_drawn_as_fit():
    asked = tuple(Document((1, IMAGE_ID, n, n), (0.0, 0.0, 0.0, 1.0), (0,)) for n in range(9))
    (drawn,) = fit(Sample(asked, (picture(1),)), SHAPE, np.random.default_rng(0))
    (other,) = fit(Sample(asked, (picture(1),)), SHAPE, np.random.default_rng(1))
    assert len(drawn.documents) == 4 and set(drawn.documents) < set(asked)
    assert drawn.documents != other.documents


@pytest.mark.parametrize(
    ("sample", "shape", "why"),
    [
        (Sample.single([1, IMAGE_ID], [0, 1], [picture(1)]), TEXT_ONLY, "set max_images"),
        (
            Sample(
                tuple(Document([IMAGE_ID] * 4, [1.0] * 4, (0, 1, 2, 3)) for _ in range(2)),
                tuple(picture(1) for _ in range(4)),
            ),
            SHAPE,
            "4 images of 4 tiles under several documents",
        ),
        (Sample(tuple(Document([1] * 17, [1.0] * 17) for _ in range(2))), SHAPE, "lengthen rows"),
    ],
)
def test_what_no_row_holds_is_an_input_error(sample, shape, why):
    with pytest.raises(InputError, match=why):
        fit(sample, shape, RNG)


@pytest.mark.parametrize("packing", ["best_fit", "first_fit", "none"])
def test_packed_rows_keep_to_their_limits_and_lose_no_sample(packing):
    shape = RowShape(length=64, vision=VISION)
    given = samples(80)
    elements = grain.MapDataset.source([{"sample": s, "bad": []} for s in given]).to_iter_dataset()
    rows = [row["sample"] for row in pack(elements, shape, packing=packing, open_rows=4, seed=0)]
    for row in rows:
        total = np.sum([shape.size_of(sample) for sample in row], axis=0)
        assert np.all(total <= shape.size)
    packed = [sample.place for row in rows for sample in row]
    assert sorted(packed) == sorted(sample.place for sample in given)
    if packing == "none":
        assert [len(row) for row in rows] == [1] * 80


def test_images_are_measured_without_being_decoded(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    shape = RowShape(length=64, vision=VISION)
    for sample in samples(8):
        assert shape.size_of(sample).images == len(sample.images)


def test_measured_tiles_are_those_that_the_row_has():
    shape = RowShape(length=64, vision=VISION)
    for sample in samples(12):
        if sample.images and within(sample, shape):
            row = make_row([sample], length=64, vision=VISION)
            assert row["aspect"].prod(axis=-1).sum() == shape.size_of(sample).tiles
    assert choose_grid(28, 112, tile_size=28, max_tiles=4) == (1, 4)
