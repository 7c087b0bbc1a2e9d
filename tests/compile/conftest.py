"""The TPU compiler is the real one; no chip is there, so it must not ask for one."""

import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")


@pytest.fixture(autouse=True, scope="module")
def without_cache():
    """Programs for absent chips are written to JAX's cache but cannot be read from it."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
