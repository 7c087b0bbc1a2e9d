import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from l32jax.data import records
from l32jax.data.chat import Image, Message, encode_for_training
from l32jax.data.images import load_image
from l32jax.data.records import Bad, Record, SamplesOf, image_size, to_sample
from l32jax.data.samples import Sample
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError

TOKENIZER = Tokenizer.bytes_only()
BEGIN = TOKENIZER.special("<|begin_of_text|>")
END = TOKENIZER.special("<|end_of_text|>")
IMAGE = TOKENIZER.image_id


def picture(kind: str = "PNG", size: tuple[int, int] = (5, 3)) -> bytes:
    file = io.BytesIO()
    Pillow.new("RGB", size, (200, 10, 10)).save(file, kind)
    return file.getvalue()


def sample_of(record: Record, *, with_images: bool = True) -> Sample | Bad:
    return to_sample(record, TOKENIZER, with_images=with_images)


def why(record: Record, *, with_images: bool = True) -> str:
    found = sample_of(record, with_images=with_images)
    assert isinstance(found, Bad) and found.place == record.place
    assert "\n" not in found.why
    return found.why


@given(st.lists(st.text(min_size=1) | st.just(None), min_size=1))
def test_a_document_is_learned_but_for_its_beginning_and_its_images(texts):
    image = Image(picture())
    parts = tuple(image if text is None else text for text in texts)
    sample = sample_of(Record("here", parts=parts))
    assert isinstance(sample, Sample)
    (document,) = sample.documents
    expected = [
        token for text in texts for token in ([IMAGE] if text is None else TOKENIZER.encode(text))
    ]
    assert list(document.tokens) == [BEGIN, *expected, END]
    assert [bool(weight) for weight in document.weights] == [
        token not in (BEGIN, IMAGE) for token in document.tokens
    ]
    assert len(sample.images) == texts.count(None) and sample.place == "here"


def test_a_conversation_is_learned_where_the_assistant_speaks():
    asked = Message("user", (Image(picture()), "what?", Image(picture("JPEG"))))
    messages = (asked, Message("assistant", "red"))
    sample = sample_of(Record("here", messages=messages))
    assert isinstance(sample, Sample)
    tokens, weights = encode_for_training(TOKENIZER, messages)
    assert (sample.documents[0].tokens, sample.documents[0].weights) == (tokens, weights)
    assert sample.images == (picture(), picture("JPEG"))


def test_images_without_a_model_that_sees_them_are_bad():
    record = Record("here", parts=(Image(picture()), "red"))
    assert "set max_images" in why(record, with_images=False)
    assert isinstance(sample_of(Record("here", parts=("red",)), with_images=False), Sample)


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size, and holds nothing."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", picture()[:20], bomb(60_000, 60_000), bomb(10_000, 10_000), bomb(0, 5)],
    ids=["empty", "text", "cut", "bomb", "large", "none"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_image_is_bad(data, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(data)
    for source in (data, path):
        assert "image in" in why(Record("here", parts=(Image(source), "red")))


def test_an_image_that_is_not_there_is_bad(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        assert "no such file" in why(Record("here", parts=(Image(path), "red")))


def test_an_image_of_too_many_bytes_is_not_opened(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "MAX_BYTES", 10)
    (tmp_path / "image.png").write_bytes(picture())
    for source in (picture(), tmp_path / "image.png"):
        assert "more than 10 bytes" in why(Record("here", parts=(Image(source), "red")))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_the_header_tells_the_size_of_what_is_decoded(kind, tmp_path):
    data = picture(kind, size=(7, 4))
    (tmp_path / "image").write_bytes(data)
    assert image_size(data) == image_size(tmp_path / "image") == (4, 7)
    decoded = load_image(data)
    assert decoded.size == (7, 4)
    assert image_size(decoded) == image_size(np.asarray(decoded)) == (4, 7)


@given(st.data())
def test_damage_of_an_image_is_an_input_error_at_the_latest_when_it_is_decoded(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]))
    damaged = bytearray(picture(kind))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        image_size(bytes(damaged))
        assert np.asarray(load_image(bytes(damaged))).dtype == np.uint8
    except InputError:
        pass


def test_records_become_samples_when_looked_at_and_bad_ones_stay_bad():
    found = SamplesOf([Record("a", parts=("red",)), Bad("b", "broken")], TOKENIZER, True)
    assert len(found) == 2
    assert isinstance(found[0], Sample) and found[0].place == "a"
    assert found[1] == Bad("b", "broken")
