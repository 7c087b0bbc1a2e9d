"""Trains one step on a row of that many tokens, and says what memory that took.

    python -m tests.train_tests.long_row_child IMPL LENGTH [plan]

With `plan` it compiles and does not run.
"""

import json
import re
import resource
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from l32jax.config import AttentionConfig, DecoderConfig, LlamaConfig
from l32jax.data.batches import place
from l32jax.data.rows import make_row, stack
from l32jax.data.samples import Sample
from l32jax.sharding import single_device_mesh
from l32jax.train.objectives import next_token
from l32jax.train.step import init_state, make_train_step
from tests.train_tests.small import stage

MODEL = LlamaConfig(
    decoder=DecoderConfig(
        vocab_size=512,
        embed_dim=128,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=256,
        num_groups=2,
        tied_embedding=True,
    )
)


def main(impl, length: int, *, run: bool) -> None:
    training = stage(("language_model",))
    objective = partial(
        next_token,
        dtype=jnp.float32,
        saved="attention",
        attention=AttentionConfig(impl=impl),
    )
    step = make_train_step(MODEL, training, objective)
    mesh = single_device_mesh()
    tokens = np.arange(length) % 509
    row = make_row([Sample.single(tokens.tolist(), [1.0] * length)], length=length)
    with jax.set_mesh(mesh):
        batch = place(stack([row]), mesh)
        state = jax.jit(partial(init_state, MODEL, training, 0))()
        compiled = step.lower(state, batch, jnp.float32(1e-3)).compile()
        planned = compiled.memory_analysis().temp_size_in_bytes
        losses = []
        for _ in range(2 if run else 0):
            state, metrics = compiled(state, batch, jnp.float32(1e-3))
            losses.append(float(metrics["loss"]))
    print(json.dumps({"planned": planned, "peak": peak_bytes(), "losses": losses}))


def peak_bytes() -> int:
    """Of this program. Linux's ru_maxrss would count the process that started it as well."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), run="plan" not in sys.argv[3:])
