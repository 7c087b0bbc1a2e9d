"""Every annotation is executed, and eight CPU devices stand in for a pod."""

import gc
import os
import pathlib
import resource

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices share two cores, which other tests need too: by default XLA gives up after 40 s.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_collective_call_terminate_timeout_seconds=600")

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("l32jax", "beartype.beartype")

CACHE = pathlib.Path(__file__).parents[1] / ".jax_cache"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Some examples compile, and machines are slow in their own ways: time is no property of the code.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")

MOST_BYTES = 4 * 2**30  # of a test worker

# Their programs run for moments and compile for long, in processes of their own too.
QUICKLY_COMPILED = {
    "align_tests", "compress_tests", "model_tests", "train_tests", "launch_tests",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture. Half as long; what programs compute differs in the last bits only."""
    quickly = item.path.parent.name in QUICKLY_COMPILED and item.path.stem != "test_long_rows"
    jax.config.update("jax_disable_most_optimizations", quickly)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quickly))


@pytest.fixture(scope="module", autouse=True)
def programs_let_go():
    """A process keeps all that it has compiled: by the end of the tests more than 8 GB."""
    yield
    if _resident_bytes() > MOST_BYTES:
        jax.clear_caches()
        gc.collect()


def _resident_bytes() -> int:
    """Of this process; 0 where the system does not say."""
    pages = pathlib.Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * resource.getpagesize() if pages.exists() else 0


@pytest.fixture(scope="module")
def one_device():
    """Runs of the module have one device, though there are eight."""
    from l32jax.sharding import single_device_mesh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("l32jax.api.make_mesh", lambda _: single_device_mesh())
        yield
