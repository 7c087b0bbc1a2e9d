import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from l32jax.config import VisionConfig
from l32jax.data.images import load_image, preprocess
from l32jax.data.rows import FIELDS, VisionShape, make_prompt_batch, make_row, vision_intervals
from l32jax.data.samples import Document, Sample, mirror
from l32jax.errors import InputError
from tests import golden

GOLDEN = golden.document("tokenizer_chat_meta.json")
IMAGE = 9
ENCODER = VisionConfig(image_size=28, num_local_layers=3, taps=(1, 2))
PER_TILE = ENCODER.tokens_per_tile
SHAPE = VisionShape(encoder=ENCODER, image_id=IMAGE, max_images=4, slots=8, max_tiles=4)

SQUARE, WIDE, TALL = (
    Image.effect_noise(size, 90).convert("RGB") for size in ((28, 28), (56, 20), (20, 90))
)


def sample_of(tokens, images=()) -> Sample:
    return Sample.single(tokens, [1.0] * len(tokens), images)


@pytest.mark.parametrize(("tokens", "spans"), GOLDEN["vision_masks_imgtok9"])
def test_intervals_are_metas_vision_masks(tokens, spans):
    start, stop = vision_intervals(tokens, IMAGE, [1] * len(spans))
    ends = [end if end != -1 else len(tokens) for _, end in spans]
    for position in range(len(tokens)):
        seen = [k for k, (begin, _) in enumerate(spans) if begin <= position < ends[k]]
        assert list(range(start[position], stop[position])) == seen


TOKENS = st.lists(st.sampled_from([5, IMAGE]), min_size=1, max_size=20)


def spans_by_definition(tokens: list[int]) -> list[tuple[int, int]]:
    """Each image from its token up to the next one that does not adjoin it, else the end."""
    spans = []
    for begin in (p for p, token in enumerate(tokens) if token == IMAGE):
        end = begin
        while end < len(tokens) and tokens[end] == IMAGE:
            end += 1
        while end < len(tokens) and tokens[end] != IMAGE:
            end += 1
        spans.append((begin, end))
    return spans


@given(TOKENS, st.data())
def test_each_token_sees_exactly_the_tiles_of_the_images_whose_span_holds_it(tokens, data):
    spans = spans_by_definition(tokens)
    counts = data.draw(st.lists(st.integers(1, 4), min_size=len(spans), max_size=len(spans)))
    ends = np.cumsum([0, *counts])
    start, stop = vision_intervals(tokens, IMAGE, counts)
    for position in range(len(tokens)):
        seen = [k for k, (begin, end) in enumerate(spans) if begin <= position < end]
        tiles = [tile for k in seen for tile in range(ends[k], ends[k + 1])]
        assert list(range(start[position], stop[position])) == tiles


def test_the_first_of_two_adjacent_images_is_not_shown_the_second():
    start, stop = vision_intervals([9, 9, 5, 6], IMAGE, [3, 2])
    assert start.tolist() == [0, 0, 0, 0]
    assert stop.tolist() == [3, 5, 5, 5]


def test_a_row_is_its_documents_end_to_end():
    documents = (Document([1, 2, 3], [0, 1, 0.5]), Document([4, 5], [1, 1]))
    row = make_row([Sample(documents)], length=7)
    assert {name: array.tolist() for name, array in row.items()} == {
        "tokens": [1, 2, 3, 4, 5, 0, 0],
        "targets": [2, 3, 0, 5, 0, 0, 0],
        "weights": [1, 0.5, 0, 1, 0, 0, 0],
        "positions": [0, 1, 2, 0, 1, 0, 0],
        "start": [0, 0, 0, 3, 3, 0, 0],
        "stop": [1, 2, 3, 4, 5, 0, 0],
    }


DOCUMENTS = st.lists(
    st.lists(st.tuples(st.integers(1, 99), st.sampled_from([0.0, 1.0])), min_size=1, max_size=5),
    max_size=5,
)


