"""GPUs that are not here, as XLA's compiler for CUDA is told of them.

JAX's CUDA plugin compiles for a card that is only described, with no driver; ptxas, of the CUDA
toolkit, assembles what it wrote.
"""

import importlib.util
import os
import shutil
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.experimental import topologies


class Gpu(NamedTuple):
    """shared_kib: of the memory that the cores of one multiprocessor share, for one program."""

    kind: str
    capability: tuple[int, int]
    cores: int
    shared_kib: int
    memory: int
    bandwidth: int


# NVIDIA's data sheets, and the CUDA C++ Programming Guide for the limits of each capability.
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 227, 80 * 10**9, 3350 * 10**9),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 227, 141 * 10**9, 4800 * 10**9),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 227, 180 * 10**9, 8000 * 10**9),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163, 80 * 10**9, 2039 * 10**9),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 99, 24 * 10**9, 1008 * 10**9),
}

# XLA wants numbers that only its own cost model uses, too: the rest are an H100's.
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared}
  shared_memory_per_core: {shared_per_core} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{kind}"
"""


def missing() -> str | None:
    """What this machine lacks to compile for GPUs, or None."""
    if not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
        return "JAX's CUDA plugin is not installed: see the extra `cuda` of this package"
    if find_ptxas() is None:
        return "ptxas is neither on PATH nor under CUDA_HOME: it comes with the CUDA toolkit"
    return None


def find_ptxas() -> str | None:
    places = [os.path.join(os.environ.get("CUDA_HOME", ""), "bin"), os.environ.get("PATH", "")]
    return shutil.which("ptxas", path=os.pathsep.join(places))


def tell_xla(environ: MutableMapping[str, str], *flags: str) -> None:
    """Where the CUDA toolkit is, once; before JAX starts."""
    found, told = find_ptxas(), environ.get("XLA_FLAGS", "").split()
    toolkit = () if found is None else (f"--xla_gpu_cuda_data_dir={Path(found).parents[1]}",)
    new = [flag for flag in (*toolkit, *flags) if flag not in told]
    environ["XLA_FLAGS"] = " ".join([*told, *new])


def devices_of(card: Gpu, machines: int = 1, each: int = 1) -> list[Any]:
    """JAX's devices of so many machines with so many of these."""
    major, minor = card.capability
    target = TARGET.format(
        kind=card.kind,
        cores=card.cores,
        shared=card.shared_kib * 1024,
        shared_per_core=(card.shared_kib + 1) * 1024,
        memory=card.memory,
        bandwidth=card.bandwidth,
        major=major,
        minor=minor,
    )
    name = f"1x{machines}x{each}"
    found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=name)
    return list(found.devices)
