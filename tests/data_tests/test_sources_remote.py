import json
import multiprocessing
import time
from pathlib import Path

import pytest

from l32jax.data import files
from l32jax.data.files import find_files, local_copy
from l32jax.data.records import Bad
from l32jax.data.sources.open import open_records
from l32jax.data.sources.parquet import GROUPS
from l32jax.errors import InputError
from tests.data_tests.bucket_server import serving
from tests.data_tests.source_files import WRITERS, pair_of, png

PAIRS = [(f"caption {number}", png(number)) for number in range(10)]
SCHEMES = pytest.mark.parametrize("scheme", ["gs", "s3"])


@pytest.fixture(scope="module", autouse=True)
def buckets(tmp_path_factory):
    """A bucket with the same records in every format, and a cache of its own."""
    folder = tmp_path_factory.mktemp("buckets")
    for form, write in WRITERS.items():
        (folder / "bucket/sets" / form).mkdir(parents=True)
        write(folder / "bucket/sets" / form, PAIRS)
    outside = [json.dumps({"image": name, "text": "a"}) for name in OUTSIDE]
    (folder / "bucket/sets/outside.jsonl").write_text("\n".join(outside))
    with serving(folder) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "a")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        files._file_system.cache_clear()
        yield
    files._file_system.cache_clear()


OUTSIDE = [
    "../other/1.png",
    "/etc/passwd",
    "gs://bucket/sets/x",
    "none.png",
]
NAMES = {
    "jsonl": "sets/jsonl/data.jsonl",
    "parquet": "sets/parquet",
    "tar": "sets/t*/*.tar",
    "array_record": "sets/array_record/*.arrayrecord",
    "arrow": "sets/arrow/saved",
}


@SCHEMES
@pytest.mark.parametrize("form", WRITERS)
def test_what_is_in_a_bucket_is_read(scheme, form):
    source = open_records(f"{scheme}://bucket/{NAMES[form]}")
    assert [pair_of(record) for record in source] == PAIRS


@SCHEMES
def test_images_in_a_bucket_lie_beside_the_lines(scheme):
    found = open_records(f"{scheme}://bucket/sets/outside.jsonl")
    assert [isinstance(record, Bad) for record in found] == [True] * len(OUTSIDE)
    why = [record.why for record in found if isinstance(record, Bad)]
    assert all("outside" in reason for reason in why[:2])
    assert all("no such file" in reason for reason in why[2:])


@SCHEMES
@pytest.mark.parametrize(
    "name", ["bucket/none.tar", "bucket/none/*.tar", "bucket/none", "other/a.tar"]
)
def test_what_is_not_there_is_an_input_error(scheme, name):
    with pytest.raises(InputError, match="files .*"):
        open_records(f"{scheme}://{name}")


def copied(name: str) -> str:
    (file,) = find_files(name)
    path = local_copy(file)
    assert path.stat().st_size == file.size
    return str(path)


def test_a_copy_is_made_once_by_however_many_processes():
    name = "s3://bucket/sets/array_record/data.arrayrecord"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        (path,) = set(pool.map(copied, [name] * 6))
    assert not list(Path(path).parent.glob("*.unfinished"))
    written = Path(path).stat().st_mtime_ns
    assert copied(name) == path and Path(path).stat().st_mtime_ns == written
    Path(path).write_bytes(b"cut")
    assert copied(name) == path and Path(path).stat().st_size > 3


def test_a_bucket_out_of_reach_is_said_and_not_taken_for_bad_data(monkeypatch):
    (file,) = find_files("s3://bucket/sets/tar/data.tar")
    sources = [open_records(f"s3://bucket/{NAMES[form]}") for form in ("jsonl", "parquet", "tar")]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    files._file_system.cache_clear()
    files._opened.cache_clear()
    GROUPS._values.clear()
    start = time.monotonic()
    with pytest.raises(OSError):
        file.read(0, 10)
    for source in sources:
        with pytest.raises(OSError):
            source[0]
    with pytest.raises(InputError, match="files 's3://bucket/sets/tar'"):
        open_records("s3://bucket/sets/tar")
    assert time.monotonic() - start < 60
