"""Kubernetes' files: valid, complete in their first lines, and their containers find each other."""

import copy
import re
import signal
import time
from pathlib import Path

import kubernetes_validate
import pytest

from l32jax.cluster import find
from tests.cluster_tests.test_roll_call import free_port
from tests.launch_tests import pods
from tests.launch_tests.runs import NUM_STEPS, losses, write_run
from tests.launch_tests.schema import require_valid

GKE = pods.ROOT / "launch/gke"
MANIFESTS = sorted(GKE.glob("*.yaml"))
VALUES = {
    "NAME": "twin",
    "IMAGE": "registry.invalid/l32jax:1",
    "NODES": "2",
    "SLICES": "3",
    "GPUS": "8",
    "CHIPS": "4",
    "CLAIM": "shared",
    "CONFIG": "/shared/config.py",
    "ACCELERATOR": "tpu-v5p-slice",
    "TOPOLOGY": "2x2x2",
}
TIMEOUT = 900


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_valid(path):
    require_valid(pods.read(path, VALUES))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_the_first_lines_of_a_manifest_name_all_that_it_is_to_be_given(path):
    text = path.read_text()
    given = re.findall(r"\b([A-Z]+)=", "".join(re.findall(r"(?m)^#.*\n", text)))
    assert sorted(set(re.findall(r"\$\{(\w+)\}", text))) == sorted(given)


def broken(*path: str | int, **changes) -> dict:
    jobset = copy.deepcopy(pods.read(GKE / "jobset_gpu.yaml", VALUES))
    place = jobset["spec"]
    for key in path:
        place = place[key]
    place.update(changes)
    return jobset


JOB = ("replicatedJobs", 0, "template", "spec")


@pytest.mark.parametrize(
    "jobset",
    [
        broken("failurePolicy", maxRestart=1),
        broken("failurePolicy", maxRestarts="many"),
        broken(*JOB, backofLimit=0),
        broken(*JOB, "template", "spec", restartPolicy=3),
    ],
    ids=["unknown", "type", "unknown_of_job", "type_of_pod"],
)
def test_what_is_not_valid_is_seen(jobset):
    with pytest.raises((ValueError, kubernetes_validate.ValidationError)):
        require_valid(jobset)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_containers_of_a_manifest_find_each_other(path, tmp_path):
    made = pods.pods(pods.read(path, VALUES), {"/shared": tmp_path})
    clusters = [find(pod.environ) for pod in made]
    assert [each.process for each in clusters] == list(range(len(made)))
    assert {each.num_processes for each in clusters} == {len(made)}
    assert {each.coordinator for each in clusters} == {"127.0.0.1:8476"}
    assert {pod.environ["L32JAX_HOST"] for pod in made} == {f"host-of-{pod.name}" for pod in made}


@pytest.mark.slow
@pytest.mark.timeout(2 * TIMEOUT)
def test_containers_train_and_go_on_after_one_is_preempted(tmp_path):
    """As JobSet does it: a pod that fails ends the rest, and all are started again."""
    write_run(tmp_path)
    made = pods.pods(pods.read(GKE / "jobset_gpu.yaml", VALUES), {"/shared": tmp_path})
    port = f":{free_port()}"  # 8476 is the pod's own; this machine is not
    for pod in made:
        pod.environ["JAX_COORDINATOR_ADDRESS"] = pod.environ["JAX_COORDINATOR_ADDRESS"].replace(
            ":8476", port
        )
    run, log = tmp_path / "runs" / "twin", tmp_path / "log.txt"
    started = [pods.start(pod, log) for pod in made]
    try:
        deadline = time.monotonic() + TIMEOUT
        while len(losses(run)) < 5:
            assert time.monotonic() < deadline and started[0].poll() is None, text(log)
            time.sleep(0.02)
        started[1].send_signal(signal.SIGTERM)
        assert [process.wait(TIMEOUT) for process in started] == [75, 75], text(log)
        assert len(losses(run)) < NUM_STEPS
        started += (again := [pods.start(pod, log) for pod in made])
        assert [process.wait(TIMEOUT) for process in again] == [0, 0], text(log)
    finally:
        for process in started:
            process.kill()
    assert sorted(losses(run)) == list(range(1, NUM_STEPS + 1))
    line = "l32jax: 2 processes by NNODES: 0=host-of-twin-node-0-0 1=host-of-twin-node-0-1\n"
    assert log.read_text().count(line) == 2


def text(log: Path) -> str:
    return log.read_text()[-3000:]
