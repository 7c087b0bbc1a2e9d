"""Whether Kubernetes would take a JobSet: its own part by the models of Kubeflow's client, each job
in it by the strict schema of Kubernetes."""

from typing import Any

import kubernetes_validate
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

KUBERNETES = "1.34"


def require_valid(jobset: dict[str, Any]) -> None:
    """Raises ValueError (or one of the schemas' errors) at a wrong type or an unknown field."""
    model = JobsetV1alpha2JobSet.from_dict(jobset)
    assert model is not None
    for found in lost(jobset, model.to_dict()):
        raise ValueError(f"{found}: no such field of a JobSet")
    for job in jobset["spec"]["replicatedJobs"]:
        resource = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": job["name"]} | job["template"].get("metadata", {}),
            "spec": job["template"]["spec"],
        }
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)


def lost(given: Any, kept: Any, path: str = "") -> list[str]:
    """The paths of what a model did not keep: it drops fields that it does not know."""
    if isinstance(given, dict) and isinstance(kept, dict):
        gone = [f"{path}.{key}" for key in given if key not in kept]
        pairs = [(key, given[key], kept[key]) for key in given if key in kept]
    elif isinstance(given, list) and isinstance(kept, list):
        gone = [] if len(given) == len(kept) else [path]
        pairs = [(str(n), a, b) for n, (a, b) in enumerate(zip(given, kept, strict=False))]
    else:
        return []
    return gone + [found for key, a, b in pairs for found in lost(a, b, f"{path}.{key}")]
