"""All that come hear the same: where everybody is, or who is missing."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l32jax.cluster import Cluster, PeerMissing
from l32jax.cluster.roll_call import roll_call


def cluster(process: int, number: int, port: int, *, hosts: bool = True) -> Cluster:
    names = tuple(f"planned{n}" for n in range(number)) if hosts else ()
    return Cluster("test", number, process, f"localhost:{port}", names)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def answers(clusters: list[Cluster], seconds: float) -> list[tuple[str, ...] | str]:
    """What each process hears; the text of its error if it hears one."""

    def hear(each: Cluster) -> tuple[str, ...] | str:
        try:
            return roll_call(each, f"host{each.process}", seconds)
        except PeerMissing as missing:
            return str(missing)

    with ThreadPoolExecutor(len(clusters)) as pool:
        return list(pool.map(hear, clusters))


@settings(max_examples=10)
@given(st.permutations(range(5)))
def test_all_hear_where_everybody_is(order):
    port = free_port()
    heard = answers([cluster(process, 5, port) for process in order], seconds=30.0)
    assert heard == [tuple(f"host{n}" for n in range(5))] * 5


@settings(max_examples=5)
@given(st.sets(st.integers(1, 4), min_size=1, max_size=4))
def test_all_that_came_are_told_who_did_not(absent):
    port, seconds = free_port(), 0.7
    start = time.monotonic()
    heard = answers([cluster(n, 5, port) for n in range(5) if n not in absent], seconds)
    assert time.monotonic() - start < seconds + 2
    (said,) = set(heard)
    assert ", ".join(f"process {n} on planned{n}" for n in sorted(absent)) + " did not come" in said
    assert all(f"process {n}" not in said for n in range(5) if n not in absent)


@pytest.mark.parametrize("hosts", [True, False])
def test_all_are_told_that_process_0_did_not_come(hosts):
    port = free_port()
    heard = answers([cluster(n, 3, port, hosts=hosts) for n in (1, 2)], seconds=0.7)
    named = "process 0 on planned0" if hosts else "process 0"
    assert len(heard) == 2
    for said in heard:
        assert f"{named} did not answer at localhost:{port}" in said
        assert "Connection refused" in said


def test_nobody_waits_longer_for_one_who_started_late():
    """Process 0 has come half a minute late, as it were: it must not keep the first waiting."""
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        early = pool.submit(answers, [cluster(1, 3, port)], 1.0)
        late = pool.submit(answers, [cluster(0, 3, port)], 30.0)
        assert "process 2" in early.result(timeout=5)[0]
        assert "process 2" in late.result(timeout=5)[0]


def test_two_processes_of_one_number_are_told():
    port = free_port()
    heard = answers([cluster(n, 3, port) for n in (0, 1, 1)], seconds=30.0)
    assert all("process 1 is there twice, on host1 and host1" in said for said in heard)


def test_processes_that_count_differently_are_told():
    port = free_port()
    heard = answers([cluster(0, 3, port), cluster(1, 2, port)], seconds=30.0)
    assert all("told of 2 processes, process 0 of 3" in said for said in heard)


def test_strangers_and_those_that_died_waiting_do_not_count():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(answers, [cluster(0, 2, port)], 30.0)
        died = b'{"process": 1, "num_processes": 2, "host": "dead", "seconds": 9}\n'
        wrong = b'{"process": 1, "num_processes": 2, "host": "wrong", "seconds": "soon"}\n'
        for line in (b"GET / HTTP/1.1\r\n\r\n", b"[" * 100_000 + b"\n", wrong, died):
            with closing(connected(port)) as stranger:
                stranger.sendall(line)
        heard = answers([cluster(1, 2, port)], seconds=30.0)
        assert heard == first.result() == [("host0", "host1")]


def connected(port: int) -> socket.socket:
    for _ in range(100):
        try:
            return socket.create_connection(("localhost", port))
        except OSError:
            time.sleep(0.05)
    raise AssertionError("process 0 does not listen")


def test_a_port_in_use_is_told():
    with socket.create_server(("", 0)) as taken:
        (said,) = answers([cluster(0, 2, taken.getsockname()[1])], seconds=1.0)
    assert "already in use" in said
