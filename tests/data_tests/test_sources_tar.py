"""Records of tar files: members that share a key."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from l32jax.data.chat import Image
from l32jax.data.records import Bad, Record
from l32jax.data.sources import tar, tar_members
from l32jax.data.sources.open import open_records
from l32jax.errors import InputError
from tests.data_tests.source_files import PAIRS, pair_of, png, write_tar


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
