"""Before JAX connects the processes of a run: all say that they are there, and where.

JAX aborts a process whose peers do not come, and does not say which. Here process 0 listens, at the
port that JAX uses right afterwards, until all others have come or the time of one has run out, and
tells them all the same: the host of every process, or who is missing.
"""

import json
import select
import socket
import time
from typing import Any, NamedTuple

from l32jax.cluster.launchers import Cluster

MAX_BYTES = 4 << 20
READ_SECONDS = 5.0  # for a line of a process that has connected
PAUSE_SECONDS = 0.3  # between attempts to reach process 0
GRACE_SECONDS = 10.0  # for the answer of process 0, once time is up
BACKLOG = 1024
KINDS = (int, int, str, (int, float))  # of the fields of an arrival, said in JSON


class PeerMissing(ConnectionError):
    """Processes of the run did not come: those that did end, and may be started again."""


class Arrival(NamedTuple):
    """What a process says of itself when it comes; `seconds` it has left to wait."""

    process: int
    num_processes: int
    host: str
    seconds: float


class Peer(NamedTuple):
    host: str
    connection: socket.socket


def roll_call(cluster: Cluster, host: str, seconds: float) -> tuple[str, ...]:
    """The host of every process, by its number; the same in all, at about the same time.

    Args:
      host: of this process, as others are to know it.
      seconds: that this process waits for the others.
    Raises:
      PeerMissing: names who has not come by then.
    """
    answer = _ask(cluster, host, seconds) if cluster.process else _call(cluster, host, seconds)
    if why := answer.get("error"):
        raise PeerMissing(
            f"start of {cluster.num_processes} processes by {cluster.launcher}: {why}"
        )
    return tuple(answer["hosts"])


def _call(cluster: Cluster, host: str, seconds: float) -> dict[str, Any]:
    """The part of process 0."""
    peers: dict[int, Peer] = {}
    deadline = time.monotonic() + seconds
    error = ""
    with _listen(cluster) as server:
        while not error and len(peers) < cluster.num_processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                error = _missing(cluster, peers, seconds)
                break
            if arrival := _arrival(_read(connection, READ_SECONDS)):
                deadline = min(deadline, time.monotonic() + arrival.seconds)
                error = _enter(cluster, peers, arrival, connection)
            else:
                connection.close()  # not one of us
            peers = {n: peer for n, peer in peers.items() if not _is_gone(peer.connection)}
    hosts = [host, *(peer.host for _, peer in sorted(peers.items()))]
    answer = {"error": error} if error else {"hosts": hosts}
    for peer in peers.values():
        _tell(peer.connection, answer)
    return answer


def _enter(
    cluster: Cluster, peers: dict[int, Peer], arrival: Arrival, connection: socket.socket
) -> str:
    """Notes one who has come; returns why the run cannot begin, if that shows it."""
    number, host = arrival.process, arrival.host
    before = peers.get(number)
    if before and not _is_gone(before.connection):
        error = (
            f"process {number} is there twice, on {before.host} and {host}; give each its number"
        )
        _tell(connection, {"error": error})
        return error
    peers[number] = Peer(host, connection)
    if arrival.num_processes != cluster.num_processes or not 0 < number < cluster.num_processes:
        return (
            f"process {number} on {host} is told of {arrival.num_processes} processes, process 0 "
            f"of {cluster.num_processes}; start all with the same number"
        )
    return ""


def _arrival(said: dict[str, Any]) -> Arrival | None:
    """None if that was not said by a process of a run."""
    try:
        arrival = Arrival(**said)
    except TypeError:
        return None
    fits = [isinstance(value, kind) for value, kind in zip(arrival, KINDS, strict=True)]
    return arrival if all(fits) else None


def _ask(cluster: Cluster, host: str, seconds: float) -> dict[str, Any]:
    """The part of every other process."""
    deadline = time.monotonic() + seconds
    why = ""
    while (left := deadline - time.monotonic()) > 0:
        me = Arrival(cluster.process, cluster.num_processes, host, left)
        try:
            with socket.create_connection(_place(cluster), timeout=left) as connection:
                _tell(connection, me._asdict(), close=False)
                if answer := _read(connection, left + GRACE_SECONDS):
                    return answer
                why = "it ended, or another program listens there"
        except OSError as error:
            why = error.strerror or str(error)
        time.sleep(PAUSE_SECONDS)
    named = _named(cluster, 0)
    return {
        "error": f"{named} did not answer at {cluster.coordinator} within {seconds:.0f} s ({why}); "
        "look for its own message, and whether that address is right"
    }


def _missing(cluster: Cluster, peers: dict[int, Peer], seconds: float) -> str:
    absent = [n for n in range(1, cluster.num_processes) if n not in peers]
    named = ", ".join(_named(cluster, number) for number in absent[:8])
    named += f" and {len(absent) - 8} more" if len(absent) > 8 else ""
    return (
        f"{named} did not come within {seconds:.0f} s; look for its own message, or give all "
        "more time (L32JAX_START_SECONDS)"
    )


def _named(cluster: Cluster, number: int) -> str:
    return f"process {number}" + (f" on {cluster.hosts[number]}" if cluster.hosts else "")


def _place(cluster: Cluster) -> tuple[str, int]:
    host, _, port = cluster.coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def _listen(cluster: Cluster) -> socket.socket:
    """At all addresses of this host, as JAX does afterwards."""
    _, port = _place(cluster)
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
            )
        return socket.create_server(("", port), backlog=BACKLOG)
    except OSError as error:
        raise PeerMissing(
            f"port {port} of this host, process 0 of the run: {error.strerror}; end what uses it, "
            "or choose another in L32JAX_COORDINATOR"
        ) from error


def _tell(connection: socket.socket, message: dict[str, Any], *, close: bool = True) -> None:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        pass  # it is gone, and will be missed by whoever starts it
    finally:
        if close:
            connection.close()


def _read(connection: socket.socket, seconds: float) -> dict[str, Any]:
    """The one line that the other end says; empty if it says none, or something else."""
    connection.settimeout(seconds)
    try:
        with connection.makefile("rb") as file:
            said = json.loads(file.readline(MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _is_gone(connection: socket.socket) -> bool:
    """Whether the other end has closed: nothing more is ever said to process 0."""
    return bool(select.select([connection], [], [], 0)[0])