@given(DOCUMENTS)
def test_a_packed_row_holds_the_rows_of_its_documents(documents):
    samples = [Sample.single(*zip(*document, strict=True)) for document in documents]
    packed = make_row(samples, length=25)
    offset = 0
    for sample in samples:
        size = len(sample.documents[0].tokens)
        alone = make_row([sample], length=size)
        for name, shift in {"start": offset, "stop": offset}.items():
            alone[name] = alone[name] + shift
        for name, array in alone.items():
            assert np.array_equal(packed[name][offset : offset + size], array), name
        offset += size
    assert not any(array[offset:].any() for array in packed.values())


def test_a_packed_row_of_images_holds_the_rows_of_its_samples():
    samples = [
        sample_of([1, 9, 5, 9, 6], [WIDE, SQUARE]),
        sample_of([1, 2]),
        sample_of([9, 7, 8], [TALL]),
    ]
    packed = make_row(samples, length=12, vision=SHAPE)
    text_at, image_at, tile_at = 0, 0, 0
    for sample in samples:
        size = len(sample.documents[0].tokens)
        alone = make_row([sample], length=size, vision=SHAPE)
        span = slice(text_at, text_at + size)
        images = slice(image_at, image_at + len(sample.images))
        for name in ("tokens", "targets", "weights", "positions"):
            assert np.array_equal(packed[name][span], alone[name]), name
        sees = alone["vision_stop"] > 0
        for name in ("vision_start", "vision_stop"):
            expected = np.where(sees, alone[name] + tile_at * PER_TILE, 0)
            assert np.array_equal(packed[name][span], expected), name
        for name in ("tiles", "aspect"):
            assert np.array_equal(packed[name][images], alone[name][: len(sample.images)]), name
        text_at, image_at = span.stop, images.stop
        tile_at += alone["aspect"].prod(axis=1).sum()
    assert packed["aspect"].tolist() == [[1, 2], [1, 1], [4, 1], [0, 0]]
    assert packed["tile_index"].tolist() == [0, 1, 4, 8, 9, 10, 11, 2]  # used ones, then the rest


def test_questions_about_one_image_share_its_tiles():
    question = Document([1, 9, 5], [0, 0, 1], images=(0,))
    row = make_row([Sample((question, question), (WIDE,))], length=6, vision=SHAPE)
    assert row["vision_start"].tolist() == [0] * 6
    assert row["vision_stop"].tolist() == [0, 2 * PER_TILE, 2 * PER_TILE] * 2
    assert row["aspect"].tolist() == [[1, 2], [0, 0], [0, 0], [0, 0]]


