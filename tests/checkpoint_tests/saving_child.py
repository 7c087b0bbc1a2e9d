"""Processes that save step after step until they are killed.

`python saving_child.py <directory>` forks one for each line that it reads and prints its process
id; forking, before JAX has started, spares the imports. Everything in step n tells that it is of
step n, and arrays are donated while they are written.
"""

import os
import sys
import warnings

import jax
import jax.numpy as jnp

from l32jax.checkpoint.store import Store


def save_forever(directory: str) -> None:
    @jax.jit
    def state_of(step):
        return {"params": {"blocks": {n: jnp.full((64, 257), step + n) for n in range(4)}}}

    train = jax.jit(lambda state: jax.tree.map(lambda a: -a, state), donate_argnums=0)
    with Store(directory, keep=3) as store:
        step = (store.latest_step() or 0) + 1
        while True:
            state = state_of(step)
            text = str(step)
            store.save(
                step,
                state,
                config_json=text,
                iterator_state=text.encode(),
                extra_files={"step": text.encode()},
            )
            train(state)
            step += 1


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="os.fork")
    for _ in sys.stdin:
        if (process := os.fork()) == 0:
            save_forever(sys.argv[1])
        print(process, flush=True)
        os.waitpid(process, 0)
        print("ended", flush=True)
