"""The arrays of a state by name: what a checkpoint keeps, and how it must fit what is wanted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from l32jax.errors import InputError


def named(tree: Any) -> dict[str, Any]:
    """Leaves by name, like params/decoder/groups/blocks/0/mlp_gate, in the order of flattening.

    Orbax gets this instead of the tree: integer keys, named tuples and None then need no care.
    """
    leaves = jax.tree.leaves_with_path(tree)
    by_name = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves
    }
    assert len(by_name) == len(leaves), "two leaves have one name"
    return by_name


def require_equal(wanted: Mapping[str, Any], saved: Mapping[str, Any], where: str | Path) -> None:
    """InputError unless names, shapes and dtypes agree: Orbax casts dtypes without a word."""
    differing = [
        f"{name} (saved as {_type(saved[name])}, needed as {_type(leaf)})"
        for name, leaf in wanted.items()
        if name in saved and _type(saved[name]) != _type(leaf)
    ]
    for complaint, names in (
        ("the checkpoint lacks", [name for name in wanted if name not in saved]),
        ("the checkpoint has, but not the model,", [name for name in saved if name not in wanted]),
        ("the types differ of", differing),
    ):
        if names:
            few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise InputError(
                f"arrays in {where}: {complaint} {few}; use the config that it was saved with"
            )


def _type(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
