"""What ptxas says of the GPU kernels: registers, spilled bytes and shared memory, without a GPU.

    python benchmarks/gpu_registers.py [h100 | h200 | b200 | a100 | rtx4090]

jax's CUDA plugin compiles for a card that is only described here, and ptxas (of the CUDA toolkit,
on PATH or under CUDA_HOME) assembles what it wrote. A thread has 255 registers at most, a card
65,536 for the programs that run side by side on one of its cores; what does not fit spills to
memory, in the inner loop. Speed is not shown: that takes a card.
"""

import functools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

from l32jax.kernels.gpu import backend as gpu
from l32jax.plan.cuda import GPUS, Gpu, devices_of, find_ptxas, missing, tell_xla

# (b, k, g, t, s, h) and dtype, by the name that the compiled module gets.
SHAPES = {
    "text_8192_heads_of_128": ((1, 8, 4, 8192, 8192, 128), "bfloat16"),
    "text_8192_heads_of_64": ((1, 8, 4, 8192, 8192, 64), "bfloat16"),
    "text_131072_heads_of_128": ((1, 2, 4, 131072, 131072, 128), "bfloat16"),
    "vision_6432_heads_of_80": ((1, 16, 1, 6432, 6432, 80), "bfloat16"),
    "cross_8192_on_32020_of_128": ((1, 8, 4, 8192, 5 * 6404, 128), "bfloat16"),
    "float32_8192_heads_of_128": ((1, 8, 4, 8192, 8192, 128), "float32"),
}


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


def compile_kernels(name: str, card: Gpu, dump: pathlib.Path) -> Iterator[Kernel]:
    """Compiles one of SHAPES; XLA must have been told to dump there."""
    major, minor = card.capability
    lower(name, card, SingleDeviceSharding(devices_of(card)[0])).compile()
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


def main(card: str = "h100"):
    if reason := missing():
        sys.exit(f"{reason}.")
    jax.config.update("jax_platforms", "cpu")
    print(f"{card}, jax {jax.__version__}\n")
    print("| shape | kernel | threads | registers | spilled bytes | shared KiB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as dump:
        # Without the second of these, jax 0.12 writes no PTX.
        tell_xla(os.environ, f"--xla_dump_to={dump}", "--xla_dump_emitter_re=ptx")
        for name in SHAPES:
            for kernel in sorted(compile_kernels(name, GPUS[card], pathlib.Path(dump))):
                shared = f"{kernel.shared / 1024:.0f}"
                print("|", " | ".join(map(str, (name, *kernel[:-1], shared))), "|", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
