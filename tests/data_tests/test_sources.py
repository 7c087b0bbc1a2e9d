"""Whatever the format, what is written is read, and damage costs what it hits."""

import collections
import pickle
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l32jax.data.records import Bad, Record
from l32jax.data.samples import Sample
from l32jax.data.sources import parquet
from l32jax.data.sources.open import open_records, open_source
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from tests.data_tests.source_files import GROUP, PAIRS, WRITERS, pair_of, png, write_jsonl

TEXTS = st.text(min_size=1).filter(lambda text: text.strip() and text[0] != "\ufeff")
FORMATS = pytest.mark.parametrize("form", WRITERS)


@FORMATS
@given(texts=st.lists(TEXTS, min_size=1, max_size=8))
@settings(max_examples=25)
def test_what_is_written_is_read(form, texts):
    pairs = [(text, png(number)) for number, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        source = open_records(str(WRITERS[form](Path(folder), pairs)))
        assert [pair_of(record) for record in source] == pairs


@FORMATS
def test_sources_are_sequences_that_threads_and_other_processes_read(form, tmp_path):
    source = open_records(str(WRITERS[form](tmp_path, PAIRS)))
    assert len(source) == len(PAIRS)
    assert pair_of(source[-1]) == PAIRS[-1]
    for outside in (len(PAIRS), -len(PAIRS) - 1):
        with pytest.raises(IndexError):
            source[outside]
    order = [number % len(PAIRS) for number in range(0, 300, 7)]
    sent = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as threads:
        assert [pair_of(found) for found in threads.map(sent.__getitem__, order)] == [
            PAIRS[number] for number in order
        ]
    assert len({record.place for record in source}) == len(PAIRS)


# The records that one wrong byte may cost: those in its line, chunk, row group or batch, or those
# of its member and of the members beside it.
MOST_LOST = {"jsonl": 2, "parquet": GROUP, "tar": 3, "array_record": GROUP, "arrow": GROUP}


@pytest.fixture(scope="module", params=WRITERS)
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    name = WRITERS[request.param](folder, PAIRS)
    path = name if name.is_file() else next(name.glob("*.arrow"))
    return request.param, name, path, path.read_bytes()


@given(st.data())
@settings(max_examples=80)
def test_a_damaged_byte_costs_no_more_than_its_unit(written, data):
    form, name, path, content = written
    damaged = bytearray(content)
    place = data.draw(st.integers(0, len(content) - 1))
    damaged[place] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    forget()
    try:
        source = open_records(str(name))
    except InputError:
        return
    found = collections.Counter(pair_of(record) for record in source)
    lost = collections.Counter(PAIRS) - found
    if place not in names_of_columns(form, content):
        assert lost.total() <= MOST_LOST[form]


def names_of_columns(form: str, content: bytes) -> range:
    """Where they stand: without a checksum in these formats, so that others may be read there."""
    if form == "arrow":
        return range(8 + int.from_bytes(content[4:8], "little"))
    if form == "parquet":
        return range(len(content) - 8 - int.from_bytes(content[-8:-4], "little"), len(content))
    return range(0)


@given(st.data())
@settings(max_examples=40)
def test_a_file_that_ends_early_raises_nothing_but_input_errors(written, data):
    _, name, path, content = written
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    forget()
    try:
        source = open_records(str(name))
    except InputError:
        return
    assert all(isinstance(record, Record | Bad) for record in source)


def forget() -> None:
    """Nothing is kept of files that were at the same place before."""
    from l32jax.data.sources import array_record, arrow

    array_record._reader.cache_clear()
    arrow._batches.cache_clear()
    arrow._checked_batch.cache_clear()
    parquet.GROUPS._values.clear()


def test_of_a_file_that_has_gone_every_record_is_bad(tmp_path):
    source = open_records(str(write_jsonl(tmp_path, PAIRS)))
    (tmp_path / "data.jsonl").unlink()
    assert all(isinstance(record, Bad) and "gone" in record.why for record in source)


# Names


def test_several_files_are_read_in_order(tmp_path):
    for number in range(3):
        part = tmp_path / f"part-{number}"
        part.mkdir()
        WRITERS["parquet"](part, PAIRS[number * 3 : number * 3 + 3])
        shutil.copy(part / "data.parquet", tmp_path / f"data-{number}.parquet")
    (tmp_path / "README.md").write_text("about")
    for name in (tmp_path, tmp_path / "*.parquet", tmp_path / "part-*/data.parquet"):
        assert [pair_of(record) for record in open_records(str(name))] == PAIRS[:9]


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ([], "there are none"),
        (["a.csv"], "unknown; use .*jsonl, .parquet"),
        (["a.tar", "a.jsonl"], "it has .jsonl and .tar files; name one kind"),
        (["dataset_dict.json"], "several splits"),
        (["state.json"], "damaged"),
        (["index.json", "a.arrayrecord"], "prepared data"),
    ],
)
def test_folders_of_something_else_are_input_errors(names, why, tmp_path):
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=why):
        open_records(str(tmp_path))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "tar", "arrayrecord"])
@pytest.mark.parametrize("content", [b"", b"\0" * 70_000], ids=["empty", "zeros"])
def test_files_of_nothing_are_input_errors(suffix, content, tmp_path):
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(content)
    if suffix == "jsonl" and content:
        assert isinstance(open_records(str(path))[0], Bad)
        return
    with pytest.raises(InputError, match=str(path)):
        open_records(str(path))


@pytest.mark.parametrize("name", ["none.jsonl", "none", "none/*.tar", "a\0b", "x" * 5000])
def test_names_of_nothing_are_input_errors(name, tmp_path):
    with pytest.raises(InputError, match="files .*"):
        open_records(str(tmp_path / name))


def test_samples_come_from_every_kind_of_source(tmp_path):
    tokenizer = Tokenizer.bytes_only()
    name = str(write_jsonl(tmp_path, PAIRS))
    for known in (name, "easy-vqa/test", "charts/test"):
        sample = open_source(known, tokenizer, with_images=True)[0]
        assert isinstance(sample, Sample) and len(sample.images) == 1
    for known in (name, "easy-vqa/test"):
        source = open_source(known, tokenizer, with_images=True)
        sent = pickle.loads(pickle.dumps(source))
        assert len(sent) == len(source)
        assert sent[1].documents == source[1].documents
    blind = open_source(name, tokenizer, with_images=False)[0]
    assert isinstance(blind, Bad)


def test_pythons_reference_is_two_sets_of_documents_to_learn_throughout():
    tokenizer = Tokenizer.bytes_only()
    train, test = (
        open_source(f"python-docs/{split}", tokenizer, with_images=False)
        for split in ("train", "test")
    )
    places = {split[index].place for split in (train, test) for index in range(len(split))}
    assert len(places) == len(train) + len(test) and len(train) // len(test) in (7, 8)
    (document,) = test[0].documents
    assert "expression" in tokenizer.decode(document.tokens)
    assert list(document.weights) == [0.0] + [1.0] * (len(document.tokens) - 1)
    with pytest.raises(InputError, match="train, test"):
        open_source("python-docs/tset", tokenizer, with_images=False)
