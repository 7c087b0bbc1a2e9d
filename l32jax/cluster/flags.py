"""Settings of XLA, NCCL and JAX by platform, for the platform's known reasons; the only place.

They are set for a process that has not set them itself. docs/launch.md shows the table. For TPU
there are none: libtpu's defaults know the chip, and nothing here was measured to be better.
"""

import glob
from collections.abc import MutableMapping
from typing import NamedTuple

from l32jax.cluster.launchers import has_tpu


class Setting(NamedTuple):
    """`variable` is of the environment; `flag` is added to what it has, or is all that it has."""

    variable: str
    flag: str
    why: str


FLAGS: dict[str, tuple[Setting, ...]] = {
    "gpu": (
        Setting(
            "XLA_FLAGS",
            "--xla_gpu_enable_latency_hiding_scheduler=true",
            "computes while weights are gathered and gradients are reduced",
        ),
        Setting(
            "XLA_FLAGS",
            "--xla_gpu_first_collective_call_terminate_timeout_seconds=300",
            "processes compile for different times; by default the first ends all after 40 s",
        ),
        Setting("NCCL_DEBUG", "WARN", "says what is wrong with a link or a host"),
        Setting("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9", "three quarters of the memory by default"),
    ),
    "tpu": (),
    "cpu": (
        Setting(
            "XLA_FLAGS",
            "--xla_cpu_collective_call_terminate_timeout_seconds=600",
            "devices of one process share its cores and wait for each other; by default the first "
            "ends all after 40 s",
        ),
    ),
}


def platform(environ: MutableMapping[str, str]) -> str:
    """Of this machine: cpu, gpu or tpu, unless JAX_PLATFORMS says it."""
    asked = environ.get("JAX_PLATFORMS", "").split(",")[0]
    if asked:
        return {"cuda": "gpu", "rocm": "gpu"}.get(asked, asked)
    if glob.glob("/dev/nvidia[0-9]*"):
        return "gpu"
    return "tpu" if has_tpu() else "cpu"


def set_flags(environ: MutableMapping[str, str]) -> None:
    """Adds to XLA_FLAGS the flags that it does not have, and variables that are not set."""
    for setting in FLAGS.get(platform(environ), ()):
        before = environ.get(setting.variable, "")
        if not setting.flag.startswith("--"):
            environ.setdefault(setting.variable, setting.flag)
        elif setting.flag.partition("=")[0] not in before:
            environ[setting.variable] = f"{before} {setting.flag}".strip()
