"""What launchers tell a process of its run: how many processes there are, which this is, and where.

docs/launch.md has the table. Everything is read from the environment, but on a TPU VM, where the
machine's metadata say it.
"""

import glob
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from l32jax.errors import InputError

PORT = 8476  # of process 0, where the launcher leaves the choice
FIRST_PORT, NUM_PORTS = 61440, 4096  # above those that Linux gives out; by the number of a job

Environ = Mapping[str, str]


class Cluster(NamedTuple):
    """The processes of a run as one of them is told of them.

    Attributes:
      launcher: who told.
      coordinator: host:port at which process 0 is found; empty if not told.
      hosts: name or address of each process's host, or none at all if not told.
      local_device: the number of the one accelerator that is this process's; None for all it sees.
    """

    launcher: str
    num_processes: int
    process: int
    coordinator: str = ""
    hosts: tuple[str, ...] = ()
    local_device: int | None = None


def find(environ: Environ) -> Cluster | None:
    """The cluster that the environment tells of; None for a process on its own.

    Raises:
      InputError: it tells half of it, or what cannot be.
    """
    told = (launcher(environ) for launcher in LAUNCHERS)
    cluster = next((each for each in told if each), None)
    ours = _variable(environ, "L32JAX_COORDINATOR")
    if cluster is None:
        if ours:
            raise InputError(
                "L32JAX_COORDINATOR in the environment: nothing says how many processes there are; "
                "set L32JAX_NUM_PROCESSES and L32JAX_PROCESS_ID too"
            )
        return None
    if not 0 <= cluster.process < cluster.num_processes:
        raise InputError(
            f"process {cluster.process} of {cluster.num_processes} by {cluster.launcher}: "
            "processes count from 0; correct the environment"
        )
    return None if cluster.num_processes == 1 else _with_coordinator(cluster, environ, ours)


def _with_coordinator(cluster: Cluster, environ: Environ, ours: str) -> Cluster:
    address = ours or _variable(environ, "JAX_COORDINATOR_ADDRESS") or cluster.coordinator
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(
            f"coordinator {address!r} of {cluster.num_processes} processes by {cluster.launcher}: "
            "not host:port; set L32JAX_COORDINATOR to a port of the host of process 0"
        )
    return cluster._replace(coordinator=address)


def explicit(environ: Environ) -> Cluster | None:
    names = ("L32JAX_NUM_PROCESSES", "L32JAX_PROCESS_ID")
    values = [_number(environ, name) for name in names]
    if values == [None, None]:
        return None
    for name, value in zip(names, values, strict=True):
        if value is None:
            raise InputError(f"{name} in the environment: missing beside its twin; set both")
    return Cluster("L32JAX_*", values[0] or 0, values[1] or 0)


def node_rank(environ: Environ) -> Cluster | None:
    """What JAX's GPU containers and our JobSet set; Kubernetes itself gives the last name."""
    number = _number(environ, "NNODES")
    if number is None or not _variable(environ, "JAX_COORDINATOR_ADDRESS"):
        return None
    for name in ("NODE_RANK", "JOB_COMPLETION_INDEX"):
        if (rank := _number(environ, name)) is not None:
            return Cluster("NNODES", number, rank)
    return None


def skypilot(environ: Environ) -> Cluster | None:
    rank = _number(environ, "SKYPILOT_NODE_RANK")
    hosts = tuple(_variable(environ, "SKYPILOT_NODE_IPS").split())
    if rank is None or not hosts:
        return None
    return Cluster("SkyPilot", len(hosts), rank, _at(hosts[0]), hosts)


def slurm(environ: Environ) -> Cluster | None:
    """A task of a step: `srun` starts those. A batch script alone is on its own."""
    number, rank = _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_PROCID")
    nodes = tuple(_node_names(_variable(environ, "SLURM_STEP_NODELIST")))
    if number is None or rank is None or not nodes:
        return None
    tasks = _tasks_per_node(_variable(environ, "SLURM_STEP_TASKS_PER_NODE")) or [1] * len(nodes)
    hosts = tuple(node for node, count in zip(nodes, tasks, strict=False) for _ in range(count))
    # Tasks can be dealt out to nodes in another order; only that of blocks is known here.
    dealt = _variable(environ, "SLURM_DISTRIBUTION") or "block"
    in_blocks = dealt.startswith("block") and len(hosts) == number
    job, step = _number(environ, "SLURM_JOB_ID") or 0, _number(environ, "SLURM_STEP_ID") or 0
    port = FIRST_PORT + (job + 769 * step) % NUM_PORTS  # two steps of a job differ
    return Cluster(
        "Slurm",
        number,
        rank,
        _at(nodes[0], port),
        hosts if in_blocks else (),
        _one_device(environ, "SLURM_LOCALID", shared=max(tasks) > 1),
    )


