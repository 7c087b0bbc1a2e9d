"""What a converted checkpoint says of itself: what it was made from, and a checksum a tensor, and
of what its files have beside the tensors.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from l32jax.checkpoint.fields import read_json
from l32jax.errors import InputError

MANIFEST = "manifest.json"
BLOCK = 16 << 20

Span = tuple[int, int]  # offset and bytes


def write_manifest(
    path: Path,
    about: Mapping[str, Any],
    tensors: Mapping[str, Any],
    files: Mapping[str, Any] | None = None,
) -> None:
    """`files` is what `rest_of` says of each, if the tensors have places in them."""
    content = {**about, **({"files": dict(files)} if files else {}), "tensors": dict(tensors)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def rest_of(path: Path, spans: Iterable[Span]) -> dict[str, Any]:
    """A file's size, and a checksum of what lies outside of these spans, those of its tensors."""
    size, digest, at = path.stat().st_size, hashlib.sha256(), 0
    with path.open("rb") as file:
        for offset, length in [*sorted(spans), (size, 0)]:
            _update(digest, file, at, offset - at)
            at = max(at, offset + length)
    return {"bytes": size, "sha256": digest.hexdigest()}


def problems(listing: Path) -> list[str]:
    """What is not as it was written, a line each: tensors, and what files have beside them."""
    content = read_json(listing)
    tensors, files = content.get("tensors"), content.get("files")
    if not isinstance(tensors, dict) or not isinstance(files, dict):
        raise InputError(
            f"manifest {listing}: it lists no tensors and files; convert the checkpoint again"
        )
    found, spans = [], {name: [] for name in files}
    for name, entry in tensors.items():
        file, span, digest = _place(entry, name, listing)
        spans.setdefault(file, []).append(span)
        if _sha256(_path(listing, file), span) != digest:
            found.append(f"tensor {name!r} in {file} has changed since it was written")
    for file, entry in files.items():
        path = _path(listing, file)
        if not path.is_file():
            found.append(f"{file} is missing")
        elif rest_of(path, spans[file]) != entry:
            found.append(f"{file} has changed since it was written, beside its tensors")
    return found


def _place(entry: Any, name: str, listing: Path) -> tuple[str, Span, str]:
    match entry:
        case {
            "file": str(file),
            "offset": int(offset),
            "bytes": int(size),
            "sha256": str(digest),
        } if offset >= 0 and size >= 0:
            return file, (offset, size), digest
    raise InputError(f"manifest {listing}: tensor {name!r} has no place in a file")


def _path(listing: Path, file: str) -> Path:
    """Of a checkpoint that is one file, the name is its own."""
    if Path(file).name != file or "\0" in file:
        raise InputError(f"manifest {listing}: {file!r} is not the name of a file beside it")
    if listing.name == MANIFEST:
        return listing.parent / file
    return listing.with_name(listing.name.removesuffix(f".{MANIFEST}"))


def _sha256(path: Path, span: Span) -> str | None:
    """None if the file is not there or too short."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            whole = _update(digest, file, *span)
    except FileNotFoundError:
        return None
    return digest.hexdigest() if whole else None


def _update(digest: Any, file: IO[bytes], offset: int, size: int) -> bool:
    """Whether the file has that many bytes there."""
    file.seek(offset)
    while size > 0 and (block := file.read(min(BLOCK, size))):
        digest.update(block)
        size -= len(block)
    return size <= 0


def beside(path: Path) -> Path:
    """The manifest of a checkpoint that is one file."""
    return path.with_name(f"{path.name}.{MANIFEST}")


def manifest_of(path: Path) -> Path | None:
    """The manifest of a converted folder or file, if it has one."""
    return next((file for file in (path / MANIFEST, beside(path)) if os.path.isfile(file)), None)
