"""Joining the cluster: the one way in, on every kind of cluster."""

import os
import socket
import sys
from collections.abc import Mapping, Sequence

from l32jax.cluster.flags import platform, set_flags
from l32jax.cluster.launchers import Cluster, find
from l32jax.cluster.roll_call import roll_call
from l32jax.errors import InputError

START_SECONDS = 300.0  # for all processes to come
HEARTBEAT_SECONDS = 30  # a process that was silent for so long counts as dead
CONNECT_SECONDS = 60  # for JAX to connect those that have come
HOST_NAMES = ("L32JAX_HOST", "SLURMD_NODENAME")  # of nodes, which containers do not know otherwise
PROXY_EXEMPTION = "no_grpc_proxy"  # a proxy for the web, where one is set, knows no hosts of ours

_hosts: tuple[str, ...] = ()


def join(
    environ: Mapping[str, str] = os.environ, *, heartbeat_seconds: int = HEARTBEAT_SECONDS
) -> None:
    """Connects this process with the others of its run; on its own, it does nothing.

    Called once, before JAX sees its devices. Process 0 prints on stderr who runs where.

    Args:
      heartbeat_seconds: silence after which JAX takes a process for dead and ends the others.
    Raises:
      InputError: the environment tells half, or what cannot be.
      PeerMissing: a process did not come in time; every one that came says which.
    """
    global _hosts
    set_flags(os.environ)
    cluster = find(environ)
    if cluster is None:
        return
    _hosts = roll_call(cluster, _own_name(environ), _start_seconds(environ))
    _connect(cluster, heartbeat_seconds)
    if cluster.process == 0:
        places = " ".join(f"{number}={host}" for number, host in enumerate(_hosts))
        print(
            f"l32jax: {len(_hosts)} processes by {cluster.launcher}: {places}",
            file=sys.stderr,
            flush=True,
        )


def hosts() -> Sequence[str]:
    """The name of each process's host, by the number of the process in JAX."""
    return _hosts or (_own_name(os.environ),)


def _own_name(environ: Mapping[str, str]) -> str:
    given = (environ.get(name) for name in HOST_NAMES)
    return next((name for name in given if name), socket.gethostname())


def _connect(cluster: Cluster, heartbeat_seconds: int) -> None:
    import jax

    if platform(os.environ) == "cpu":
        # Process 0 alone writes that cache. It would find its programs there when it starts again,
        # and wait for the compiling of the others in vain: gloo gives up after 30 seconds.
        jax.config.update("jax_enable_compilation_cache", False)
    os.environ[PROXY_EXEMPTION] = cluster.coordinator.rpartition(":")[0].strip("[]")
    jax.config.update("jax_check_proxy_envs", False)  # which would warn of it
    # It would take the signal to stop for itself; training listens to that.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process,
        local_device_ids=cluster.local_device,
        cluster_detection_method="deactivate",
        initialization_timeout=CONNECT_SECONDS,
        heartbeat_timeout_seconds=heartbeat_seconds,
    )


def _start_seconds(environ: Mapping[str, str]) -> float:
    text = environ.get("L32JAX_START_SECONDS", "") or str(START_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise InputError(f"L32JAX_START_SECONDS={text!r} in the environment: no number of seconds")
    return seconds