def open_mpi(environ: Environ) -> Cluster | None:
    """Version 4 says where mpirun runs, beside process 0; later ones need L32JAX_COORDINATOR."""
    number = _number(environ, "OMPI_COMM_WORLD_SIZE")
    rank = _number(environ, "OMPI_COMM_WORLD_RANK")
    if number is None or rank is None:
        return None
    uri = _variable(environ, "OMPI_MCA_orte_hnp_uri")
    where = re.search(r"^(\d+).*?tcp6?://\[?([^\],;]+?)(?:[\],;]|:\d+(?:;|$)|$)", uri)
    port = FIRST_PORT + int(where[1]) // 4096 % NUM_PORTS if where else 0
    shared = (_number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1) > 1
    return Cluster(
        "Open MPI",
        number,
        rank,
        _at(where[2], port) if where else "",
        local_device=_one_device(environ, "OMPI_COMM_WORLD_LOCAL_RANK", shared=shared),
    )


def tpu_pod(environ: Environ) -> Cluster | None:
    """GKE gives every TPU container the names of its slice, in the order of their numbers."""
    path = _variable(environ, "TPU_PROCESS_ADDRESSES_PATH")  # of a file, where they are very many
    texts = [Path(path).read_text().strip()] if path else []
    texts += [
        _variable(environ, f"TPU_{name}") for name in ("PROCESS_ADDRESSES", "WORKER_HOSTNAMES")
    ]
    names = next((text for text in texts if text), "")
    rank = _number(environ, "TPU_WORKER_ID")
    if not names or rank is None:
        return None
    hosts = [name.split(":")[0] for name in names.split(",")]
    return _of_slices("GKE TPU", hosts, rank, lambda key: environ.get(key, ""))


def tpu_vm(environ: Environ) -> Cluster | None:
    """Asks the machine's metadata, where there is a TPU and they are not said to be missing."""
    if not has_tpu() or "TPU_SKIP_MDS_QUERY" in environ:
        return None
    server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    rank, workers = (
        _metadata(server, key) for key in ("agent-worker-number", "worker-network-endpoints")
    )
    if not rank.isdecimal() or not workers:
        return None
    hosts = [worker.split(":")[-1] for worker in workers.split(",")]  # "host", or "name:id:host"
    lines = re.findall(r"(?m)^(\w+)\s*:\s*'?([^'\n]*)'?\s*$", _metadata(server, "tpu-env"))
    return _of_slices(
        "TPU VM", hosts, int(rank), lambda key: environ.get(key, dict(lines).get(key))
    )


LAUNCHERS = (explicit, node_rank, skypilot, slurm, open_mpi, tpu_pod, tpu_vm)


def has_tpu() -> bool:
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def _of_slices(
    launcher: str, hosts: list[str], rank: int, value: Callable[[str], str | None]
) -> Cluster:
    """Processes count through the first slice, then the second; only the own one's are named."""
    facts = {key: value(f"MEGASCALE_{key}") or "" for key in ("NUM_SLICES", "SLICE_ID")}
    slices, index = (_number(facts, key) for key in facts)
    first = (value("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    return Cluster(
        launcher,
        len(hosts) * (slices or 1),
        rank + len(hosts) * (index or 0),
        _at(first),
        tuple(hosts) if (slices or 1) == 1 else (),
    )


def _metadata(server: str, key: str) -> str:
    address = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as answer:
            return answer.read().decode().strip()
    except (urllib.error.URLError, OSError):
        return ""


def _one_device(environ: Environ, rank: str, *, shared: bool) -> int | None:
    """The accelerator of a process that shares its host, unless it was given only one to see."""
    if not shared or "," not in environ.get("CUDA_VISIBLE_DEVICES", ","):
        return None
    return _number(environ, rank)


def _at(host: str, port: int = PORT) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _variable(environ: Environ, name: str) -> str:
    return environ.get(name, "").strip()


def _number(environ: Environ, name: str) -> int | None:
    text = _variable(environ, name)
    if text and not text.isdecimal():
        raise InputError(f"{name}={text!r} in the environment: not a whole number; correct it")
    return int(text) if text else None


def _node_names(nodes: str) -> Iterator[str]:
    """Of n[01-03,7],m: n01 n02 n03 n7 m, as Slurm writes lists; none if it writes otherwise."""
    for prefix, ranges, suffix in re.findall(r"([^,\[\]]+)(?:\[([\d,-]+)\])?([^,\[\]]*)", nodes):
        for part in ranges.split(",") if ranges else [""]:
            first, _, last = part.partition("-")
            if not first:
                yield prefix + suffix
                continue
            for number in range(int(first), int(last or first) + 1):
                yield f"{prefix}{number:0{len(first)}}{suffix}"


def _tasks_per_node(text: str) -> list[int]:
    """Of 2(x3),1: 2 2 2 1."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in parts for _ in range(int(times or 1))]
