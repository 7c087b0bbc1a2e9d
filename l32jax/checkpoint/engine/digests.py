"""Digests of a directory's files: Orbax alone restores a flipped bit without a word.

The sidecar is a `sha256sum` file, so `sha256sum --check digests.sha256` inside of the directory
says the same as `problems`; its first line, a comment to that tool, is the digest of the rest.
"""

import hashlib
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SIDECAR = "digests.sha256"
HEADER = "# sha256 of the lines below: "
MAX_NAME = 500  # characters, with its folders
THREADS = 8  # hashing lets go of the interpreter lock


def write(directory: Path, known: Mapping[str, str] | None = None) -> None:
    """Hashes every file under `directory` into its sidecar, and forces all of it onto the disk.

    `known` has digests by file name, of files that are not read, and may be elsewhere by now.
    Who needs the digests to appear at once renames the directory afterwards.
    """
    found = dict(known or {})
    with ThreadPoolExecutor(THREADS) as pool:
        unknown = sorted(_names(directory) - found.keys() - {SIDECAR})
        found |= zip(unknown, pool.map(lambda name: digest(directory / name), unknown), strict=True)
    lines = [f"{found[name]}  {name}\n" for name in sorted(found)]
    (directory / SIDECAR).write_bytes(_with_header("".join(lines)))
    sync_below(directory)


def problems(directory: Path, names: Collection[str] | None = None) -> list[str]:
    """What differs from the sidecar, a line each; an empty list if every bit is as written.

    `names` restricts the reading to these files, given relative to the directory.
    """
    try:
        expected = _read(directory / SIDECAR)
    except FileNotFoundError:
        return [f"{SIDECAR} is missing, so its save has not finished"]
    except (OSError, ValueError):
        return [f"{SIDECAR} is damaged"]
    chosen = sorted(expected if names is None else expected.keys() & set(names))
    with ThreadPoolExecutor(THREADS) as pool:
        verdicts = pool.map(lambda name: _problem(directory / name, expected[name]), chosen)
        return [
            f"{name} {verdict}" for name, verdict in zip(chosen, verdicts, strict=True) if verdict
        ]


def sync(path: Path) -> None:
    """Returns when a file's content, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_below(directory: Path) -> None:
    """Returns when the directory and all in it are on the disk."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(sync, [*directory.rglob("*"), directory]))


def digest(path: Path) -> str:
    """What the sidecar has of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _names(directory: Path) -> set[str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix() for path in files}


def _problem(path: Path, expected: str) -> str:
    try:
        return "" if digest(path) == expected else "has changed since it was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _with_header(body: str) -> bytes:
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f"{HEADER}{digest}\n{body}".encode()


def _read(sidecar: Path) -> dict[str, str]:
    """Digest by file name. ValueError if a single bit of the sidecar is not what `write` wrote.

    Nor does that write names of files elsewhere, which might be devices without an end.
    """
    content = sidecar.read_bytes()
    _, _, body = content.decode().partition("\n")
    if content != _with_header(body):
        raise ValueError(sidecar)
    pairs = (line.split("  ", maxsplit=1) for line in body.split("\n")[:-1])
    by_name = {name: digest for digest, name in pairs}
    if not all(map(_is_below, by_name)):
        raise ValueError(sidecar)
    return by_name


def _is_below(name: str) -> bool:
    """Whether it can be the name of a file below a directory, and be told in a line."""
    plain = name.isprintable() and len(name) <= MAX_NAME
    return plain and not os.path.isabs(name) and ".." not in Path(name).parts
