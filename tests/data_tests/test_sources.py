import collections
import io
import json
import pickle
import shutil
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l32jax.data import files
from l32jax.data.chat import Image, Message
from l32jax.data.records import Bad, Record
from l32jax.data.samples import Sample
from l32jax.data.sources import jsonl, parquet, tar, tar_members
from l32jax.data.sources.open import open_records, open_source
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from tests.data_tests.source_files import GROUP, WRITERS, pair_of, png, write_jsonl, write_tar

PAIRS = [(f"caption {number} ä", png(number)) for number in range(10)]
TEXTS = st.text(min_size=1).filter(lambda text: text.strip() and text[0] != "\ufeff")
FORMATS = pytest.mark.parametrize("form", WRITERS)


@FORMATS
@given(texts=st.lists(TEXTS, min_size=1, max_size=8))
@settings(max_examples=25, deadline=None)
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
@settings(max_examples=80, deadline=None)
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
@settings(max_examples=40, deadline=None)
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


# JSON lines


def test_lines_are_counted_as_editors_do_and_empty_ones_are_no_records(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n\n{"text": "b\xe2\x80\xa8c"}\n  \n')
    first, second, third = open_records(str(path))
    assert first == Record("data.jsonl line 1", parts=("a",))
    assert second == Record("data.jsonl line 4", parts=("b\u2028c",))
    assert isinstance(third, Bad) and third.place == "data.jsonl line 5"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "a"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "' + b"a" * 200 + b'"}', "longer than 150"),
        (b'{"image": "../x.png", "text": "a"}', "outside the folder"),
        (b'{"image": "/etc/x.png", "text": "a"}', "outside the folder"),
        (b'{"image": "a\\u0000b", "text": "a"}', ""),
    ],
)
def test_bad_lines_cost_themselves(line, why, tmp_path, monkeypatch):
    if b"aaa" in line:
        monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 150)
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    first, second, third = open_records(str(path))
    assert isinstance(second, Bad) and why in second.why and second.place.endswith("line 2")
    assert [found.parts for found in (first, third)] == [("a",), ("b",)]


def test_lines_may_lie_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 7)
    source = open_records(str(write_jsonl(tmp_path, PAIRS)))
    assert [pair_of(record) for record in source] == PAIRS


def test_links_do_not_lead_out_of_the_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(1))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "data.jsonl").write_text('{"image": "link.png", "text": "a"}')
    (found,) = open_records(str(folder / "data.jsonl"))
    assert isinstance(found, Bad) and "outside the folder" in found.why


# Parquet


