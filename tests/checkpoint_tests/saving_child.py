"""Saves step after step until it is killed: `python saving_child.py <directory>`.

Everything in step n tells that it is of step n, and arrays are donated while they are written.
"""

import sys

import jax
import jax.numpy as jnp

from l32jax.checkpoint.store import Store


@jax.jit
def state_of(step):
    return {"params": {"blocks": {n: jnp.full((64, 257), step + n) for n in range(4)}}}


def main(directory: str) -> None:
    with Store(directory, keep=3) as store:
        print("ready", flush=True)
        step = (store.latest_step() or 0) + 1
        while True:
            store.save(
                step,
                state_of(step),
                config_json=str(step),
                iterator_state=str(step).encode(),
                extra_files={"step": str(step).encode()},
            )
            step += 1


if __name__ == "__main__":
    main(sys.argv[1])
