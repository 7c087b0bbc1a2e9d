"""Parameters as a plain nested dict: their names, their parts, their number."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from qwix import QArray

from l32jax.config import LlamaConfig, Part

Params = Any


def path_name(path: tuple) -> str:
    """decoder/groups/blocks/0/attention/query/weight"""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(params: Params) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def is_stacked(path: str) -> bool:
    """Whether a parameter has one entry a layer, on its first axis."""
    return any(name.endswith("blocks") for name in path.split("/"))


def is_quantised(leaf: Any) -> bool:
    return isinstance(leaf, QArray)


def is_lora(path: str) -> bool:
    return path.endswith(("/lora_a", "/lora_b"))


def part_of(path: str, config: LlamaConfig) -> Part:
    """Which of the parts, that are frozen and trained as a whole, a parameter belongs to.

    The adapter is what turns a language model into a vision model beside the image encoder:
    cross-attention blocks with their gates, the projector and the image token's embedding. LoRA is
    a part of its own, wherever it is.
    """
    if is_lora(path):
        return "lora"
    if path.startswith("vision/"):
        return "vision_tower"
    if path.startswith(("projector/", "decoder/image_embedding/")):
        return "adapter"
    if path.startswith("decoder/reward_head/"):
        return "reward_head"
    groups = "decoder/groups/blocks/"
    if path.startswith(groups):
        slot = int(path.removeprefix(groups).split("/", 1)[0])
        return "adapter" if config.decoder.group_pattern[slot] == "cross" else "language_model"
    return "language_model"


def trains(parts: Iterable[Part], config: LlamaConfig) -> Callable[[str], bool]:
    """The path filter that is true of the given parts."""
    chosen = frozenset(parts)
    return lambda path: part_of(path, config) in chosen


def partition(params: Params, is_trainable: Callable[[str], bool]) -> tuple[Params, Params]:
    """Splits into (trainable, frozen), each with None where the other has the leaf.

    A quantised weight is one leaf.
    """

    def chosen(keep: bool) -> Params:
        return jax.tree.map_with_path(
            lambda path, leaf: leaf if is_trainable(path_name(path)) == keep else None,
            params,
            is_leaf=is_quantised,
        )

    return chosen(True), chosen(False)


def combine(trainable: Params, frozen: Params) -> Params:
    return jax.tree.map(
        lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None
    )


def count(params: Params) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def on_mesh(abstract: Params, mesh: Mesh) -> Params:
    """Names the devices in the shardings of `eval_shape`, which knows only an abstract mesh.

    Leaves without a sharding (constants, such as norms at their start) are replicated.
    """

    def place(leaf):
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, abstract)
