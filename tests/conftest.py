"""Every annotation is executed, and eight CPU devices stand in for a pod."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
from jaxtyping import install_import_hook

install_import_hook("l32jax", "beartype.beartype")

CACHE = pathlib.Path(__file__).parents[1] / ".jax_cache"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Some examples compile, and machines are slow in their own ways: time is no property of the code.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")
