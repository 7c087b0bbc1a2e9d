"""What ptxas says of the GPU kernels: registers, spilled bytes and shared memory, without a GPU.

    python benchmarks/gpu_registers.py [H100 | A100 | "RTX 4090"]

jax's CUDA plugin compiles for a card that is only described here, and ptxas (of the CUDA toolkit,
on PATH or under CUDA_HOME) assembles what it wrote. A thread has 255 registers at most, a card
65,536 for the programs that run side by side on one of its cores; what does not fit spills to
memory, in the inner loop. Speed is not shown: that takes a card.
"""

import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

from l32jax.kernels.gpu import backend as gpu


class Gpu(NamedTuple):
    kind: str
    capability: tuple[int, int]
    cores: int
    shared_kib: int  # that one program may have


GPUS = {
    "H100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 227),
    "A100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163),
    "RTX 4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 99),
}

# (b, k, g, t, s, h) and dtype, by the name that the compiled module gets.
SHAPES = {
    "text_8192_heads_of_128": ((1, 8, 4, 8192, 8192, 128), "bfloat16"),
    "text_8192_heads_of_64": ((1, 8, 4, 8192, 8192, 64), "bfloat16"),
    "text_131072_heads_of_128": ((1, 2, 4, 131072, 131072, 128), "bfloat16"),
    "vision_6432_heads_of_80": ((1, 16, 1, 6432, 6432, 80), "bfloat16"),
    "cross_8192_on_32020_of_128": ((1, 8, 4, 8192, 5 * 6404, 128), "bfloat16"),
    "float32_8192_heads_of_128": ((1, 8, 4, 8192, 8192, 128), "float32"),
}

# XLA wants numbers that only its own cost model uses, too: these are an H100's.
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared}
  shared_memory_per_core: {shared_per_core} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{kind}"
"""


class Kernel(NamedTuple):
    name: str
    threads: int
    registers: int  # of a thread
    spilled: int  # bytes that a thread stores or loads because it has no more registers
    shared: int  # bytes of a program


def lower(name: str, card: Gpu, sharding: SingleDeviceSharding | None = None) -> jax.stages.Lowered:
    """Forward and backward pass of one of SHAPES, for this card; takes no plugin."""
    (b, k, g, t, s, h), dtype = SHAPES[name]
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    query, key = array((b, k, g, t, h), dtype), array((b, k, s, h), dtype)
    bound, score = array((b, t), jnp.int32), array((b, k, g, t), jnp.float32)

    def step(q, k, v, start, stop, lse, delta):
        forward = gpu.forward(q, k, v, start, stop, scale=h**-0.5)
        return forward, gpu.backward(q, k, v, start, stop, lse, delta, q, scale=h**-0.5)

    step.__name__ = name
    # From jax 0.12 on, kernels are lowered for the card of the mesh around them.
    device = AbstractDevice(card.kind, card.cores, "gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("one",), abstract_device=device)):
        traced = jax.jit(step).trace(query, key, key, bound, bound, score, score)
        return traced.lower(lowering_platforms=("cuda",))


def missing() -> str | None:
    """What this machine lacks, or None."""
    if not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
        return "jax's CUDA plugin is not installed: see the extra `cuda` of this package."
    if find_ptxas() is None:
        return "ptxas is neither on PATH nor under CUDA_HOME: it comes with the CUDA toolkit."
    return None


def find_ptxas() -> str | None:
    places = [os.path.join(os.environ.get("CUDA_HOME", ""), "bin"), os.environ.get("PATH", "")]
    return shutil.which("ptxas", path=os.pathsep.join(places))


def compile_kernels(name: str, card: Gpu, dump: pathlib.Path) -> Iterator[Kernel]:
    """Compiles one of SHAPES; XLA must have been told to dump there."""
    major, minor = card.capability
    target = TARGET.format(
        kind=card.kind,
        cores=card.cores,
        shared=card.shared_kib * 1024,
        shared_per_core=(card.shared_kib + 1) * 1024,
        major=major,
        minor=minor,
    )
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    lower(name, card, SingleDeviceSharding(topology.devices[0])).compile()
    [thunks] = dump.glob(f"*.jit_{name}.*thunk_sequence.txt")
    launches = re.findall(
        r" (flash_\w+) grid: .*? threads: \[(\d+).*shared_memory: (\d+)", thunks.read_text()
    )
    sizes = {kernel: (int(threads), int(shared)) for kernel, threads, shared in launches}
    suffix = "a" if card.capability == (9, 0) else ""
    ours = [ptx for ptx in dump.glob(f"*.jit_{name}.*.ptx") if "flash_" in ptx.read_text()]
    if not ours:
        raise RuntimeError(f"XLA of jax {jax.__version__} wrote no PTX of {name} to {dump}.")
    for ptx in ours:
        for kernel, registers, spilled in assemble(ptx, f"sm_{major}{minor}{suffix}"):
            yield Kernel(kernel, sizes[kernel][0], registers, spilled, sizes[kernel][1])


def assemble(ptx: pathlib.Path, arch: str) -> Iterator[tuple[str, int, int]]:
    """Name, registers and spilled bytes of each kernel in a file."""
    command = [find_ptxas(), f"-arch={arch}", "-v", ptx, "-o", os.devnull]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    for entry in said.split("Compiling entry function '")[1:]:
        spilled = re.findall(r"(\d+) bytes spill", entry)
        [registers] = re.findall(r"Used (\d+) registers", entry)
        yield entry.split("'")[0], int(registers), sum(map(int, spilled))


def main(card: str = "H100"):
    if reason := missing():
        sys.exit(reason)
    jax.config.update("jax_platforms", "cpu")
    print(f"{card}, jax {jax.__version__}\n")
    print("| shape | kernel | threads | registers | spilled bytes | shared KiB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as dump:
        flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_dump_to={dump}"]
        flags.append("--xla_dump_emitter_re=ptx")  # without it jax 0.12 writes none
        if home := os.environ.get("CUDA_HOME"):
            flags.append(f"--xla_gpu_cuda_data_dir={home}")
        os.environ["XLA_FLAGS"] = " ".join(flags)
        for name in SHAPES:
            for kernel in sorted(compile_kernels(name, GPUS[card], pathlib.Path(dump))):
                shared = f"{kernel.shared / 1024:.0f}"
                print("|", " | ".join(map(str, (name, *kernel[:-1], shared))), "|", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
