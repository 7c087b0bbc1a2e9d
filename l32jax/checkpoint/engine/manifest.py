"""What a converted checkpoint says of itself: what it was made from, and a checksum a tensor."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l32jax.checkpoint.fields import read_json
from l32jax.errors import InputError

MANIFEST = "manifest.json"
BLOCK = 16 << 20


def write_manifest(path: Path, about: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    content = {**about, "tensors": dict(tensors)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def problems(manifest: Path) -> list[str]:
    """Which tensors' bytes are not as they were written, a line each."""
    tensors = read_json(manifest).get("tensors")
    if not isinstance(tensors, dict):
        raise InputError(f"manifest {manifest}: it lists no tensors; convert the checkpoint again")
    found = []
    for name, entry in tensors.items():
        match entry:
            case {
                "file": str(file),
                "offset": int(offset),
                "bytes": int(size),
                "sha256": str(digest),
            } if Path(file).name == file:
                if _sha256(manifest.parent / file, offset, size) != digest:
                    found.append(f"tensor {name!r} in {file} has changed since it was written")
            case _:
                raise InputError(f"manifest {manifest}: tensor {name!r} has no place in a file")
    return found


def _sha256(path: Path, offset: int, size: int) -> str | None:
    """None if the file is not there or too short."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while size > 0 and (block := file.read(min(BLOCK, size))):
                digest.update(block)
                size -= len(block)
    except FileNotFoundError:
        return None
    return digest.hexdigest() if size == 0 else None


def beside(path: Path) -> Path:
    """The manifest of a checkpoint that is one file."""
    return path.with_name(f"{path.name}.{MANIFEST}")


def manifest_of(path: Path) -> Path | None:
    """The manifest of a converted folder or file, if it has one."""
    return next((file for file in (path / MANIFEST, beside(path)) if os.path.isfile(file)), None)
