"""Intervals of keys, one a token, in as few shapes as draw them."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
    """Tokens [begin, end), which see the keys from `start` up to `first_stop` .. `last_stop`.

    The stop is the same for all of them, or one key later for each.
    """

    begin: int
    end: int
    start: float
    first_stop: float
    last_stop: float

    @property
    def corners(self) -> list[tuple[int, float]]:
        """As a shape, the token in x and the key in y."""
        return [
            (self.begin, self.start),
            (self.end, self.start),
            (self.end, self.last_stop),
            (self.begin, self.first_stop),
        ]


def segments(start: np.ndarray, stop: np.ndarray) -> Iterator[Segment]:
    """All tokens that see anything; `start` and `stop` are the keys [start, stop) of each."""
    steps, sees = np.diff(stop), stop > start
    is_even = (np.diff(start) == 0) & np.isin(steps, (0, 1)) & (sees[1:] == sees[:-1])
    steps = np.concatenate([[np.nan], np.where(is_even, steps, np.nan)])  # from the token before
    before = np.concatenate([[np.nan], steps[:-1]])
    goes_on = (steps == before) | (~np.isnan(steps) & np.isnan(before))
    begins = np.flatnonzero(~goes_on).tolist()
    for begin, end in pairwise([*begins, len(start)]):
        if sees[begin]:
            bounds = start[begin], stop[begin], stop[end - 1]
            yield Segment(begin, end, *map(float, bounds))
