"""What an index says about its samples, so that rows can be sized for them."""

from typing import Any

import numpy as np


def statistics(rows: np.ndarray) -> dict[str, Any]:
    """Of rows of units, see `units.ROW`: sums, and how many samples are how long."""
    lengths = 1 << np.ceil(np.log2(np.maximum(rows["tokens"], 1))).astype(int)
    return {
        "samples": len(rows),
        "tokens": int(rows["tokens"].sum(dtype=np.int64)),
        "images": int(rows["images"].sum(dtype=np.int64)),
        "tiles": int(rows["tiles"].sum(dtype=np.int64)),
        "bytes": int(rows["size"].sum(dtype=np.int64)),
        "samples_of_up_to_tokens": _histogram(lengths),
        "samples_of_tiles": _histogram(rows["tiles"]),
    }


def _histogram(values: np.ndarray) -> dict[str, int]:
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(map(str, found.tolist()), counts.tolist(), strict=True))
