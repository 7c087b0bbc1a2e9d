"""Our own format, on a disk or in a bucket: what training saves and `convert` writes.

The layout is told in steps.py. What is converted has one step, 0, with parameters alone, and a
manifest beside it:

    <directory>/manifest.json   what it was made from, and a checksum of each slice's values
    <directory>/0/              as in steps.py, without iterator/
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from l32jax.checkpoint import own_config
from l32jax.checkpoint.agreement import undamaged_step
from l32jax.checkpoint.engine import digests
from l32jax.checkpoint.engine.digests import SIDECAR
from l32jax.checkpoint.engine.folders import Folder, is_remote
from l32jax.checkpoint.engine.manifest import MANIFEST, write_manifest
from l32jax.checkpoint.engine.slices import Home, Slices
from l32jax.checkpoint.engine.transfer import Told, Unit
from l32jax.checkpoint.engine.workplace import Record, Workplace
from l32jax.checkpoint.native_read import METADATA, PARAMS, open_arrays
from l32jax.checkpoint.native_write import merge, units_of, write_metadata, write_unit
from l32jax.checkpoint.steps import CONFIG, FILES, STATE, Steps, is_step
from l32jax.config import LlamaConfig
from l32jax.errors import InputError
from l32jax.model.llama import shapes_of

STEP = "0"


class Native(NamedTuple):
    """An opened step. `config_json` may be that of a whole run; `files` are tokenizer.model etc."""

    config: LlamaConfig
    config_json: str
    slices: Slices
    files: Mapping[str, bytes]


def open_store(where: str | os.PathLike, *, verified: bool = True) -> Native:
    """The newest finished step of a folder, or of an address like gs://bucket/run.

    Either may also be a step itself, which at an address need not have its digests. Of the arrays
    only headers are read.

    Args:
      verified: reads every file of a local step first, and passes over a damaged one, unless that
        was asked for; what is remote is not read twice.

    InputError if there is no such step, if the one asked for is damaged, or if its arrays are not
    those of its config.
    """
    folder = Folder.at(where)
    return _open_step(_remote_step(folder) if is_remote(where) else _local_step(folder, verified))


def _open_step(folder: Folder) -> Native:
    content = folder.read_json(CONFIG)
    config = own_config.read(content.get("model"), folder.where)
    slices = open_arrays(folder.child(STATE), shapes_of(config))
    files = folder.child(FILES)
    contents = {name: files.read(name) or b"" for name in files.names() if "/" not in name}
    return Native(config, json.dumps(content, indent=2), slices, contents)


def _remote_step(folder: Folder) -> Folder:
    names = folder.names()
    if {CONFIG, f"{STATE}/{METADATA}"} <= set(names):
        return folder
    split = (name.split("/") for name in names)
    finished = [int(first) for first, *rest in split if first.isdecimal() and rest == [SIDECAR]]
    if not finished:
        raise InputError(
            f"checkpoint in {folder.where}: no finished step; give the address of a run that has "
            "saved one"
        )
    return folder.child(str(max(finished)))


def _local_step(folder: Folder, verified: bool) -> Folder:
    steps = Steps(folder.where)
    _require_contained(steps.directory)
    if is_step(steps.directory):
        if verified and (complaints := digests.problems(steps.directory)):
            raise InputError(f"checkpoint in {folder.where}: {complaints[0]}; use another step")
        return folder
    step = undamaged_step(steps) if verified else steps.latest()
    if step is None:
        raise steps.nothing_usable()
    return folder.child(str(step))


def _require_contained(directory: Path) -> None:
    """InputError if a link leads out of the directory, or if a file is none (a pipe, a device)."""
    home = directory.resolve()
    for path in directory.rglob("*"):
        if not (path.is_file() or path.is_dir()):  # as is no link in a circle
            raise InputError(f"file {str(path)!r}: it is not a regular file; remove it")
        if not path.resolve().is_relative_to(home):
            raise InputError(
                f"file {str(path)!r}: it links to {path.resolve()}, outside of the checkpoint; "
                "copy it there"
            )


def plan(
    slices: Slices, config_json: str, files: Mapping[str, bytes], about: Mapping[str, Any]
) -> "NativeOutput":
    """A folder with one step, whose arrays have the dtypes of `slices`.

    Args:
      config_json: of a run, or {"model": ...} alone.
      files: by plain names, such as tokenizer.model.
      about: what manifest.json says beside the tensors.
    """
    for name in files:
        if Path(name).name != name or name in ("", ".."):
            raise InputError(f"extra file {name!r}: not a plain name for a file; rename it")
    return NativeOutput(slices, config_json, files, about)


def _require_there(unit: Path, names: Iterable[str]) -> None:
    """InputError if something of a unit that was finished before is gone."""
    for name in names:
        if not (unit / name).is_file():
            raise InputError(f"unfinished file {str(unit / name)!r}: it was removed; begin again")


@dataclass(frozen=True)
class NativeOutput:
    """An `Output`; see `plan`."""

    slices: Slices
    config_json: str
    files: Mapping[str, bytes]
    about: Mapping[str, Any]
    single: None = None

    @property
    def size(self) -> int:
        arrays = sum(map(self.slices.nbytes, self.slices.homes()))
        return arrays + sum(map(len, self.files.values()))

    def units(self, workplace: Workplace) -> list[Unit]:
        state = workplace.directory / STEP / STATE
        state.mkdir(parents=True, exist_ok=True)
        if workplace.is_local:
            for unit, record in workplace.done.items():
                _require_there(state / unit, record["files"])
        return [
            self._unit(state / f"ocdbt.process_{number}", homes, workplace)
            for number, homes in enumerate(units_of(self.slices))
        ]

    def _unit(self, directory: Path, homes: Sequence[Home], workplace: Workplace) -> Unit:
        def write(told: Told) -> Record:
            record = write_unit(self.slices, homes, directory, told)
            workplace.hand_over(directory)
            return record

        return Unit(directory.name, sum(map(self.slices.nbytes, homes)), write)

    def complete(self, workplace: Workplace, records: Mapping[str, Record]) -> None:
        step = workplace.directory / STEP
        merge(step / STATE, sorted(records))
        workplace.hand_over(step / STATE / "d")
        write_metadata(step / STATE, (f"{PARAMS}{path}" for path in self.slices.shapes))
        (step / CONFIG).write_text(self.config_json, encoding="utf-8")
        (step / FILES).mkdir(exist_ok=True)
        for name, content in self.files.items():
            (step / FILES / name).write_bytes(content)
        self._write_checksums(workplace, records)

    def _write_checksums(self, workplace: Workplace, records: Mapping[str, Record]) -> None:
        found = {
            name: value for record in records.values() for name, value in record["tensors"].items()
        }
        names = (f"{PARAMS}{home}" for home in self.slices.homes())
        write_manifest(workplace.directory / MANIFEST, self.about, {n: found[n] for n in names})
        known = {
            f"{STATE}/{unit}/{name}": digest
            for unit, record in records.items()
            for name, digest in record["files"].items()
        }
        digests.write(workplace.directory / STEP, known)
