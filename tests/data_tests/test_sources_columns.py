"""Records of tables: Parquet, and what Hugging Face's library saves."""

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from l32jax.data.chat import Image, Message
from l32jax.data.records import Bad, Record
from l32jax.data.sources import parquet
from l32jax.data.sources.open import open_records
from l32jax.errors import InputError
from tests.data_tests.source_files import PAIRS, WRITERS, pair_of, png

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
    parquet.GROUPS._values.clear()
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


# Arrow


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
