"""Two checkpoints, tensor by tensor: what `--verify` means."""

import numpy as np

from l32jax.checkpoint.engine.slices import ALL, Home, Slices
from l32jax.checkpoint.engine.sources import Tensor
from l32jax.checkpoint.engine.transfer import Progress, Told, as_bytes, in_threads, slabs


class Differs(Exception):
    """What was written is not what was read; the message names the first tensor."""


def require_same(expected: Slices, actual: Slices, progress: Progress) -> int:
    """Reads all of both, and returns how many tensors they have. Differs unless bit for bit equal.

    A layer of a stacked parameter is a tensor.
    """
    if expected.shapes != actual.shapes:
        names = expected.shapes.items() ^ actual.shapes.items()
        raise Differs(f"shape of {min(names)[0]}: it is not that of the source")
    homes = list(expected.homes())
    progress.begin("verifying", sum(map(expected.nbytes, homes)))
    in_threads(
        [(lambda told, home=home: _same(expected, actual, home, told)) for home in homes], progress
    )
    return len(homes)


def _same(expected: Slices, actual: Slices, home: Home, told: Told) -> None:
    if expected.dtypes[home.path] != actual.dtypes[home.path]:
        was, now = expected.dtypes[home.path], actual.dtypes[home.path]
        raise Differs(f"dtype of {home}: {now} was written of {was}")
    tensor = Tensor(expected.shape(home), expected.dtypes[home.path])
    for rows in slabs(tensor) if tensor.shape else [ALL]:
        wanted, found = (np.asarray(side.read(home, rows)) for side in (expected, actual))
        if not np.array_equal(as_bytes(wanted), as_bytes(found)):
            raise Differs(f"values of {home}: {int((wanted != found).sum())} of them differ")
        size = wanted.nbytes
        del wanted, found
        expected.release()
        actual.release()
        told(size)
