"""What xpk makes of launch/gke/xpk.sh, which is kept as a file and held to the schemas.

`tests/environments/run.sh xpk` asks xpk, in an environment of its own, which has no JAX.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/launch_tests/xpk_jobset.yaml"
GIVEN = {
    "NAME": "twin",
    "CLUSTER": "pods",
    "PROJECT": "project",
    "ZONE": "us-east5-a",
    "IMAGE": "registry.invalid/l32jax:1",
    "TYPE": "v5p-32",
    "SLICES": "2",
    "XPK_OPTIONS": "--dry-run --skip-validation",
}
COMMAND = ("configs/vision_11b.py", "stages.0.num_steps=100", "directory=/shared/a run")


@pytest.mark.skipif(shutil.which("xpk") is None, reason="xpk is in an environment of its own")
@pytest.mark.timeout(600)
def test_xpk_makes_of_the_script_what_is_on_file(tmp_path):
    told = subprocess.run(
        [ROOT / "launch/gke/xpk.sh", *COMMAND],
        env=os.environ | GIVEN | {"HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    (found,) = re.findall(r"(?ms)^apiVersion: jobset.*?(?=^\[XPK\])", told)
    lines = (line.rstrip() for line in found.splitlines())
    found = "\n".join(line for line in lines if line) + "\n"
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(found)
    assert found == GOLDEN.read_text()


def test_the_jobset_of_xpk_is_valid():
    schema = pytest.importorskip("tests.launch_tests.schema", reason="xpk's environment has none")
    schema.require_valid(without_nothings(yaml.safe_load(GOLDEN.read_text())))


def test_the_jobset_of_xpk_runs_the_command_and_starts_again_as_we_say():
    jobset = yaml.safe_load(GOLDEN.read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    ends = rule["onExitCodes"]
    assert (rule["action"], ends["operator"]) == ("FailJob", "NotIn")
    assert {1, 75, 137} <= set(ends["values"]) and 2 not in ends["values"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 300
    command = "l32jax train configs/vision_11b.py stages.0.num_steps=100 directory=/shared/a\\ run"
    assert f"({command})" in pod["containers"][0]["command"][-1]


def without_nothings(value):
    """Without keys that xpk writes and gives no value: Kubernetes ignores them."""
    if isinstance(value, dict):
        return {key: without_nothings(each) for key, each in value.items() if each is not None}
    return [without_nothings(each) for each in value] if isinstance(value, list) else value
