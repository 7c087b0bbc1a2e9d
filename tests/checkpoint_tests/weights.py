"""Parameters in which nothing is zero or one by chance, and a way to compare trees of them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from l32jax.checkpoint import hugging_face
from l32jax.checkpoint.engine.slices import Slices
from l32jax.checkpoint.engine.tables import Table, theirs
from l32jax.checkpoint.engine.transfer import write
from l32jax.checkpoint.hugging_face_config import TokenIds
from l32jax.config import LlamaConfig
from l32jax.model.llama import abstract_params
from l32jax.model.parameters import Params, flatten, on_mesh, path_name
from l32jax.sharding import single_device_mesh

# The places in a 4 x 4 grid that belong to a supported aspect ratio.
IN_USE = np.zeros((4, 4), bool)
IN_USE[0, :] = IN_USE[:, 0] = IN_USE[1, 1] = True


def targets(config: LlamaConfig, mesh: Mesh | None = None, dtype: Any = jnp.float32) -> Params:
    mesh = mesh or single_device_mesh()
    with jax.set_mesh(mesh):
        return on_mesh(abstract_params(config, dtype), mesh)


def random_params(config: LlamaConfig, mesh: Mesh | None = None, *, seed: int = 0) -> Params:
    """Scales near 1, everything else near 0; unused places of the tile tables are zeros."""
    random = np.random.default_rng(seed)

    def fill(path, target):
        name = path_name(path)
        values = 0.08 * random.standard_normal(target.shape)
        values += 1 if name.endswith("scale") else 0.5 if name.endswith("gate") else 0
        if name.endswith(("tile_embedding", "tile/embedding")):
            side = len(values)
            values[~IN_USE[:side, :side]] = 0
        return jax.device_put(values.astype(target.dtype), target.sharding)

    return jax.tree.map_with_path(fill, targets(config, mesh))


def tensors_of(table: Table, params: Params) -> dict[str, np.ndarray]:
    """Our parameters as another format's tensors, all of them in memory."""
    source = theirs(table, Slices.of(params))
    return {name: source.read(name, slice(None)) for name in source.tensors}


def export_hugging_face(
    params: Params, config: LlamaConfig, directory: Path, *, dtype: Any, ids: TokenIds, **how: Any
) -> None:
    """A folder of Hugging Face's, of whatever the test thinks of; `l32jax.save` is for people."""
    slices = Slices.of(params).as_dtype(dtype)
    write(hugging_face.plan(slices, config, ids=ids, about={"format": "hf"}, **how), directory)


def assert_same(ours: Params, theirs: Params) -> None:
    """Bit by bit, dtypes included."""
    ours, theirs = flatten(ours), flatten(theirs)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(theirs[path]), err_msg=path)
