"""How long our attention kernels take on TPUs: pairs of queries and keys at a share of the peak.

XLA has no estimate of a Pallas kernel. `benchmarks/attention_shares.py` makes the table from the
kernels' schedules (docs/attention_costs.md says how); nothing of it was measured on hardware. Its
rows are causal and have 8,192 tokens. Where a row sees fewer keys, more of its blocks are seen in
part: it costs as if it saw `EDGE` more. With that, eight packed documents of 8,192 tokens, a row of
131,072 and an image come out 13 % too short to 1 % too long, beside what that page says of them.
"""

import math
import re
from collections.abc import Callable, Mapping

from l32jax.plan.chips import Chip
from l32jax.plan.hlo import Instruction

# (chip, head dimension, query heads that share a key head): share forward, share backward. What
# the compiler makes of v4's kernels cannot be read: as v5p's, whose matrix units it has.
SHARES = {
    ("v4", 128, 3): (0.63, 0.79),
    ("v4", 128, 4): (0.69, 0.86),
    ("v4", 128, 8): (0.69, 0.86),
    ("v4", 64, 4): (0.34, 0.47),
    ("v4", 80, 1): (0.38, 0.52),
    ("v5e", 128, 3): (0.62, 0.80),
    ("v5e", 128, 4): (0.68, 0.85),
    ("v5e", 128, 8): (0.70, 0.87),
    ("v5e", 64, 4): (0.34, 0.47),
    ("v5e", 80, 1): (0.40, 0.53),
    ("v5p", 128, 3): (0.63, 0.79),
    ("v5p", 128, 4): (0.69, 0.86),
    ("v5p", 128, 8): (0.69, 0.86),
    ("v5p", 64, 4): (0.34, 0.47),
    ("v5p", 80, 1): (0.38, 0.52),
    ("v6e", 128, 3): (0.23, 0.38),
    ("v6e", 128, 4): (0.27, 0.43),
    ("v6e", 128, 8): (0.27, 0.43),
    ("v6e", 64, 4): (0.14, 0.21),
    ("v6e", 80, 1): (0.13, 0.22),  # as the page's image encoder
    ("tpu7x", 128, 3): (0.22, 0.38),
    ("tpu7x", 128, 4): (0.26, 0.42),
    ("tpu7x", 128, 8): (0.26, 0.42),
    ("tpu7x", 64, 4): (0.13, 0.21),
    ("tpu7x", 80, 1): (0.13, 0.23),
}
PRODUCTS = {"attention_forward": 2, "attention_backward": 5}
CAUSAL = 0.5  # of all pairs
BLOCK = 1024  # what kernels.tpu fills lengths up to, at most
SEEN = 4096  # keys that a query sees on average, in the rows of the table
EDGE = 800  # keys
LANES = 128


def attention_seconds(
    chip: Chip, visible: Mapping[tuple[int, int], float] | None = None
) -> Callable[[Instruction], float | None]:
    """Seconds of a call of our kernels; None of other kernels, and of float32.

    Args:
      visible: share of the pairs that are seen, by (queries, keys) of a row on a device. Half of
        them, as in a causal row, where it does not say; so an image encoder has to be in it.
    """

    def seconds(call: Instruction) -> float | None:
        name = re.sub(r"\.\d+$", "", call.name)
        if name == "attention_decode":
            return _cache_bytes(call) / chip.hbm
        shapes = _shapes(call)
        if name not in PRODUCTS or shapes is None:
            return None
        (batch, kv_heads, shared, queries, head_dim), keys = shapes
        share = _seen(visible or {}, queries, keys)
        seen = (keys * share + EDGE) * SEEN / (SEEN + EDGE)
        pairs = batch * kv_heads * shared * queries * seen
        flops = 2 * PRODUCTS[name] * head_dim * pairs
        reached = share_of_peak(chip.name, head_dim, shared)[name == "attention_backward"]
        return flops / (reached * chip.peak)

    return seconds


def _seen(visible: Mapping[tuple[int, int], float], queries: int, keys: int) -> float:
    """The share of a call's pairs, whose queries and keys are filled up to whole blocks."""
    for (asked, there), share in visible.items():
        if 0 <= queries - asked < BLOCK and 0 <= keys - there < BLOCK:
            return share * asked * there / (queries * keys)
    return CAUSAL


def share_of_peak(chip: str, head_dim: int, shared: int) -> tuple[float, float]:
    """Forward and backward. Of heads that are not in the table, as the most similar ones: a product
    takes as long as if the head dimension were a multiple of 128.
    """
    known = [key for key in SHARES if key[0] == chip]
    if not known:
        raise ValueError(f"no share of the peak of {chip!r}: it is none of the TPUs in the table")
    near = min(known, key=lambda key: (abs(key[1] - head_dim), abs(key[2] - shared)))
    fuller = (head_dim / _whole(head_dim)) / (near[1] / _whole(near[1]))
    ahead, back = SHARES[near]
    return ahead * fuller, back * fuller


def _whole(head_dim: int) -> int:
    return -(-head_dim // LANES) * LANES


def _cache_bytes(call: Instruction) -> int:
    """Of one layer's keys and values, [l b k s h] in bfloat16: all that such a call waits for."""
    given = call.attribute(r"operand_layout_constraints=\{(.*?)\}, [a-z_]+=") or ""
    caches = [array for array in re.findall(r"bf16\[([\d,]+)\]", given) if array.count(",") == 4]
    return sum(2 * math.prod(map(int, array.split(",")[1:])) for array in caches)


def _shapes(call: Instruction) -> tuple[tuple[int, ...], int] | None:
    """Of the queries [b k g t h], and the number of keys."""
    given = call.attribute(r"operand_layout_constraints=\{(.*?)\}, [a-z_]+=") or ""
    arrays = re.findall(r"bf16\[([\d,]+)\]", given)
    sizes = [tuple(map(int, array.split(","))) for array in arrays]
    if len(sizes) < 2 or len(sizes[0]) != 5 or len(sizes[1]) != 4:
        return None
    return sizes[0], sizes[1][2]
