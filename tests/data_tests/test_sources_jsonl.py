"""Records of JSON lines."""

import pytest

from l32jax.data import files
from l32jax.data.records import Bad, Record
from l32jax.data.sources import jsonl
from l32jax.data.sources.open import open_records
from tests.data_tests.source_files import PAIRS, pair_of, png, write_jsonl


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