def test_images_of_parquet_are_structs_bytes_or_paths(tmp_path):
    (tmp_path / "1.png").write_bytes(png(1))
    images = {
        "struct": [{"bytes": png(1), "path": "x.png"}, {"bytes": None, "path": "1.png"}],
        "bytes": [png(1), png(1)],
        "paths": ["1.png", "1.png"],
    }
    for name, values in images.items():
        table = pa.table({"image": values, "caption": ["a", "b"], "id": [1, 2]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        found = open_records(str(tmp_path / f"{name}.parquet"))
        assert [pair_of(record) for record in found] == [("a", png(1)), ("b", png(1))]


def test_conversations_of_parquet_take_images_from_their_column(tmp_path):
    items = [{"type": "image", "text": None}, {"type": "text", "text": "?"}]
    said = [{"type": "text", "text": "red"}]
    messages = [{"role": "user", "content": items}, {"role": "assistant", "content": said}]
    rows = [{"messages": messages, "images": [{"bytes": png(1), "path": None}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (found,) = open_records(str(tmp_path / "a.parquet"))
    assert isinstance(found, Record)
    assert found.messages == (
        Message("user", (Image(png(1)), "?")),
        Message("assistant", "red"),
    )


def test_row_groups_are_decoded_once_and_forgotten_when_there_is_no_room(tmp_path, monkeypatch):
    decoded = []
    whole = parquet.ParquetRows._decode
    monkeypatch.setattr(
        parquet.ParquetRows, "_decode", lambda self, n: decoded.append(n) or whole(self, n)
    )
    source = open_records(str(WRITERS["parquet"](tmp_path, PAIRS)))
    with ThreadPoolExecutor(8) as threads:
        assert len(list(threads.map(source.__getitem__, range(10)))) == 10
    assert sorted(decoded) == [0, 1, 2, 3]
    forget()
    monkeypatch.setattr(parquet.GROUPS, "_num_bytes", 0)
    for number in (0, 1, 9, 0):
        source[number]
    assert decoded[4:] == [0, 3, 0]


def test_text_of_parquet_that_is_not_utf8_costs_its_row(tmp_path):
    texts = pa.Array.from_buffers(
        pa.string(),
        2,
        [None, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff")],
    )
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    good, bad = open_records(str(tmp_path / "a.parquet"))
    assert good == Record("a.parquet row 0", parts=("a",))
    assert isinstance(bad, Bad)


def test_parquet_without_known_columns_or_with_a_huge_group_is_an_input_error(
    tmp_path, monkeypatch
):
    pq.write_table(pa.table({"sentence": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="sentence.*rename them to messages"):
        open_records(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 10)
    with pytest.raises(InputError, match="write smaller ones"):
        open_records(str(tmp_path / "a.parquet"))


# tar


def tar_of(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> str:
    with tarfile.open(path, "w", format=form) as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_is_read(form, tmp_path):
    long = "" if form == tarfile.USTAR_FORMAT else "ä" * 80 + "/" + "b" * 120
    names = {f"{long}/{n}.{suffix}": data for n in range(3) for suffix, data in
             (("png", png(n)), ("txt", b"red"))}  # fmt: skip
    source = open_records(tar_of(tmp_path / "a.tar", names, form))
    assert [pair_of(record) for record in source] == [("red", png(n)) for n in range(3)]
    assert source[0].place == f"a.tar {long}/0"


def test_members_of_a_key_are_a_record(tmp_path):
    turns = [{"role": "user", "content": [{"image": "c.jpg"}, "?"]},
             {"role": "assistant", "content": "red"}]  # fmt: skip
    members = {
        "a.jpg": png(1),
        "a.cls": b"5",
        "x/a.txt": b"other",
        "a.json": b'{"caption": "red", "width": 5}',
        "b.0.png": png(1),
        "b.1.png": png(2),
        "b.json": b'{"text": "<image> and <image>"}',
        "c.jpg": png(3),
        "c.json": json.dumps({"messages": turns}).encode(),
        "d.json": b'{"image": "coco/d.png", "text": "red"}',
        "d.png": png(4),
        "e.unknown": b"",
        ".hidden": b"",
    }
    a, other, b, c, d = open_records(tar_of(tmp_path / "a.tar", members))
    assert a == Record("a.tar a", parts=(Image(png(1)), "red"))
    assert other == Record("a.tar x/a", parts=("other",))
    assert b == Record("a.tar b", parts=(Image(png(1)), " and ", Image(png(2))))
    assert isinstance(c, Record) and c.messages[0].content == (Image(png(3)), "?")
    assert d == Record("a.tar d", parts=(Image(png(4)), "red"))


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({"a.json": b"[]"}, "not an object"),
        ({"a.json": b"{"}, "not JSON"),
        ({"a.txt": b"\xff"}, "not UTF-8"),
        ({"a.0.txt": b"a", "a.1.txt": b"a"}, "2 .txt"),
        ({"a.json": b'{"image": "b.png", "text": "a"}', "a.png": b""}, "not beside it"),
        ({"a.png": b""}, "no known kind"),
        ({"a.txt": b"a" * 100}, "more than 50 bytes"),
    ],
)
def test_members_that_make_no_record_are_bad(members, why, tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "MAX_LINE_BYTES", 50)
    (found,) = open_records(tar_of(tmp_path / "a.tar", members))
    assert isinstance(found, Bad) and why in found.why and found.place == "a.tar a"


def test_links_in_tar_files_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo("a.txt")
            member.type, member.linkname = kind, "/etc/hostname"
            file.addfile(member)
    with pytest.raises(InputError, match="no images, texts or JSON"):
        open_records(str(tmp_path / "a.tar"))


def test_tar_files_put_together_are_read_to_the_end(tmp_path):
    both = [Path(tar_of(tmp_path / n, {f"{n}.txt": b"red"})).read_bytes() for n in ("a", "b")]
    (tmp_path / "c.tar").write_bytes(b"".join(both))
    assert [record.place for record in open_records(str(tmp_path / "c.tar"))] == [
        "c.tar a",
        "c.tar b",
    ]


def test_a_damaged_header_costs_the_records_beside_it(tmp_path):
    path = write_tar(tmp_path, PAIRS, tarfile.USTAR_FORMAT)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"000004.txt", b"000004.xyz"))
    states = [isinstance(record, Record) for record in open_records(str(path))]
    assert states == [number not in (4, 5) for number in range(10)]


def test_what_is_no_tar_file_is_not_searched_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_members, "MAX_GAP_BYTES", 5000)
    (tmp_path / "a.tar").write_bytes(b"x" * 10_000)
    with pytest.raises(InputError, match="no tar file; unpack it"):
        open_records(str(tmp_path / "a.tar"))


def test_names_from_tar_files_have_no_codes_for_terminals(tmp_path):
    (found,) = open_records(tar_of(tmp_path / "a.tar", {"\x1b[2J\n.txt": b"red"}))
    assert found.place == "a.tar ?[2J?"


# ArrayRecord and Arrow


def test_what_hugging_faces_library_saves_is_read(tmp_path):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "n": datasets.Value("int32")}
    )
    rows = [
        {"image": {"bytes": image, "path": None}, "text": text, "n": number}
        for number, (text, image) in enumerate(PAIRS)
    ]
    saved = datasets.Dataset.from_list(rows, features=features)
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    saved.to_parquet(tmp_path / "saved.parquet")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "splits")
    for name in ("saved", "saved.parquet", "splits/train"):
        assert [pair_of(record) for record in open_records(str(tmp_path / name))] == PAIRS
    with pytest.raises(InputError, match="several splits; name one"):
        open_records(str(tmp_path / "splits"))


def test_a_state_names_files_of_its_own_folder(tmp_path):
    saved = WRITERS["arrow"](tmp_path, PAIRS)
    (saved / "state.json").write_text('{"_data_files": [{"filename": "../data.arrow"}]}')
    with pytest.raises(InputError, match="lacks a file that it names"):
        open_records(str(saved))


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_missing_package_is_named_with_the_command(form, tmp_path, monkeypatch):
    name = WRITERS[form](tmp_path, PAIRS)
    for module in ("pyarrow", "pyarrow.parquet", "pyarrow.ipc"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(InputError, match=r"pip install 'l32jax\[data\]'"):
        open_records(str(name))
