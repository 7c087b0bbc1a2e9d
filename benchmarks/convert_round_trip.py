"""A model of full size through every format and back: every byte, and what it costs.

    python -m benchmarks.convert_round_trip --directory /somewhere/with/9/GB --preset llama3.2-1b

Random bfloat16 weights go HF -> Orbax -> HF, HF -> Meta -> Orbax -> Meta, from there to one
safetensors file -> HF, and HF -> GGUF -> HF. What comes back must have the same bytes, file by file
and tensor by tensor. Each step is a run of the command, with its files not in the system's cache,
right after `cp` of the same source; nothing is kept that no later step needs. Prints a JSON line a
step, then a table. llama3.2-3b takes 22 GB.
"""

import argparse
import base64
import hashlib
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.convert_large import convert, copy, digests, evict, make, show, size_of
from benchmarks.tables import print_table

NUM_PIECES = 128_000
# Where each step begins and ends, and what must come out the same as an earlier one, if anything.
STEPS = (
    ("hf", "orbax", None),
    ("orbax", "hf-from-orbax", "hf"),
    ("hf", "meta", None),
    ("meta", "orbax-from-meta", None),
    ("orbax-from-meta", "meta-from-orbax", "meta"),
    ("orbax-from-meta", "safetensors", None),
    ("safetensors", "hf-from-safetensors", "hf"),
    ("hf", "gguf", None),
    ("gguf", "hf-from-gguf", "hf"),
)
SUFFIXES = {"gguf": ".gguf", "safetensors": ".safetensors"}  # of the formats that are one file
WEIGHTS = (".safetensors", ".pth")


def tokenizer_file() -> bytes:
    """As Meta's tokenizer.model is written: as many pieces, all of them made up."""
    lines = (base64.b64encode(piece) for piece in itertools.islice(_pieces(), NUM_PIECES))
    return b"".join(b"%s %d\n" % (line, rank) for rank, line in enumerate(lines))


def _pieces() -> Iterator[bytes]:
    for size in (1, 2, 3):
        yield from map(bytes, itertools.product(range(256), repeat=size))


def format_of(step: str) -> str:
    return step.partition("-")[0]


def path_of(home: Path, step: str) -> Path:
    suffix = SUFFIXES.get(format_of(step))
    return home / step / f"model{suffix}" if suffix else home / step


def fingerprints(folder: Path) -> dict[str, str]:
    """Of the files with weights, and of each tensor as the manifest has it."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in WEIGHTS:
            with path.open("rb") as file:
                files[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return files | digests(folder)


def run(home: Path, begin: str, end: str, tokenizer: Path) -> dict:
    """One step: its figures, beside those of `cp`."""
    source, destination, copied = home / begin, path_of(home, end), home / "copy"
    copy_seconds = copy(source, copied)
    shutil.rmtree(copied)
    evict(source)
    if destination != home / end:
        (home / end).mkdir()
    options = ["--to", format_of(end), "--dtype", "bfloat16"]
    if begin == "safetensors":
        options += ["--tokenizer", str(tokenizer)]
    result = convert(path_of(home, begin), destination, *options)
    assert result["code"] == 0, (begin, end, result)
    size, seconds = size_of(home / end), result["seconds"]
    speed, copy_speed = size / 1e6 / seconds, size_of(source) / 1e6 / copy_seconds
    return {
        "gigabytes": round(size / 1e9, 2),
        "seconds": round(seconds, 1),
        "megabytes_per_second": round(speed),
        "of_cp": round(speed / copy_speed, 2),
        "cp_megabytes_per_second": round(copy_speed),
        "peak_megabytes": round(result["peak"] / 1e6),
    }


def remove_unneeded(home: Path, done: int) -> None:
    needed = {begin for begin, _, _ in STEPS[done:]}
    for path in home.iterdir():
        if path.is_dir() and path.name not in needed:
            shutil.rmtree(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--preset", default="llama3.2-1b")
    options = parser.parse_args()
    home = options.directory / f"round-trip-{options.preset}"
    home.mkdir(parents=True)
    try:
        make(home / "hf", options.preset)
        tokenizer = home / "hf" / "tokenizer.model"
        tokenizer.write_bytes(tokenizer_file())
        known = {"hf": fingerprints(home / "hf")}
        rows = []
        for done, (begin, end, same_as) in enumerate(STEPS, start=1):
            row = {"from": begin, "to": end} | run(home, begin, end, tokenizer)
            if same_as or end == "meta":
                known[end] = fingerprints(home / end)
            equal = known[end] == known[same_as] if same_as else None
            row["equal"] = "" if equal is None else equal
            show("step", **row)
            rows.append(row)
            remove_unneeded(home, done)
        print_table(rows)
    finally:
        shutil.rmtree(home)
    if not all(row["equal"] in (True, "") for row in rows):
        raise SystemExit("something that came back is not what was sent")


if __name__ == "__main__":
    main()
