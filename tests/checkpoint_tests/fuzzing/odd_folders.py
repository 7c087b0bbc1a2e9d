"""Folders made odd: files that are missing, are something else, or lead elsewhere."""

import hashlib
import os
import shutil
from pathlib import Path
from random import Random

import tensorstore as ts

from tests.checkpoint_tests.fuzzing import odd_bytes, odd_json


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def odd_entry(path: Path, random: Random) -> None:
    """Something else in the place of a file."""
    content = path.read_bytes()
    path.unlink()
    match random.randrange(9):
        case 0:
            path.mkdir()
        case 1:
            path.symlink_to(path.name)
        case 2:
            path.symlink_to(
                random.choice(["/etc/passwd", "/dev/zero", "/proc/self/mem", "nowhere"])
            )
        case 3:
            os.mkfifo(path)
        case 4:
            path.write_bytes(b"")
        case 5:
            outside = path.parents[1] / "outside"
            outside.write_bytes(content)
            path.symlink_to(outside)
        case 6:
            path.with_name(f"{path.name}.old").write_bytes(content)
        case 7:
            with path.open("wb") as file:  # a hole, which takes no room
                file.truncate(random.choice([1 << 20, 200 << 20, 8 << 30]))


def odd_index(folder: Path, random: Random) -> None:
    """Where the index of sharded weights says that tensors are."""
    path = folder / "model.safetensors.index.json"
    names = ["../model.safetensors", "/etc/passwd", "config.json", "", ".", "..", "x" * 300, "a\0b"]
    names += [f"./{name.name}" for name in folder.glob("*.safetensors")]
    text = path.read_text()
    old = random.choice([name.name for name in folder.glob("*.safetensors")] or [""])
    if random.random() < 0.5 and old:
        new = str(random.choice(names)).replace("\0", "\\u0000")
        path.write_text(text.replace(old, new, random.choice([1, -1])))
    else:
        path.write_bytes(odd_json.mutated_text(text.encode(), random))


def odd_store(folder: Path, random: Random) -> None:
    """A checkpoint of our own format; its digests are mostly made right again."""
    step = folder / "0"
    match random.randrange(10):
        case 0:
            path = random.choice(files_below(step))
            path.write_bytes(odd_bytes.mutated(path.read_bytes(), random))
        case 1:
            odd_entry(random.choice(files_below(step)), random)
        case 2 | 3:
            _odd_json(step / "config.json", random)
        case 4:
            _odd_json(step / "state" / "_METADATA", random)
        case 5:
            _odd_steps(folder, random)
        case 6:
            path = random.choice(files_below(step / "files"))
            path.write_bytes(odd_bytes.mutated(path.read_bytes(), random))
        case _:
            _odd_array(step / "state", random)
    if random.random() < 0.9:
        for each in folder.iterdir():
            if each.is_dir():
                _write_digests(each)
    elif (sidecar := step / "digests.sha256").is_file():
        _odd_digests(sidecar, random)


def _odd_json(path: Path, random: Random) -> None:
    path.write_bytes(odd_json.mutated_text(path.read_bytes(), random))


def _odd_steps(folder: Path, random: Random) -> None:
    """Other names of steps, and several."""
    name = random.choice(["00", "1", "\u0663", "9" * 200, "\u00b2", "x", "1.unfinished", "-1", "7"])
    if random.random() < 0.5:
        shutil.copytree(folder / "0", folder / name)
    else:
        (folder / "0").rename(folder / name)


def _odd_array(state: Path, random: Random) -> None:
    """A header or a chunk, in a database that stays well-formed."""
    spec = {"driver": "ocdbt", "base": f"file://{state}/"}
    store = ts.KvStore.open(spec).result()
    names = [name.decode() for name in store.list().result()]
    headers = [name for name in names if name.endswith(".zarray")]
    if random.random() < 0.75:
        name = random.choice(headers)
        content = odd_json.mutated_text(store.read(name).result().value, random)
    else:
        name = random.choice(names)
        content = odd_bytes.mutated(store.read(name).result().value, random, within=200)
    if random.random() < 0.1:
        store.delete_range(ts.KvStore.KeyRange(name, name + "\0")).result()
    else:
        store.write(name, content).result()


def _write_digests(step: Path) -> None:
    lines = ""
    for path in files_below(step):
        name = path.relative_to(step).as_posix()
        if name != "digests.sha256" and path.stat().st_size < 10 << 20 and not path.is_symlink():
            lines += f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n"
    write_lines(step / "digests.sha256", lines)


def write_lines(sidecar: Path, lines: str) -> None:
    if not (sidecar.is_symlink() or sidecar.is_dir() or sidecar.is_fifo()):
        digest = hashlib.sha256(lines.encode()).hexdigest()
        sidecar.write_text(f"# sha256 of the lines below: {digest}\n{lines}")


def _odd_digests(sidecar: Path, random: Random) -> None:
    _, _, lines = sidecar.read_text().partition("\n")
    match random.randrange(5):
        case 0:
            sidecar.write_bytes(odd_bytes.mutated(sidecar.read_bytes(), random))
        case 1:
            write_lines(
                sidecar, lines + f"{'0' * 64}  {random.choice(['../x', '/dev/zero', 'gone'])}\n"
            )
        case 2:
            write_lines(
                sidecar, lines + random.choice(["x\n", "\n", "  \n", "a  \0\n", "a  .\n", "no end"])
            )
        case 3:
            write_lines(sidecar, "")
        case 4:
            write_lines(sidecar, lines + f"{'0' * 64}  {'a' * 5000}\n")
