"""One of two processes that save together: `python … <directory> <port> <process>`.

They save step 1 and 2, step 2 is damaged, and both must go back to step 1 and save step 2 anew.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from l32jax.checkpoint.store import Store


def main(directory: str, port: str, process: int) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    sharding = NamedSharding(jax.make_mesh((4,), ("fsdp",)), PartitionSpec("fsdp"))
    weight = jax.make_array_from_callback((8,), sharding, lambda i: np.arange(8.0, dtype="f4")[i])
    target = {"weight": jax.ShapeDtypeStruct((8,), weight.dtype, sharding=sharding)}
    where = f"process {process}" * (process + 1)

    with Store(directory) as store:
        for step in (1, 2):
            state = {"weight": weight * step}
            store.save(step, state, config_json="{}", iterator_state=where.encode())
        store.wait()
        if process == 0:
            (Path(directory) / "2" / "config.json").write_text("{ }")
        restored = store.restore(target)
        assert restored.step == 1
        assert restored.iterator_states == (b"process 0", b"process 1process 1")
        for shard in restored.state["weight"].addressable_shards:
            np.testing.assert_array_equal(shard.data, np.arange(8.0)[shard.index])
        state = {"weight": restored.state["weight"] * 20}
        store.save(2, state, config_json="{}", iterator_state=where.encode())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
