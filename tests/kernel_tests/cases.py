"""What attention kernels are tested with: the definition in float64, arrays, key intervals.

Layout and letters are those of the kernels: q [b k g t h], k and v [b k s h], intervals [b t].
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from l32jax.data.rows import vision_intervals

IMAGE, TEXT = 1, 0


class Shape(NamedTuple):
    b: int
    k: int
    g: int
    t: int
    s: int
    h: int

    @property
    def scale(self) -> float:
        return self.h**-0.5


class Inputs(NamedTuple):
    """Arrays, and the cotangents of the result and of its log-sum-exp."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    dlse: np.ndarray


class Attention(NamedTuple):
    out: np.ndarray
    lse: np.ndarray
    delta: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def drawn(shape: Shape, seed: int, dtype="float32") -> Inputs:
    b, k, g, t, s, h = shape
    random = np.random.default_rng(seed)
    sizes = (b, k, g, t, h), (b, k, s, h), (b, k, s, h), (b, k, g, t, h)
    arrays = [random.standard_normal(size).astype(jnp.dtype(dtype)) for size in sizes]
    # As large as dout @ v, for where a row sees one key all else of its slope cancels.
    dlse = h**0.5 * random.standard_normal((b, k, g, t))
    return Inputs(*arrays, dlse=dlse.astype(np.float32))


def visible(start, stop, num_keys: int) -> np.ndarray:
    """Which keys [b t s] each row sees."""
    key = np.arange(num_keys)
    return (key >= start[..., None]) & (key < stop[..., None])


def definition(inputs: Inputs, start, stop, *, scale: float) -> Attention:
    """By the textbook, from all scores at once, in float64."""
    q, k, v, dout, dlse = (np.asarray(array, np.float64) for array in inputs)
    sees = visible(start, stop, k.shape[2])[:, None, None]
    scores = np.where(sees, np.einsum("bkgth,bksh->bkgts", q, k) * scale, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-1e30)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    weights /= np.where(total > 0, total, 1)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    out = np.einsum("bkgts,bksh->bkgth", weights, v)
    delta = (dout * out).sum(axis=-1) - dlse
    slopes = weights * (np.einsum("bkgth,bksh->bkgts", dout, v) - delta[..., None]) * scale
    return Attention(
        out,
        lse,
        delta,
        np.einsum("bkgts,bksh->bkgth", slopes, k),
        np.einsum("bkgts,bkgth->bksh", slopes, q),
        np.einsum("bkgts,bkgth->bksh", weights, dout),
    )


def arbitrary(random, b: int, t: int, s: int):
    """Ends in any order, also before the first and beyond the last key."""
    return random.integers(-3, s + 4, (2, b, t))


def causal(random, b: int, t: int, s: int):
    """The last query sees all keys, as where keys come before the queries."""
    row = np.broadcast_to(np.arange(t), (b, t))
    return np.zeros_like(row), row + 1 + max(s - t, 0)


def packed(random, b: int, t: int, s: int):
    """Causal documents, one behind the other."""
    begins = random.random((b, t)) < 4 / t
    row = np.broadcast_to(np.arange(t), (b, t))
    return np.maximum.accumulate(np.where(begins, row, 0), axis=1), row + 1


def window(random, b: int, t: int, s: int):
    row = np.broadcast_to(np.arange(t), (b, t))
    return row - int(random.integers(1, s + 1)), row + 1


def images(random, b: int, t: int, s: int):
    """The images that each token of a row of text sees, some of them adjacent."""
    return np.stack([_images(random, t, s) for _ in range(b)], axis=1)


def _images(random, t: int, s: int):
    tokens = np.full(t, TEXT)
    tokens[random.integers(0, t, 3)] = IMAGE
    first = int(random.integers(0, t))
    tokens[first : first + 2] = IMAGE
    tiles = random.integers(1, 5, int(tokens.sum()))
    start, stop = vision_intervals(tokens.tolist(), IMAGE, tiles.tolist())
    return np.stack([start, stop]) * max(s // int(tiles.sum()), 1)


def nothing(random, b: int, t: int, s: int):
    ends = random.integers(-3, s + 4, (2, b, t))
    return ends.max(axis=0), ends.min(axis=0)


def everything(random, b: int, t: int, s: int):
    return np.zeros((b, t), int), np.full((b, t), s)


KINDS = {
    kind.__name__: kind for kind in (arbitrary, causal, packed, window, images, nothing, everything)
}


class Mask(NamedTuple):
    """What fixes intervals, short enough to read in a failure."""

    kind: str
    seed: int = 0
    gap: bool = False  # a stretch of rows sees nothing
    cut: bool = False  # nobody sees the last keys

    def intervals(self, b: int, t: int, s: int) -> tuple[np.ndarray, np.ndarray]:
        """start, stop int32 [b t] over s keys."""
        random = np.random.default_rng(self.seed)
        start, stop = np.array(KINDS[self.kind](random, b, t, s), np.int32)
        if self.gap:
            first, last = np.sort(random.integers(0, t + 1, 2))
            stop[:, first:last] = 0
        if self.cut:
            stop = np.minimum(stop, np.int32(random.integers(0, s + 1)))
        return start, stop


SEEDS = st.integers(0, 2**31)
MASKS = st.builds(Mask, st.sampled_from(list(KINDS)), SEEDS, st.booleans(), st.booleans())
