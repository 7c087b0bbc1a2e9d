"""Prepared shards come back as they were written, and a flipped bit costs one sample at most."""

import contextlib
import json
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordReader
from hypothesis import given, settings
from hypothesis import strategies as st

from l32jax.data import shard_file
from l32jax.data.records import Bad
from l32jax.data.samples import Document, Sample
from l32jax.data.shard_file import Shard, write_shard
from l32jax.data.shards import (
    decode_sample,
    encode_sample,
    open_shards,
    read_index,
    shard_name,
    tokenizer_digest,
    write_index,
)
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from tests.data_tests.small_tokenizer_files import text_tokenizer

TOKENIZER = Tokenizer.bytes_only()


def some_samples(count: int, seed: int = 0) -> list[Sample]:
    """Of very different sizes: several in a block of the file, and several blocks in one."""
    rng = random.Random(seed)
    return [_sample(rng) for _ in range(count)]


def _sample(rng: random.Random) -> Sample:
    size = rng.choice([1, 9, 300])
    tokens = [rng.randrange(128_000) for _ in range(size)]
    weights = [float(rng.randrange(2)) for _ in range(size)]
    images = [rng.randbytes(rng.choice([1, 40, 3000, 90_000])) for _ in range(rng.randrange(3))]
    return Sample.single(tokens, weights, images)


def write_folder(folder: Path, samples: list[Sample], num_shards: int = 2) -> Path:
    folder.mkdir()
    parts = [samples[i::num_shards] for i in range(num_shards)]
    for i, part in enumerate(parts):
        write_shard(folder / shard_name(i, num_shards), map(encode_sample, part))
    digest = tokenizer_digest(TOKENIZER)
    write_index(folder, tokenizer=digest, records=list(map(len, parts)), about={"x": 1})
    return folder


def test_samples_come_back_in_order_from_threads_and_pickles(tmp_path):
    samples = some_samples(50)
    opened = open_shards(write_folder(tmp_path / "set", samples), TOKENIZER)
    expected = samples[::2] + samples[1::2]
    assert len(opened) == 50 and list(opened) == expected
    again = pickle.loads(pickle.dumps(opened))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(again.__getitem__, range(50))) == expected
    with pytest.raises(IndexError):
        opened[50]


@settings(max_examples=200)
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.integers(0, 2**31 - 1),
                st.floats(0, 1, width=32),
            ),
            max_size=20,
        ),
        max_size=4,
    ),
    st.lists(st.binary(max_size=100), max_size=3),
)
def test_encoding_is_exact(documents, images):
    sample = Sample(
        tuple(
            Document([t for t, _ in d], [w for _, w in d], tuple(range(len(images))) * (i == 0))
            for i, d in enumerate(documents or [[]])
        ),
        tuple(images),
    )
    assert decode_sample(encode_sample(sample)) == sample


@settings(max_examples=200)
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_no_bit_of_an_encoded_sample_changes_unnoticed(at, bit):
    data = bytearray(encode_sample(some_samples(1, seed=at)[0]))
    data[at % len(data)] ^= 1 << bit
    with pytest.raises(InputError):
        decode_sample(bytes(data))


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_rubbish_with_the_right_digest_is_no_sample(data):
    from l32jax.data import shards

    with pytest.raises(InputError):
        decode_sample(data + shards._digest(data))


def flips(size: int, seed: int) -> list[int]:
    """Offsets anywhere, and more of them where headers and the footer are."""
    rng = random.Random(seed)
    block = shard_file.BLOCK
    last = (size - 1) // block * block
    anywhere = [rng.randrange(size) for _ in range(60)]
    headers = [k + rng.randrange(24) for k in range(0, size, block) for _ in range(2)]
    chunks = [rng.randrange(24, 400) for _ in range(30)]
    footer = [last - block + rng.randrange(600) for _ in range(20)]
    return anywhere + headers + chunks + footer + [last + rng.randrange(600) for _ in range(40)]


def test_a_flipped_bit_costs_one_sample_at_most(tmp_path):
    samples = some_samples(40)
    folder = write_folder(tmp_path / "set", samples, num_shards=1)
    path = folder / shard_name(0, 1)
    whole = path.read_bytes()
    damaged = 0
    for at in flips(len(whole), seed=1):
        data = bytearray(whole)
        data[at] ^= 1 << random.Random(at).randrange(8)
        path.write_bytes(data)
        found = list(open_shards(folder))
        lost = [i for i, sample in enumerate(found) if isinstance(sample, Bad)]
        assert len(lost) <= 1, at
        assert [s for s in found if not isinstance(s, Bad)] == [
            s for i, s in enumerate(samples) if i not in lost
        ], at
        assert all(found[i].place == f"{path.name} record {i}" for i in lost)
        damaged += len(lost)
    assert damaged > 20


