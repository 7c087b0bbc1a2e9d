"""Features in a folder: what is read is what was written, and what is not whole is not read."""

import dataclasses
import hashlib
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from l32jax.data import features
from l32jax.data.feature_parts import DTYPES, UNIT, Kind, Part, Unit
from l32jax.data.features import Features
from l32jax.data.records import Bad
from l32jax.data.rows import VisionShape, make_row
from l32jax.data.samples import Sample
from l32jax.errors import InputError
from l32jax.presets import TINY_VISION
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig

IMAGE_ID = TINY_VISION.decoder.vocab_size
KIND = Kind(encoder="e" * 64, image_size=28, max_tiles=4, tokens=5, width=96, dtype="float32")
VISION = VisionShape.of(TINY_VISION, max_images=4, max_tiles=4, slots=12)
COUNT = UNIT + 4  # images, of two units


def picture(number: int) -> bytes:
    """One to four tiles of 28 pixels."""
    file = io.BytesIO()
    pixels = np.full((20 + number, 28 * (1 + number % 4), 3), number, np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PICTURES = [picture(number) for number in range(COUNT)]
SOURCE = [Sample.single([IMAGE_ID, 7], [0.0, 1.0], [each]) for each in PICTURES]


def made_of(number: int, num_tiles: int, kind: Kind) -> np.ndarray:
    random = np.random.default_rng(number)
    made = random.normal(size=(num_tiles, kind.tokens, kind.width))
    return made.astype(DTYPES[kind.dtype])


def tiles_of(entry: np.ndarray) -> int:
    return int(entry["rows"]) * int(entry["columns"])


def unit_of(part: Part, number: int, kind: Kind, *, elsewhere=(), bad=()) -> Unit:
    """Features that say which image they are of."""
    entries = part.unit(number)
    good = [n for n in range(len(entries)) if n not in elsewhere and n not in dict(bad)]
    counts = [tiles_of(entries[n]) for n in good]
    made = [made_of(int(entries["record"][n]), c, kind) for n, c in zip(good, counts, strict=True)]
    return Unit(
        np.repeat(np.array(good, np.int32), counts),
        np.concatenate([np.arange(count) for count in counts]),
        np.concatenate(made),
        elsewhere,
        dict(bad),
    )


def begun(folder: Path, source=SOURCE, kind: Kind = KIND, name: str = "source") -> Part:
    folder.mkdir(exist_ok=True)
    features.write_kind(folder, kind)
    place = features.part_of(folder, name, source, kind)
    Part.begin(place, features.list_images(source, kind, advance=lambda more: None))
    return Part(place, kind)


def filled(folder: Path, kind: Kind = KIND) -> Part:
    part = begun(folder, kind=kind)
    for number in range(part.num_units):
        part.write(number, unit_of(part, number, kind))
    return part


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read_after_pickling_too(dtype, tmp_path):
    kind = dataclasses.replace(KIND, dtype=dtype)
    part = filled(tmp_path, kind)
    assert part.num_units == 2
    kept = pickle.loads(pickle.dumps(Features(tmp_path)))
    chosen = [18, 3, 0]
    found = [kept.find(PICTURES[number]) for number in chosen]
    read = kept.read(found, 12)
    counts = [rows * columns for _, _, (rows, columns) in found]
    wanted = [made_of(n, count, kind) for n, count in zip(chosen, counts, strict=True)]
    assert read.dtype == DTYPES[dtype] and read.shape == (12, 5, 96)
    np.testing.assert_array_equal(read[: sum(counts)], np.concatenate(wanted))
    assert not read[sum(counts) :].any()


def test_only_used_tiles_take_room(tmp_path):
    part = filled(tmp_path)
    used = sum(map(tiles_of, part.images)) * KIND.tile_bytes
    stored = sum(path.stat().st_size for path in (part.folder / "tiles").glob("c.*"))
    assert used < stored < 1.1 * used


def test_an_image_is_known_by_what_it_holds(tmp_path):
    filled(tmp_path / "features")
    copy = tmp_path / "of another name"
    copy.write_bytes(PICTURES[3])
    kept = Features(tmp_path / "features")
    assert kept.find(copy)[1:] == kept.find(PICTURES[3])[1:]
    with pytest.raises(InputError, match="none of this image"):
        kept.find(picture(COUNT))


def test_pictures_in_memory_are_known_by_their_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
    key = features.image_key(pixels)
    assert key == features.image_key(Image.fromarray(pixels))
    assert key != features.image_key(pixels.reshape(6, 8, 3))


def test_rows_are_as_with_tiles_but_for_the_features(tmp_path):
    """Of several images and of none; in the order of the vision axis."""
    filled(tmp_path)
    samples = [
        Sample.single([1, IMAGE_ID, 5, IMAGE_ID, IMAGE_ID, 6], [0, 0, 1, 0, 0, 1], PICTURES[1:4]),
        Sample.single([1, 2, 3], [0, 1, 1]),
        Sample.single([IMAGE_ID, 3], [0, 1], PICTURES[16:17]),
    ]
    for chosen in (samples, samples[1:2]):
        options = {"length": 16, "vision": VISION}
        plain = make_row(chosen, **options)
        kept = make_row(chosen, features=Features(tmp_path), **options)
        assert kept.keys() == plain.keys() - {"tiles"} | {"features"}
        for name in kept.keys() - {"features"}:
            np.testing.assert_array_equal(kept[name], plain[name])
        assert kept["features"].shape == (12 * 5, 96)
    full = make_row(samples, features=Features(tmp_path), **options)
    of_last = made_of(16, 1, KIND)
    used = full["aspect"].prod(axis=1)
    np.testing.assert_array_equal(full["features"].reshape(12, 5, 96)[used[:3].sum()], of_last[0])
    with pytest.raises(InputError, match="its vision axis holds 12"):
        four = Sample.single([IMAGE_ID] * 4, [0] * 4, [PICTURES[n] for n in (3, 7, 11, 15)])
        make_row([four], features=Features(tmp_path), **options)


def test_a_unit_without_its_mark_is_not_there(tmp_path):
    part = begun(tmp_path)
    part.write(0, unit_of(part, 0, KIND))
    kept = Features(tmp_path)
    kept.find(PICTURES[0])
    with pytest.raises(InputError, match="none of this image"):
        kept.find(PICTURES[UNIT])
    assert Part(part.folder, KIND).done.tolist() == [True, False]


def test_what_another_part_has_is_found_there(tmp_path):
    filled(tmp_path)
    also = [SOURCE[2], Sample.single([IMAGE_ID], [0.0], [picture(COUNT)])]
    other = begun(tmp_path, also, name="another")
    assert Features(tmp_path).has(other.images["key"]).tolist() == [True, False]
    other.write(0, unit_of(other, 0, KIND, elsewhere=(0,)))
    kept = Features(tmp_path)
    assert kept.find(PICTURES[2]).part.folder != kept.find(picture(COUNT)).part.folder


def test_images_that_cannot_be_decoded_are_told_of(tmp_path):
    part = begun(tmp_path)
    part.write(0, unit_of(part, 0, KIND, bad={3: "image in 12 bytes: damaged"}.items()))
    with pytest.raises(InputError, match="image in 12 bytes: damaged"):
        Features(tmp_path).find(PICTURES[3])
    Features(tmp_path).find(PICTURES[4])


def test_images_are_listed_once_and_broken_ones_not_at_all():
    source = [SOURCE[0], Bad("line 2", "no"), SOURCE[0], Sample.single([1], [1.0])]
    source.append(Sample.single([IMAGE_ID] * 2, [0.0] * 2, [b"no image", PICTURES[5]]))
    told = []
    listed = features.list_images(source, KIND, advance=told.append)
    assert listed[["record", "number"]].tolist() == [(0, 0), (4, 1)]
    assert sum(told) == len(source)


def test_a_flipped_bit_costs_one_tile_and_is_named(tmp_path):
    """Each image but that of the tile is still read; where the index is hit, none of the unit."""
    part = filled(tmp_path)
    path = part.folder / "tiles" / "c.0.0.0.0"
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for place in [*random.integers(0, len(whole) - 1100, 12).tolist(), len(whole) - 1]:
        broken = bytearray(whole)
        broken[place] ^= 1 << int(random.integers(8))
        path.write_bytes(broken)
        kept, bad = Features(tmp_path), []
        for number, image in enumerate(PICTURES):
            try:
                kept.read([kept.find(image)], 12)
            except InputError as error:
                assert str(path) in str(error) and "00000000.json" in str(error)
                assert f"image {number} " in str(error) and "\n" not in str(error)
                bad.append(number)
        assert bad == list(range(UNIT)) if place == len(whole) - 1 else len(bad) == 1
    path.unlink()
    with pytest.raises(InputError, match="damaged or missing"):
        kept.read([kept.find(PICTURES[0])], 12)


@pytest.mark.parametrize("name", ["images.npy", "part.json", "units/00000000.json"])
def test_damage_beside_the_tiles_is_one_line(name, tmp_path):
    part = filled(tmp_path)
    content = (part.folder / name).read_bytes()
    for broken in (content[: len(content) // 2], b"", b"[]", b"\xff" * 50):
        (part.folder / name).write_bytes(broken)
        with pytest.raises(InputError, match="damaged") as error:
            Features(tmp_path).find(PICTURES[0])
        assert "\n" not in str(error.value)


def test_a_unit_is_written_again_over_a_damaged_one(tmp_path):
    part = filled(tmp_path)
    path = part.folder / "tiles" / "c.0.0.0.0"
    whole = hashlib.sha256(path.read_bytes()).digest()
    path.write_bytes(path.read_bytes()[:100])
    again = Part(part.folder, KIND)
    again.write(0, unit_of(again, 0, KIND))
    assert hashlib.sha256(path.read_bytes()).digest() == whole


def test_features_of_another_kind_are_refused(tmp_path):
    features.write_kind(tmp_path, KIND)
    features.require_kind(tmp_path, KIND)
    for change in ({"encoder": "f" * 64}, {"image_size": 56}, {"dtype": "bfloat16"}):
        with pytest.raises(InputError, match=f"they are of {next(iter(change))}=") as error:
            features.require_kind(tmp_path, dataclasses.replace(KIND, **change))
        assert "\n" not in str(error.value)
    (tmp_path / "features.json").write_text('{"format": "another"}')
    with pytest.raises(InputError, match="not one of this version"):
        features.require_kind(tmp_path, KIND)
    with pytest.raises(InputError, match="there are none"):
        Features(tmp_path / "nowhere").find(PICTURES[0])


def data_with(**changes) -> DataConfig:
    given = {"max_images": 2, "features": "kept"} | changes
    return DataConfig(mixture=(("x.jsonl", 1.0),), batch_size=1, length=8, **given)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"mirror_images": True}, "mirror_images"),
        ({"max_images": 0}, "max_images=0"),
        ({"features": "gs://bucket/kept"}, "folder"),
        ({"features": ""}, "folder"),
    ],
)
def test_data_that_cannot_have_features_is_refused(changes, why):
    with pytest.raises(InputError, match=why):
        data_with(**changes)


def test_features_need_a_frozen_encoder_and_its_used_tiles_alone():
    def stage(*parts):
        optimizer = OptimizerConfig(peak_lr=1.0)
        return StageConfig(
            name="s", num_steps=1, trains=parts, data=data_with(), optimizer=optimizer
        )

    with pytest.raises(InputError, match="trains vision_tower"):
        stage("adapter", "vision_tower")
    model = dataclasses.replace(
        TINY_VISION, compat=dataclasses.replace(TINY_VISION.compat, row_mask="hf")
    )
    TrainConfig(model=TINY_VISION, stages=(stage("adapter"),), directory="run")
    with pytest.raises(InputError, match="unused tiles"):
        TrainConfig(model=model, stages=(stage("adapter"),), directory="run")
