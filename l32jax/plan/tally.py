"""What a step is made of: seconds, and what was sent along which axes of the mesh."""

import dataclasses
from collections import Counter
from typing import NamedTuple

NEGLIGIBLE = 1e-3  # of a step


class Exchange(NamedTuple):
    """A kind of collective along axes of the mesh. Between slices the kind ends in "of slices"."""

    kind: str
    axes: tuple[str, ...]


@dataclasses.dataclass
class Sum:
    """count: how often in a step. sent: bytes that each device sends. seconds: hidden or not."""

    count: int = 0
    sent: float = 0.0
    seconds: float = 0.0

    def add(self, other: "Sum", times: int = 1) -> None:
        self.count += times * other.count
        self.sent += times * other.sent
        self.seconds += times * other.seconds


@dataclasses.dataclass
class StepTime:
    """Seconds of a step on every device.

    matmul: fusions with a matrix product in them. other: all other operations, copies that nothing
    hides among them. kernels: Pallas. exposed: collectives, as far as the program waits for them.
    exchanges: all collectives, hidden ones too. by_kernel: name -> (calls, seconds).
    doubts: what has no estimate of the compiler, and the seconds that were put in its place.
    """

    matmul: float = 0.0
    other: float = 0.0
    kernels: float = 0.0
    exposed: float = 0.0
    exchanges: dict[Exchange, Sum] = dataclasses.field(default_factory=dict)
    by_kernel: dict[str, Sum] = dataclasses.field(default_factory=dict)
    doubts: dict[str, Sum] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.matmul + self.other + self.kernels + self.exposed

    @property
    def warnings(self) -> list[str]:
        """The doubts, those of most weight first; those of no weight in one line."""
        ordered = sorted(self.doubts.items(), key=lambda item: -item[1].seconds)
        light = [one for _, one in ordered if 0 < one.seconds < NEGLIGIBLE * self.seconds]
        told = [(name, one) for name, one in ordered if one not in light]
        if light:
            rest = Sum(sum(one.count for one in light), 0.0, sum(one.seconds for one in light))
            told.append(("small operations without an estimate", rest))
        return [f"{name} ({one.count} times, {one.seconds:.2g} s)" for name, one in told]

    @property
    def sent_along(self) -> dict[tuple[str, ...], float]:
        """Bytes that each device sends, by the axes along which it does."""
        found: Counter[tuple[str, ...]] = Counter()
        for exchange, one in self.exchanges.items():
            found[exchange.axes] += one.sent  # type: ignore[assignment]
        return dict(found)

    def add(self, other: "StepTime", times: int = 1) -> None:
        for part in ("matmul", "other", "kernels", "exposed"):
            setattr(self, part, getattr(self, part) + times * getattr(other, part))
        self.add_counts(other, times)

    def add_counts(self, other: "StepTime", times: int = 1) -> None:
        """Everything but the time."""
        for name in ("exchanges", "by_kernel", "doubts"):
            for key, one in getattr(other, name).items():
                getattr(self, name).setdefault(key, Sum()).add(one, times)