def test_documents_see_only_the_images_they_name():
    first = Document([9, 5], [0, 1], images=(0,))
    later = Document([9, 9, 5], [0, 0, 1], images=(1, 2))
    sample = Sample((later, first, later), (TALL, SQUARE, WIDE))
    row = make_row([sample], length=8, vision=SHAPE)
    later_sees = ([4, 4, 4], [5, 7, 7])
    assert (row["vision_start"] // PER_TILE).tolist() == later_sees[0] + [0, 0] + later_sees[0]
    assert (row["vision_stop"] // PER_TILE).tolist() == later_sees[1] + [4, 4] + later_sees[1]


def test_tiles_of_a_row_are_the_preprocessed_images():
    row = make_row([sample_of([9, 9, 5], [WIDE, SQUARE])], length=3, vision=SHAPE)
    wide, _ = preprocess(WIDE, tile_size=28, max_tiles=4)
    assert row["tiles"].shape == (4, 4, 3, 28, 28)
    assert np.array_equal(row["tiles"][0, :2], wide)
    assert not row["tiles"][0, 2:].any() and not row["tiles"][2:].any()


def test_an_image_is_never_a_target():
    row = make_row([sample_of([1, 9, 5], [SQUARE])], length=3, vision=SHAPE)
    assert row["targets"].tolist() == [0, 5, 0]
    assert row["weights"].tolist() == [0, 1, 0]


def test_a_row_without_images_sees_none_and_has_the_same_fields():
    texts = make_row([sample_of([1, 2])], length=4, vision=SHAPE)
    with_image = make_row([sample_of([9, 2], [SQUARE])], length=4, vision=SHAPE)
    for name, array in with_image.items():
        assert (texts[name].shape, texts[name].dtype) == (array.shape, array.dtype)
        assert array.ndim == len(FIELDS[name]) - 1
    for name in ("tiles", "aspect", "vision_start", "vision_stop"):
        assert not texts[name].any()
    assert texts["tile_index"].tolist() == list(range(SHAPE.slots))


@pytest.mark.parametrize(
    ("samples", "why"),
    [
        ([sample_of([1] * 9)], "9 tokens in a row: it holds 8"),
        ([sample_of([9, 9, 5], [SQUARE])], "2 image tokens in a document of 1 images"),
        ([sample_of([1, 5], [SQUARE])], "0 image tokens in a document of 1 images"),
        ([sample_of([9], [SQUARE])] * 5, "5 images in a row: it holds 4"),
        ([sample_of([9], [TALL])] * 3, "12 tiles in a row: its vision axis holds 8"),
        ([sample_of([9], [b"not an image"])], "image in 12 bytes"),
    ],
)
def test_what_does_not_fit_is_an_input_error(samples, why):
    with pytest.raises(InputError, match=why):
        make_row(samples, length=8, vision=SHAPE)


def test_images_need_a_row_with_vision():
    with pytest.raises(InputError, match="text-only"):
        make_row([sample_of([9], [SQUARE])], length=8)


def test_every_image_of_a_sample_needs_a_document():
    with pytest.raises(InputError, match=r"documents name \[0\] of 2 images"):
        Sample((Document([9], [0], (0,)),), (SQUARE, WIDE))


def test_a_canvas_has_no_more_tiles_than_the_encoder():
    with pytest.raises(InputError, match="max_tiles=5"):
        VisionShape(encoder=ENCODER, image_id=9, max_images=1, slots=4, max_tiles=5)


def test_images_of_a_document_are_consecutive():
    with pytest.raises(AssertionError):
        Document([9, 9], [0, 0], images=(0, 2))


PROMPTS = [([1, 9, 5], [WIDE]), ([1], []), ([9, 4, 9, 5, 6], [SQUARE, WIDE])]


def test_prompts_are_padded_on_the_right():
    batch = make_prompt_batch(PROMPTS, length=6, vision=SHAPE)
    assert batch["tokens"].tolist() == [[1, 9, 5, 0, 0, 0], [1, 0, 0, 0, 0, 0], [9, 4, 9, 5, 6, 0]]
    assert batch["length"].tolist() == [3, 1, 5]
    assert batch["stop"][0].tolist() == [1, 2, 3, 0, 0, 0]
    assert {name: len(FIELDS[name]) for name in batch} == {n: a.ndim for n, a in batch.items()}


@pytest.mark.parametrize(
    ("after_prompt", "expected"),
    [("hf", [(0, 2), (0, 0), (1, 3)]), ("meta", [(0, 2), (0, 0), (0, 0)])],
)
def test_generated_tokens_see_the_last_images_or_as_in_metas_code_a_single_one(
    after_prompt, expected
):
    batch = make_prompt_batch(PROMPTS, length=6, vision=SHAPE, after_prompt=after_prompt)
    sees = np.stack([batch["next_vision_start"], batch["next_vision_stop"]], axis=1)
    assert (sees // PER_TILE).tolist() == [list(pair) for pair in expected]


def test_text_prompts_need_no_vision():
    batch = make_prompt_batch([([1, 2], []), ([3], [])], length=2)
    assert sorted(batch) == ["length", "positions", "start", "stop", "tokens"]
    with pytest.raises(InputError, match="without tokens"):
        make_prompt_batch([([], [])], length=2)


def test_mirroring_changes_the_images_alone():
    sample = sample_of([9, 5], [WIDE])
    mirrored = [mirror(sample, np.random.default_rng(seed)) for seed in range(20)]
    assert {load_image(s.images[0]).size for s in mirrored} == {load_image(WIDE).size}
    assert all(s.documents == sample.documents for s in mirrored)
