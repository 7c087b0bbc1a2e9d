"""How much memory attention takes to train, by length: tile by tile against all scores at once.

    python benchmarks/attention_memory.py

One forward and backward pass of one causal bfloat16 row with 8 query heads, 2 key heads and head
size 64, on the CPU. Each measurement is a process of its own: its peak is what the operating
system saw, less what stood there just before the step. What plans more than 4 GiB is not run, so
that the machine lives on. Prints a table, then a JSON line each.
"""

import json
import os
import resource
import subprocess
import sys
import time

LENGTHS = (2048, 4096, 8192, 16_384)
WAYS = ("tiles", "definition")
MOST_MIB = 4096


def peak_mib() -> float:
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20 if sys.platform == "darwin" else kib / 2**10


def make_step(way: str):
    import jax
    import jax.numpy as jnp

    from l32jax.kernels import reference

    def tiles(q, k, v, start, stop, dout):
        out, lse = reference.forward(q, k, v, start, stop, scale=0.125)
        delta = jnp.sum(dout.astype(jnp.float32) * out, axis=-1)
        return reference.backward(q, k, v, start, stop, lse, delta, dout, scale=0.125)

    def definition(q, k, v, start, stop, dout):
        def attend(q, k, v):
            return reference.definition(q, k, v, start, stop, scale=0.125)[0]

        return jax.vjp(attend, q, k, v)[1](dout)

    return jax.jit({"tiles": tiles, "definition": definition}[way])


def make_arrays(length: int):
    import jax
    import jax.numpy as jnp

    def normal(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    keys = (1, 2, length, 64)
    q, dout = (normal(seed, 1, 2, 4, length, 64) for seed in (0, 1))
    stop = jnp.arange(1, length + 1, dtype=jnp.int32)[None]
    return q, normal(2, *keys), normal(3, *keys), jnp.zeros_like(stop), stop, dout


def measure(way: str, length: int) -> dict:
    """Runs the step twice in this process: the second one is timed."""
    import jax

    arrays = jax.block_until_ready(make_arrays(length))
    step = make_step(way).lower(*arrays).compile()
    planned = step.memory_analysis().temp_size_in_bytes / 2**20
    result = dict(way=way, length=length, planned_mib=round(planned))
    if planned > MOST_MIB:
        return result
    before = peak_mib()
    jax.block_until_ready(step(*arrays))
    peak = peak_mib()
    begin = time.perf_counter()
    jax.block_until_ready(step(*arrays))
    seconds = round(time.perf_counter() - begin, 3)
    return dict(result, step_mib=round(peak - before), process_mib=round(peak), seconds=seconds)


def measure_apart(way: str, length: int) -> dict:
    command = [sys.executable, __file__, way, str(length)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def row(result: dict) -> str:
    columns = ("planned_mib", "step_mib", "process_mib", "seconds")
    cells = (str(result.get(column, "not run")).rjust(12) for column in columns)
    return f"{result['way']:<12}{result['length']:>8}" + "".join(cells)


def main():
    if sys.argv[1:]:
        way, length = sys.argv[1:]
        print(json.dumps(measure(way, int(length))))
        return
    titles = ("planned MiB", "step MiB", "process MiB", "seconds")
    print("way           length" + "".join(title.rjust(12) for title in titles))
    results = []
    for length in LENGTHS:
        for way in WAYS:
            results.append(measure_apart(way, length))
            print(row(results[-1]), flush=True)
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
