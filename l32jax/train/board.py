"""What the processes of a run tell each other outside of arrays: short notes at the first process.

Notes need no step of the devices, so they also come through when a process is missing in one.
"""

import itertools

import jax
from jax._src import distributed  # its client has no public name

_boards = itertools.count()  # runs of a process, and of all processes, in order


class Board:
    """Notes by name, of one run. All processes make one together; a look costs a round trip.

    JaxRuntimeError from any method: the first process cannot be reached.
    """

    def __init__(self):
        client = distributed.global_state.client
        assert client is not None
        self._client = client
        self._prefix = f"l32jax/{next(_boards)}/"

    def write(self, name: str, note: str) -> None:
        self._client.key_value_set(self._prefix + name, note, allow_overwrite=True)

    def write_first(self, name: str, note: str) -> None:
        """Only if no process has written there."""
        try:
            self._client.key_value_set(self._prefix + name, note)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def read(self, name: str) -> str | None:
        try:
            return self._client.key_value_try_get(self._prefix + name)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return None

    def read_all(self, folder: str) -> dict[str, str]:
        """The notes whose names are `folder`/…, by what follows."""
        prefix = f"{self._prefix}{folder}/"
        found = self._client.key_value_dir_get(prefix)
        return {name.removeprefix(prefix): note for name, note in found}


def open_board() -> Board | None:
    """None where a process is alone."""
    return Board() if jax.process_count() > 1 else None
