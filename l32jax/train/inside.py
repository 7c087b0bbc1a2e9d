"""Numbers from inside a model in training: gates, gradients by part, what attention looks at."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from l32jax.config import DecoderConfig, LlamaConfig
from l32jax.data.batches import own_rows
from l32jax.kernels.context import row_order
from l32jax.model.inspect import Looks, likeliest, look
from l32jax.model.llama import Batch, bind, forward_batch
from l32jax.model.parameters import Params, flatten, part_of
from l32jax.run_config import TrainConfig
from l32jax.sharding import CONTEXT_AXIS, activation_spec

PLACES = 64  # tokens of a row that are looked at


def part_norms(grads: Params, config: LlamaConfig) -> dict[str, Float[Array, ""]]:
    """The norm of the gradients of each part that trains, by "grad_norm/<part>"."""
    parts: dict[str, list[Array]] = {}
    for path, leaf in flatten(grads).items():
        parts.setdefault(part_of(path, config), []).append(leaf)
    return {f"grad_norm/{part}": optax.tree.norm(leaves) for part, leaves in parts.items()}


@jax.jit
def gates(params: Params) -> dict[str, Array]:
    """The factors of the gated branches, tanh applied: [groups] by the path of the parameter."""
    blocks = "decoder/groups/blocks/"
    return {
        path.removeprefix(blocks): jnp.tanh(leaf)
        for path, leaf in flatten(params).items()
        if path.startswith(blocks) and path.endswith("_gate")
    }


def gate_scalars(found: Mapping[str, np.ndarray], config: DecoderConfig) -> dict[str, float]:
    """ "inside/attention_gate/3" and so on, by the layer in Hugging Face's flat numbering."""
    scalars = {}
    for path, values in found.items():
        slot, name = path.split("/")
        for group, value in enumerate(values):
            scalars[f"inside/{name}/{group * len(config.group_pattern) + int(slot)}"] = float(value)
    return dict(sorted(scalars.items(), key=_by_layer))


def look_scalars(looks: Looks, config: DecoderConfig) -> dict[str, float]:
    """Those of every cross layer, but the gates, and what is not a number."""
    pattern = config.group_pattern * config.num_groups
    layers = [layer for layer, kind in enumerate(pattern) if kind == "cross"]
    return {
        f"inside/{name}/{layer}": float(value)
        for name, values in looks._asdict().items()
        if not name.endswith("_gate")
        for layer, value in zip(layers, values, strict=True)
        if np.isfinite(value)
    }


def _by_layer(item: tuple[str, float]) -> tuple[str, int]:
    name, _, layer = item[0].rpartition("/")
    return name, int(layer)


class Found(NamedTuple):
    """What a probe sees: None of `looks` without images; the likeliest token after each place."""

    looks: Looks | None
    likeliest: Int[np.ndarray, "b q"]


Probe = Callable[[Params, Batch, np.ndarray, np.ndarray], Found]


def make_probe(config: TrainConfig, mesh: Mesh) -> Probe:
    """(parameters, batch on the devices, places, places) -> what is found; one forward pass.

    Places are positions in the rows of this process, [b PLACES], negative for none: those whose
    attention is looked at, and those after which the model is to go on. Every process calls it at
    the same step. It needs the memory of a forward pass of the whole batch.
    """
    options: dict[str, Any] = {"attention": config.attention, "dtype": jnp.dtype(config.dtype)}

    @jax.jit
    def run(params: Params, batch: Batch, looked: Array, asked: Array):
        model = bind(config.model, params)
        if "aspect" in batch:
            looks, states = look(model, batch, looked, **options)
        else:
            looks, states = None, forward_batch(model, batch, **options).states
        answers = likeliest(model, states, asked)
        return looks, jax.sharding.reshard(answers, activation_spec("b"))

    def probe(params, batch, looked, asked):
        places = [_placed(each, batch["tokens"].shape[1], mesh) for each in (looked, asked)]
        looks, answers = run(params, batch, *places)
        return Found(jax.device_get(looks), own_rows(answers))

    return probe


def _placed(places: np.ndarray, length: int, mesh: Mesh) -> Array:
    """On the devices, and counted as `data.batches.place` stores rows."""
    if (num_shards := mesh.shape[CONTEXT_AXIS]) > 1:
        stored = row_order(length, num_shards).astype(np.int32)
        places = np.where(places >= 0, stored[places], -1)
    spec = PartitionSpec(*activation_spec("b"))
    return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), places)
