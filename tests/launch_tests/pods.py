"""A stand-in for Kubernetes: starts the containers of a JobSet as processes of this machine.

They get the command and the environment that the cluster would give them. Names in the cluster's
DNS become this machine, and mounted volumes folders; nothing else is changed.
"""

import os
import string
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]


class Pod(NamedTuple):
    name: str
    command: list[str]
    environ: dict[str, str]


def read(path: Path, values: dict[str, str]) -> dict[str, Any]:
    """A manifest as `envsubst` and Kubernetes read it; a variable without a value is an error."""
    return yaml.safe_load(string.Template(path.read_text()).substitute(values))


def pods(jobset: dict[str, Any], volumes: dict[str, Path]) -> list[Pod]:
    """Of all jobs, in order; `volumes` are folders by the path at which containers see them."""
    placed = [
        (job, index, pod)
        for job in jobset["spec"]["replicatedJobs"]
        for index in range(job["replicas"])
        for pod in range(job["template"]["spec"]["completions"])
    ]
    names = [f"{jobset['metadata']['name']}-{job['name']}-{i}-{pod}" for job, i, pod in placed]
    here = {f"{name}.{jobset['metadata']['name']}": "127.0.0.1" for name in names}
    here |= {path: str(folder) for path, folder in volumes.items()}

    def local(text: str) -> str:
        for there, place in here.items():
            text = text.replace(there, place)
        return text

    made = []
    for name, (job, index, pod) in zip(names, placed, strict=True):
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        environ = {each["name"]: _value(each, name) for each in container["env"]}
        environ["JOB_COMPLETION_INDEX"] = str(pod)
        if "google.com/tpu" in container["resources"]["limits"]:
            environ |= _of_tpu(jobset, job, index, pod)
        command = [local(word) for word in container["command"]]
        made.append(Pod(name, command, {key: local(value) for key, value in environ.items()}))
    return made


def start(pod: Pod, log: Path) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = os.environ | pod.environ | {"PATH": path, "JAX_PLATFORMS": "cpu"}
    with log.open("a") as file:
        return subprocess.Popen(pod.command, env=environ, cwd=ROOT, stdout=file, stderr=file)


def _value(variable: dict[str, Any], pod: str) -> str:
    if "value" in variable:
        return variable["value"]
    assert variable["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
    return f"host-of-{pod}"


def _of_tpu(jobset: dict[str, Any], job: dict[str, Any], index: int, pod: int) -> dict[str, str]:
    """What GKE adds to containers with TPUs."""
    name = jobset["metadata"]["name"]
    count = job["template"]["spec"]["completions"]
    hosts = [f"{name}-{job['name']}-{index}-{each}.{name}" for each in range(count)]
    environ = {"TPU_WORKER_ID": str(pod), "TPU_WORKER_HOSTNAMES": ",".join(hosts)}
    if job["replicas"] > 1:
        environ |= {
            "MEGASCALE_NUM_SLICES": str(job["replicas"]),
            "MEGASCALE_SLICE_ID": str(index),
            "MEGASCALE_COORDINATOR_ADDRESS": f"{name}-{job['name']}-0-0.{name}",
        }
    return environ