def test_a_damaged_footer_costs_nothing(tmp_path):
    """Though ArrayRecord by itself then finds no records, or refuses the file."""
    records = [bytes([i]) * (i * 700) for i in range(100)]
    path = tmp_path / "shard"
    write_shard(path, records)
    data = bytearray(path.read_bytes())
    last = (len(data) - 1) // shard_file.BLOCK * shard_file.BLOCK
    data[last + 40 : last + 200] = b"\xff" * 160
    path.write_bytes(data)
    with contextlib.suppress(RuntimeError):
        assert ArrayRecordReader(str(path)).num_records() != 100
    assert [Shard(path).read(i) for i in range(100)] == records


def test_records_are_found_across_the_windows_of_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_file, "SCANNED_BYTES", 1000)
    monkeypatch.setattr(Shard, "read", lambda self, number: self._salvage.read(number))
    sizes = [0, 1, 950, 998, 1000, 1024, 70_000] + list(range(60))
    records = [bytes([i]) * size for i, size in enumerate(sizes)]
    path = tmp_path / "shard"
    write_shard(path, records)
    assert [Shard(path).read(i) for i in range(len(sizes))] == records


def test_a_record_inside_a_record_is_not_found(tmp_path):
    forged = shard_file._header(1, 6) + b"forged"
    path = tmp_path / "shard"
    write_shard(path, [b"a" + forged + b"b", b"true"])
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"true") + 5])  # without a footer
    assert Shard(path).read(1) == b"true"
    path.write_bytes(data[: data.index(b"true") - 10])
    with pytest.raises(InputError):
        Shard(path).read(1)


def test_truncated_shards_keep_what_is_there(tmp_path):
    samples = some_samples(30)
    folder = write_folder(tmp_path / "set", samples, num_shards=1)
    path = folder / shard_name(0, 1)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    found = list(open_shards(folder))
    good = [s for s in found if not isinstance(s, Bad)]
    assert 0 < len(good) < 30 and good == samples[: len(good)]
    path.write_bytes(b"")
    assert all(isinstance(s, Bad) for s in open_shards(folder))


def test_folders_that_are_not_whole_are_refused(tmp_path):
    folder = write_folder(tmp_path / "set", some_samples(4))
    index = folder / "index.json"
    text = index.read_text()
    assert read_index(folder)["x"] == 1
    with pytest.raises(InputError, match="no index.json"):
        open_shards(tmp_path)
    for changed in (text[:-40], text.replace('"x": 1', '"x": 2'), "[]", "[" * 100_000):
        index.write_text(changed)
        with pytest.raises(InputError, match="damaged"):
            open_shards(folder)
    content = json.loads(text)["content"]
    content["shards"] = {"../elsewhere": 1}
    from l32jax.data import shards

    forged = {"sha256": shards._checksum(content), "content": content}
    index.write_text(json.dumps(forged))
    with pytest.raises(InputError, match="damaged"):
        open_shards(folder)
    index.write_text(text)
    (folder / shard_name(1, 2)).unlink()
    with pytest.raises(InputError, match="missing"):
        open_shards(folder)


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    folder = write_folder(tmp_path / "set", some_samples(2))
    other = Tokenizer.train(["aa aa aa"], num_merges=1)
    with pytest.raises(InputError, match="another tokenizer"):
        open_shards(folder, other)
    assert tokenizer_digest(TOKENIZER) == tokenizer_digest(Tokenizer.bytes_only())


def test_a_text_models_tokenizer_is_the_same_with_an_image_token(tmp_path):
    """And another one where text has the image's name as a word."""
    text, word = (text_tokenizer(tmp_path, *names) for names in (("</s>",), ("</s>", "<|image|>")))
    assert tokenizer_digest(text) == tokenizer_digest(text.with_image_token())
    assert tokenizer_digest(word) != tokenizer_digest(text)


def test_images_that_are_not_files_are_refused():
    with pytest.raises(TypeError, match="str instead of bytes"):
        encode_sample(Sample.single([1], [0.0], ["a path"]))
