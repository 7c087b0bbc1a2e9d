"""What a device is capable of, as its maker says it; what is assumed is marked.

TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. A link of the interconnect carries in
one direction what the bandwidth per chip that these pages name makes of it (half of it is outgoing,
a 2D torus has four links and a 3D torus six), less the tenth that is lost to framing (jax-ml's
scaling book has 45 and 90 GB/s). The clock is the one at which the matrix units of the chip reach
its peak. Watts of TPUs are not published, but for v4 (Jouppi et al. 2023, arXiv:2304.01433, at
most 192 W): assumed. GPUs: NVIDIA's data sheets; watts are the most that a board may draw.
"""

import dataclasses
from typing import Literal

from l32jax.config_text import did_you_mean
from l32jax.errors import InputError
from l32jax.train.flops import PEAKS

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device as JAX counts them; bandwidths are in bytes a second.

    name: also how its topologies begin, like "v5p:4x4x4".
    kind: how JAX calls the device, as in `train.flops.PEAKS`.
    clock: hertz; 0 of a GPU, whose compiled programs have no cycles in them.
    peak: dense bfloat16 FLOP/s.
    hbm_bytes: what there is of it; the compiler keeps some hundred MiB for itself.
    link: one direction of one link to a neighbour; of a GPU, all of NVLink in one direction.
    torus: dimensions of the interconnect; 0 where every device has the same way to every other.
    network: a device's share of what its host sends to hosts elsewhere: other slices of TPUs, other
      machines with GPUs.
    per_chip: devices that share the links of a chip.
    per_host: devices of one host.
    watts: of a device at work.
    """

    name: str
    kind: str
    platform: Literal["tpu", "gpu"] = "tpu"
    clock: float = 0.0
    peak: float
    hbm_bytes: int
    hbm: float
    link: float
    torus: int = 0
    network: float
    per_chip: int = 1
    per_host: int
    watts: int


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4", kind="TPU v4", clock=1.05e9, peak=PEAKS["TPU v4"],
            hbm_bytes=32 * GIB, hbm=1228e9, link=45e9, torus=3,
            network=6.25e9,  # assumed: as v5p's
            per_host=4, watts=192,
        ),
        Chip(
            name="v5e", kind="TPU v5e", clock=1.5e9, peak=PEAKS["TPU v5e"],
            hbm_bytes=16 * GIB, hbm=819e9, link=45e9, torus=2,
            network=3.125e9,  # 6.4 Tbit/s of 256 chips
            per_host=4,  # of slices with more than one host
            watts=150,  # assumed
        ),
        Chip(
            name="v5p", kind="TPU v5p", clock=1.75e9, peak=PEAKS["TPU v5p"],
            hbm_bytes=95 * GIB, hbm=2765e9, link=90e9, torus=3,
            network=6.25e9,  # 50 Gbit/s a chip
            per_host=4, watts=350,  # assumed
        ),
        Chip(
            name="v6e", kind="TPU v6e", clock=1.75e9, peak=PEAKS["TPU v6e"],
            hbm_bytes=32 * GIB, hbm=1638e9, link=90e9, torus=2,
            network=12.5e9,  # assumed: 100 Gbit/s a chip
            per_host=4,  # of slices with more than one host
            watts=300,  # assumed
        ),
        Chip(
            name="tpu7x", kind="TPU7x", clock=2.2e9, peak=PEAKS["TPU7x"],
            hbm_bytes=96 * GIB, hbm=3690e9, link=90e9, torus=3,
            network=6.25e9,  # assumed: 100 Gbit/s a chip
            per_chip=2, per_host=8, watts=480,  # assumed
        ),
        Chip(
            name="h100", kind="NVIDIA H100", platform="gpu", peak=PEAKS["NVIDIA H100"],
            hbm_bytes=80 * 10**9, hbm=3350e9, link=450e9, network=50e9, per_host=8, watts=700,
        ),
        Chip(
            name="h200", kind="NVIDIA H200", platform="gpu", peak=PEAKS["NVIDIA H200"],
            hbm_bytes=141 * 10**9, hbm=4800e9, link=450e9, network=50e9, per_host=8, watts=700,
        ),
        Chip(
            name="b200", kind="NVIDIA B200", platform="gpu", peak=PEAKS["NVIDIA B200"],
            hbm_bytes=180 * 10**9, hbm=8000e9, link=900e9, network=50e9, per_host=8, watts=1000,
        ),
    )
}  # fmt: skip


def chip_of(name: str) -> Chip:
    """Of a chip's name, or of a topology's like "v5p:4x4x4". InputError if there is none such."""
    prefix = name.partition(":")[0]
    if prefix not in CHIPS:
        raise InputError(f"no chip is called {prefix!r}{did_you_mean(prefix, CHIPS)}")
    return CHIPS[prefix]
