"""Numbers as a line of little bars."""

from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 20, *, low: float | None = None) -> str:
    """Means of `width` equal parts of finite values, from the lowest (or `low`) to the highest."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [len(values) * part // count for part in range(count + 1)]
    parts = [values[begin:end] for begin, end in zip(edges, edges[1:], strict=False)]
    means = [sum(part) / len(part) for part in parts]
    bottom = min(means) if low is None else low
    span = max(means) - bottom
    return "".join(
        BARS[min(int((mean - bottom) / span * len(BARS)), len(BARS) - 1)] if span > 0 else BARS[0]
        for mean in means
    )
