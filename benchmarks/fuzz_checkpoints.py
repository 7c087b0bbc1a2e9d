"""Damaged and malicious checkpoints of every format, for as long as one likes.

    python -m benchmarks.fuzz_checkpoints --seconds 600 --format all

Makes them as tests/checkpoint_tests/test_fuzz.py does, at random, and opens each in a process that
has a limit of memory and of time. One JSON line a format: how many, the longest time, the most
memory, and what went wrong (`complaints`) by how often. What did is kept in the folder `--keep`.
Ends with 1 if anything but our own error came out.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.checkpoint_tests.fuzzing import cases, seeds
from tests.checkpoint_tests.fuzzing.worker import Worker

LABEL = 90  # characters that tell complaints apart
KEPT_EACH = 3  # cases of one complaint
RENEWED_AFTER = 2000  # cases, as traces of many configurations stay in jax's caches


def fuzz(format: str, chosen: list[seeds.Seed], seconds: float, seed: int, keep: Path, home: Path):
    """The line of one format."""
    worker = Worker(home / "log", chosen)
    refusals, complaints = Counter(), Counter()
    opened, longest, largest, count = 0, 0.0, 0, 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        number, count = seed + count, count + 1
        folder = home / "now"
        folder.mkdir()
        path, kind = cases.make(chosen, folder, number)
        outcome = worker.open(path, kind)
        opened += outcome.refusal is None
        longest, largest = max(longest, outcome.seconds), max(largest, outcome.grown)
        refusals[outcome.where] += 1
        if outcome.complaint:
            what = f"{outcome.where} {outcome.complaint}".replace(str(path), "PATH")[:LABEL]
            complaints[what] += 1
            if complaints[what] <= KEPT_EACH and len(complaints) < 100:
                _keep(folder / "case", keep / f"{format}-{number}", outcome)
        shutil.rmtree(folder)
        if count % RENEWED_AFTER == 0:
            worker.close()
            worker = Worker(home / "log", chosen)
    elapsed = time.perf_counter() - begin
    worker.close()
    return {
        "format": format,
        "cases": count,
        "cases_per_second": round(count / elapsed, 1),
        "opened": opened,
        "places_of_refusals": len(refusals),
        "longest_seconds": round(longest, 2),
        "most_memory_mib": largest >> 20,
        "complaints": dict(complaints.most_common()),
        "refusals": {str(place): times for place, times in refusals.most_common()},
    }


def _keep(case: Path, where: Path, outcome) -> None:
    where.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(where, ignore_errors=True)
    case.rename(where) if case.stat().st_dev == where.parent.stat().st_dev else shutil.copytree(
        case, where, symlinks=True, ignore=lambda folder, names: _special(folder, names)
    )
    where.with_name(f"{where.name}.json").write_text(json.dumps(outcome.__dict__, indent=1) + "\n")


def _special(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(folder) / name).is_fifo()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600, help="in all")
    parser.add_argument("--format", default="all", choices=["all", *seeds.FORMATS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz_findings"))
    arguments = parser.parse_args()
    formats = seeds.FORMATS if arguments.format == "all" else (arguments.format,)
    failed = False
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "seeds").mkdir()
        made = seeds.make(Path(home) / "seeds")
        for format in formats:
            chosen = [seed for seed in made if seed.format == format]
            line = fuzz(
                format,
                chosen,
                arguments.seconds / len(formats),
                arguments.seed,
                arguments.keep,
                Path(home),
            )
            failed = failed or bool(line["complaints"])
            print(json.dumps(line), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
