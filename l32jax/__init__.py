"""Llama 3.2 in JAX: `l32jax.load(path or preset)` is the way in, `save` and `convert` out."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from l32jax.api import Model, load
    from l32jax.conversion.convert import convert, save

__all__ = ["Model", "convert", "load", "save"]


def __getattr__(name: str):
    # The command line answers `--help` without importing jax.
    if name in ("Model", "load"):
        from l32jax import api

        return getattr(api, name)
    if name in ("convert", "save"):
        from l32jax.conversion import convert

        return getattr(convert, name)
    raise AttributeError(f"module 'l32jax' has no attribute {name!r}")
