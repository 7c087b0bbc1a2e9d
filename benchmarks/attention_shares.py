"""Which share of a chip's peak our attention kernels reach: the table in `l32jax/plan/kernels.py`.

    python benchmarks/attention_shares.py --chips v5e v5p v6e tpu7x

Modelled as `attention_costs` says, from causal rows of 8,192 tokens. Operations are two products
forward and five backward over the visible pairs. It needs `libtpu` and no TPU; a chip takes some
two minutes on one core. What the compiler writes for v4 `kernel_cycles` cannot read.
"""

import argparse

import attention_costs as costs
from kernel_cycles import CHIPS

from l32jax.plan.chips import chip_of

READABLE = [chip for chip in CHIPS if chip != "v4"]
HEADS = [(128, 3), (128, 4), (128, 8), (64, 4), (80, 1)]  # head dimension, heads that share a key


def shares(chip: str, work: costs.Workload) -> tuple[float, float]:
    """Forward, backward."""
    found = costs.ours(chip, work)
    pairs = float((work.stop - work.start).clip(0).sum()) * work.num_heads
    (back,) = found.backward

    def share(cost: costs.Cost, products: int) -> float:
        flops = 2 * products * work.head_dim * pairs
        return flops / (cost.milliseconds(chip) / 1e3) / chip_of(chip).peak

    return share(found.forward, 2), share(back, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", default=READABLE, choices=READABLE)
    for chip in parser.parse_args().chips:
        for head_dim, shared in HEADS:
            ahead, back = shares(chip, costs.causal("self 8k", 8192, 8, shared, head_dim))
            print(f'    ("{chip}", {head_dim}, {shared}): ({ahead:.2f}, {back:.2f}),', flush=True)


if __name__ == "__main__":
    main()
