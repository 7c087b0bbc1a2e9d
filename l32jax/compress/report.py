"""What pruning did, as people read it and as JSON."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from l32jax.compress.prune import Pruned, Step
from l32jax.config import LlamaConfig

LISTED = 8  # layers that are named, of those that went


def table(before: LlamaConfig, pruned: Pruned) -> Table:
    """A line a part: what went, and what the model is after it."""
    found = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    found.add_column("part", no_wrap=True)
    found.add_column("what went")
    for title in ("parameters", "perplexity"):
        found.add_column(title, justify="right", no_wrap=True)
    for step in pruned.steps:
        what = _what_went(step, before, pruned.config)
        found.add_row(step.name, what, f"{step.parameters:,}", f"{step.perplexity:,.2f}")
    return found


def _what_went(step: Step, before: LlamaConfig, after: LlamaConfig) -> str:
    old, new = before.decoder, after.decoder
    match step.name:
        case "depth":
            unit = (
                "layers" if len(old.group_pattern) == 1 else f"groups of {len(old.group_pattern)}"
            )
            gone = sorted(set(range(old.num_groups)) - set(step.chosen["groups"].tolist()))
            named = ", ".join(map(str, gone[:LISTED])) + ", …" * (len(gone) > LISTED)
            return f"{len(gone)} of {old.num_groups} {unit}: {named}"
        case "heads":
            gone = f"{old.num_heads - new.num_heads} of {old.num_heads} heads a layer"
            kv = old.num_kv_heads - new.num_kv_heads
            return gone + (f", {kv} of {old.num_kv_heads} key/value heads" if kv else "")
        case "head dims":
            return f"{old.head_dim - new.head_dim} of {old.head_dim} dims a head"
        case "FFN":
            return f"{old.mlp_dim - new.mlp_dim:,} of {old.mlp_dim:,} neurons a layer"
        case "embedding":
            return f"{old.embed_dim - new.embed_dim:,} of {old.embed_dim:,} channels"
        case "tie":
            return f"a table: what stays is the {step.chosen['table']}"
    return ""


def as_json(pruned: Pruned, about: Mapping[str, Any]) -> str:
    """Which indices stay in each part, counted in the model that the part was given."""
    steps = [
        {
            "part": step.name,
            "parameters": step.parameters,
            "perplexity": step.perplexity,
            "kept": _plain(step.chosen),
        }
        for step in pruned.steps
    ]
    return json.dumps(
        {**about, "model": dataclasses.asdict(pruned.config), "steps": steps}, indent=1
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value
