"""One writer of a directory at a time."""

import fcntl
from pathlib import Path
from typing import IO

from l32jax.errors import InputError


def take(directory: Path, what: str, *, wait: bool = False) -> IO[bytes]:
    """Creates the directory, and the open file whose lock ends with this process at the latest.

    While another process, or another open file of this one, holds it, an InputError, about `what`,
    unless it is to `wait`.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / "lock").open("ab")
    except OSError as error:
        raise InputError(
            f"{what}: {error.strerror}; choose a place that can be written to"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        file.close()
        raise InputError(
            f"{what}: another process is writing there; stop it, or choose another place"
        ) from error
    return file
