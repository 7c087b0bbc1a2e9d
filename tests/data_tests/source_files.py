"""Writes the same records in each format that sources have, for tests to read."""

import functools
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image as Pillow

from l32jax.data.chat import Image
from l32jax.data.records import Bad, Record

Pair = tuple[str, bytes]  # a caption, and its image
GROUP = 3  # records of a row group, batch or chunk


@functools.cache
def png(number: int) -> bytes:
    file = io.BytesIO()
    Pillow.new("RGB", (number % 5 + 1, number % 7 + 1), (number % 256, 0, 0)).save(file, "PNG")
    return file.getvalue()


PAIRS = [(f"caption {number} ä", png(number)) for number in range(10)]


def write_jsonl(folder: Path, pairs: Sequence[Pair]) -> Path:
    return _lines(folder, pairs, folder / "data.jsonl")


def write_parquet(folder: Path, pairs: Sequence[Pair]) -> Path:
    table = pa.Table.from_pylist([_row(*pair) for pair in pairs])
    pq.write_table(table, folder / "data.parquet", row_group_size=GROUP, write_page_checksum=True)
    return folder / "data.parquet"


def write_tar(folder: Path, pairs: Sequence[Pair], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(folder / "data.tar", "w", format=form) as tar:
        for number, (text, image) in enumerate(pairs):
            for suffix, content in (("png", image), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{number:06}.{suffix}")
                member.size, member.mtime = len(content), 0.5
                tar.addfile(member, io.BytesIO(content))
    return folder / "data.tar"


def write_array_record(folder: Path, pairs: Sequence[Pair]) -> Path:
    lines = _lines(folder, pairs, folder / "lines").read_bytes().splitlines()
    writer = ArrayRecordWriter(str(folder / "data.arrayrecord"), f"group_size:{GROUP}")
    for line in lines:
        writer.write(line)
    writer.close()
    (folder / "lines").unlink()
    return folder / "data.arrayrecord"


def write_arrow(folder: Path, pairs: Sequence[Pair]) -> Path:
    """As `datasets` does, which takes seconds to import."""
    table = pa.Table.from_pylist([_row(*pair) for pair in pairs])
    saved = folder / "saved"
    saved.mkdir()
    name = "data-00000-of-00001.arrow"
    with pa.ipc.new_stream(str(saved / name), table.schema) as stream:
        stream.write_table(table, max_chunksize=GROUP)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    return saved


WRITERS: dict[str, Callable[[Path, Sequence[Pair]], Path]] = {
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "tar": write_tar,
    "array_record": write_array_record,
    "arrow": write_arrow,
}


def pair_of(record: Record | Bad) -> Pair | None:
    """What a record was written of, None if it is Bad or something else."""
    match record:
        case Record(parts=(Image(source), str() as text)):
            if isinstance(source, Path):
                source = source.read_bytes() if source.is_file() else b""
            return text, source
    return None


def _row(text: str, image: bytes) -> dict:
    return {"image": {"bytes": image, "path": None}, "text": text, "other": 1}


def _lines(folder: Path, pairs: Sequence[Pair], path: Path) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    lines = []
    for number, (text, image) in enumerate(pairs):
        (folder / f"images/{number}.png").write_bytes(image)
        lines.append(json.dumps({"image": f"images/{number}.png", "text": text}))
    path.write_text("\n".join(lines))
    return path
