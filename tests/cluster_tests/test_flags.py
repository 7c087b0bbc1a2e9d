"""Flags reach the environment once, never against what is set there, and XLA knows them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from l32jax.cluster import flags
from l32jax.cluster.flags import FLAGS, platform, set_flags

DOCUMENT = (Path(__file__).parents[2] / "docs" / "launch.md").read_text()
NAMES = re.compile(r"L32JAX_[A-Z]+(?:_[A-Z]+)*")
XLA_FLAGS = [s.flag for table in FLAGS.values() for s in table if s.variable == "XLA_FLAGS"]


def test_flags_are_added_once_and_what_is_set_stays():
    mine = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=there"
    environ = {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": mine, "NCCL_DEBUG": "INFO"}
    set_flags(environ)
    assert environ["XLA_FLAGS"].startswith(mine + " --xla_gpu_first_collective")
    assert environ["NCCL_DEBUG"] == "INFO"
    again = dict(environ)
    set_flags(again)
    assert again == environ


def test_other_platforms_get_no_flags_for_gpus():
    tpu, cpu = {"JAX_PLATFORMS": "tpu"}, {"JAX_PLATFORMS": "cpu"}
    set_flags(tpu)
    assert tpu == {"JAX_PLATFORMS": "tpu"}
    set_flags(cpu)
    assert cpu.keys() == {"JAX_PLATFORMS", "XLA_FLAGS"} and "gpu" not in cpu["XLA_FLAGS"]


@pytest.mark.parametrize(
    ("asked", "found"), [("cuda,cpu", "gpu"), ("rocm", "gpu"), ("tpu", "tpu"), ("cpu", "cpu")]
)
def test_the_platform_is_what_jax_is_told(asked, found):
    assert platform({"JAX_PLATFORMS": asked}) == found


def starts_with(flags: str) -> int:
    """XLA ends a process that has a flag it does not know."""
    return subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        timeout=120,
    ).returncode


def test_xla_knows_the_flags():
    assert XLA_FLAGS
    assert starts_with(" ".join(XLA_FLAGS)) == 0
    assert starts_with("--xla_gpu_no_such_flag=true") != 0


def test_the_documentation_has_the_table():
    rows = re.findall(r"(?m)^\| (?:gpu|tpu|cpu) \|.*$", DOCUMENT)
    assert rows == [
        f"| {name} | `{setting.variable}` | `{setting.flag}` | {setting.why} |"
        for name, table in FLAGS.items()
        for setting in table
    ]


def test_the_documentation_has_our_variables():
    package = Path(flags.__file__).parent
    ours = {name for path in package.glob("*.py") for name in NAMES.findall(path.read_text())}
    (table,) = re.findall(r"(?s)\| our variables \|.*?\n\n", DOCUMENT)
    assert ours == set(NAMES.findall(table))
