"""Llama 3.2 in JAX: `l32jax.load(path or preset)` is the way in."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from l32jax.api import Model, load

__all__ = ["Model", "load"]


def __getattr__(name: str):
    # The command line answers `--help` without importing jax.
    if name in __all__:
        from l32jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'l32jax' has no attribute {name!r}")
