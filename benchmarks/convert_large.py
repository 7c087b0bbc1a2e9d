"""A checkpoint as large as 11B Vision through `l32jax convert`: memory, speed, kills.

    python -m benchmarks.convert_large --directory /somewhere/with/65/GB

Makes a Hugging Face folder of random bfloat16 weights, copies it with `cp` to see what the disk can
do, converts it, and converts it again through three kills at random moments. Caches of the files
are dropped before each, so all three read from the disk. One JSON line a result.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from l32jax.checkpoint import hugging_face
from l32jax.checkpoint.engine.slices import Home, Slices
from l32jax.checkpoint.engine.transfer import write
from l32jax.checkpoint.hugging_face_config import TokenIds
from l32jax.model.llama import shapes_of
from l32jax.presets import preset

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FINITE = np.uint16(0xBFFF)  # without the exponent's highest bit: magnitudes below 2
KILLS = 3


def make(directory: Path, name: str) -> None:
    """Random weights; which ones depends on the parameter, the layer and the rows alone."""
    config = preset(name)
    shapes = shapes_of(config)

    def read(home: Home, rows: slice) -> np.ndarray:
        shape = slices.shape(home)
        if shape:
            shape = (len(range(*rows.indices(shape[0]))), *shape[1:])
        seed = (hash_of(home), (rows.start or 0) if shape else 0)
        size = int(np.prod(shape))
        words = np.random.Generator(np.random.SFC64(seed)).integers(
            0, 2**64, size // 4 + 1, np.uint64
        )
        bits = words.view(np.uint16)[:size] & FINITE
        return bits.view(BFLOAT16).reshape(shape)

    slices = Slices("random weights", shapes, dict.fromkeys(shapes, BFLOAT16), read)
    ids = TokenIds(128000, (128001, 128008, 128009), 128004)
    write(hugging_face.plan(slices, config, ids=ids, about={"format": "hf"}), directory)


def hash_of(home: Home) -> int:
    return int.from_bytes(str(home).encode(), "little") % 2**63


def evict(directory: Path) -> None:
    """Drops what the system has cached of the files."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def copy(source: Path, destination: Path) -> float:
    evict(source)
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", source, destination], check=True)
    subprocess.run(["sync", "-f", destination], check=True)
    return time.perf_counter() - begin


def convert(source: Path, destination: Path, *options: str, seconds: float | None = None) -> dict:
    """One run of the command, killed after `seconds`: its time, and its largest resident memory."""
    command = [sys.executable, "-m", "l32jax", "convert", source, destination, *options]
    begin = time.perf_counter()
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        peak = max(peak, resident_peak(child.pid))
        if seconds is not None and time.perf_counter() - begin > seconds:
            child.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    return {"seconds": time.perf_counter() - begin, "peak": peak, "code": child.returncode}


def resident_peak(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def tensors_of(destination: Path) -> dict:
    return json.loads((destination / "manifest.json").read_text())["tensors"]


def digests(destination: Path) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in tensors_of(destination).items()}


def show(what: str, **figures) -> None:
    print(json.dumps({"what": what, **figures}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--preset", default="llama3.2-11b-vision-instruct")
    parser.add_argument("--to", default="orbax")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    source, copied, made = (options.directory / name for name in ("hf", "copy", "made"))
    if not source.exists():
        make(source, options.preset)
    size = size_of(source)
    show("source", preset=options.preset, gigabytes=round(size / 1e9, 2))

    seconds = copy(source, copied)
    shutil.rmtree(copied)
    show("cp", seconds=round(seconds, 1), megabytes_per_second=round(size / 1e6 / seconds))

    evict(source)
    run = convert(source, made, "--to", options.to)
    assert run["code"] == 0, run
    expected = digests(made)
    show(
        "convert",
        to=options.to,
        seconds=round(run["seconds"], 1),
        megabytes_per_second=round(size / 1e6 / run["seconds"]),
        of_cp=round(seconds / run["seconds"], 2),
        peak_megabytes=round(run["peak"] / 1e6),
    )
    shutil.rmtree(made)

    evict(source)
    moments = random.Random(options.seed)
    for kill in range(KILLS):
        after = run["seconds"] * moments.uniform(0.1, 0.4)
        killed = convert(
            source, made, "--to", options.to, *["--resume"] * bool(kill), seconds=after
        )
        assert killed["code"] == -signal.SIGKILL and not made.exists(), killed
        show("killed", after_seconds=round(after, 1))
    resumed = convert(source, made, "--to", options.to, "--resume")
    assert resumed["code"] == 0, resumed
    checked = subprocess.run([sys.executable, "-m", "l32jax", "checkpoint", "verify", made])
    show(
        "resumed",
        seconds=round(resumed["seconds"], 1),
        identical=digests(made) == expected,
        tensors=len(expected),
        verified=checked.returncode == 0,
    )
    shutil.rmtree(made)


if __name__ == "__main__":
    main()
