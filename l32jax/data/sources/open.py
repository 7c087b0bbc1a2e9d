"""Sources by name: what a stage's mixture, or a data set in preparation, is made of.

easy-vqa/NAME, charts/NAME   sets that come with the package: see `easy_vqa` here, `charts.source`
arithmetic/NAME              the same: see `arithmetic`
python-docs/NAME             the text of Python's reference: see `python_docs` here
PATH.jsonl                   JSON lines
PATH.parquet                 Parquet
PATH.tar                     WebDataset's
PATH.arrayrecord             ArrayRecord with JSON records
a pattern                    "data/train-*.parquet": its files one after the other, sorted
a folder                     prepared data (index.json), a data set that Hugging Face's library
                             saved (state.json), or files of one kind above

Paths may lie in a bucket: gs://bucket/key, s3://bucket/key. `fields` says what a record looks like.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from l32jax.data.files import File, find_files, is_remote
from l32jax.data.records import Bad, Record, SamplesOf
from l32jax.data.samples import Sample
from l32jax.data.sources.arithmetic import PREFIX as ARITHMETIC
from l32jax.data.sources.arithmetic import Arithmetic
from l32jax.data.sources.array_record import ArrayRecords
from l32jax.data.sources.arrow import STATE, ArrowRows, saved_files
from l32jax.data.sources.chained import Chained, Part
from l32jax.data.sources.easy_vqa import KINDS, EasyVqaSamples
from l32jax.data.sources.jsonl import JsonLines
from l32jax.data.sources.parquet import ParquetRows
from l32jax.data.sources.python_docs import open_python_docs
from l32jax.data.sources.tar import TarRecords
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError

EASY_VQA, CHARTS, PYTHON_DOCS = "easy-vqa/", "charts/", "python-docs/"
INDEX, SPLITS = "index.json", "dataset_dict.json"
READERS: dict[str, Callable[[File], Part]] = {
    ".jsonl": JsonLines,
    ".parquet": ParquetRows,
    ".tar": TarRecords,
    ".arrayrecord": ArrayRecords,
    ".array_record": ArrayRecords,
}


def open_source(
    name: str, tokenizer: Tokenizer, *, with_images: bool
) -> Sequence[Sample] | Sequence[Sample | Bad]:
    """The samples of a source; without images, what comes with the package is asked blind.

    InputError, here and below, for what is wrong with the source as a whole.
    """
    if name.startswith(EASY_VQA):
        return EasyVqaSamples(name.removeprefix(EASY_VQA), tokenizer, with_images)
    if name.startswith(CHARTS):
        from l32jax.data.charts.source import open_charts  # its typefaces take time to load

        return open_charts(name.removeprefix(CHARTS), tokenizer, with_images)
    if name.startswith(PYTHON_DOCS):
        return open_python_docs(name.removeprefix(PYTHON_DOCS), tokenizer)
    if is_prepared(name):
        from l32jax.data.shards import open_shards

        return open_shards(Path(name), tokenizer)
    return SamplesOf(open_records(name), tokenizer, with_images)


def open_records(name: str) -> Sequence[Record | Bad]:
    """The records of files. They are looked up, and indexed, now; and read when asked for."""
    if name.startswith(ARITHMETIC):
        return Chained([Arithmetic(name.removeprefix(ARITHMETIC))])
    files = find_files(name)
    by_name = {file.name: file for file in files}
    if STATE in by_name:
        return Chained([ArrowRows(file) for file in saved_files(files)])
    if SPLITS in by_name:
        raise InputError(
            f"source {name!r} in the mixture: it has several splits; name one, {name}/train"
        )
    if INDEX in by_name:
        raise InputError(
            f"source {name!r} in the mixture: prepared data, which only training reads, and only "
            "from a disk; copy it there"
        )
    kinds = {_suffix(file): file for file in files if _suffix(file) in READERS}
    if not kinds:
        raise InputError(
            f"source {name!r} in the mixture: unknown; use {EASY_VQA}{', '.join(KINDS)}, "
            f"{CHARTS}train, {PYTHON_DOCS}train, {ARITHMETIC}train, or files that end with "
            f"{', '.join(READERS)}"
        )
    if len(kinds) > 1:
        raise InputError(
            f"source {name!r} in the mixture: it has {' and '.join(sorted(kinds))} files; "
            f"name one kind, {name}/*{min(kinds)}"
        )
    reader = READERS[min(kinds)]
    return Chained([reader(file) for file in files if _suffix(file) in READERS])


def is_prepared(name: str) -> bool:
    return not is_remote(name) and Path(name, INDEX).is_file()


def _suffix(file: File) -> str:
    return f".{file.name.rpartition('.')[2].lower()}"
