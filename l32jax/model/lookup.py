"""The rows of a table that lies on many devices."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l32jax.sharding import PARAM_AXES, activation_spec, param_spec

COLUMNS, ROWS = PARAM_AXES["d"], PARAM_AXES["v"]


def look_up(
    table: Float[Array, "v d"], ids: Int[Array, "b t"], dtype: jnp.dtype
) -> Float[Array, "b t d"]:
    """Row ids[b, t] of the table, everywhere; an id beyond its end gives zeros.

    Nothing as large as the table moves. Devices that share its columns tell each other their ids,
    look up the columns that they hold for all of them, and swap; of those that share its rows, all
    but one look up zeros. The gradient comes back the same way, and adds up in the table's dtype.
    """
    rows = activation_spec("bt")
    specs = param_spec("vd"), rows
    run = jax.shard_map(partial(_local, dtype=dtype), in_specs=specs, out_specs=rows)
    # A table that lies in another way, as one made outside any mesh does, is moved.
    return run(*(jax.sharding.reshard(*pair) for pair in zip((table, ids), specs, strict=True)))


def _local(table: Float[Array, "v d"], ids: Int[Array, "b t"], dtype: jnp.dtype) -> Array:
    ids = jax.lax.all_gather(ids, COLUMNS, axis=0, tiled=True)
    ids = ids - jax.lax.axis_index(ROWS) * table.shape[0]
    held = (ids >= 0) & (ids < table.shape[0])
    found = jnp.where(held[..., None], table[jnp.where(held, ids, 0)], 0).astype(dtype)
    whole = jax.lax.all_to_all(found, COLUMNS, split_axis=0, concat_axis=2, tiled=True)
    return jax.lax.psum(whole, ROWS)
