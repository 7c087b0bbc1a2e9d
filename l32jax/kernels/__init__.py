"""Attention by key intervals: `attention`, and what goes with it."""

from l32jax.kernels.dispatch import (
    SAVED_NAMES,
    attention,
    attention_and_lse,
    cached_attention,
    laid_out_as_read,
    make_plan,
)

__all__ = [
    "SAVED_NAMES",
    "attention",
    "attention_and_lse",
    "cached_attention",
    "laid_out_as_read",
    "make_plan",
]
