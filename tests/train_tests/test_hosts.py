"""Hosts that hold a run up, or compute something else, are named."""

import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax.train import hosts, journal
from l32jax.train.hosts import FILE, Hosts, different, slow

seconds = st.floats(0.01, 0.02)


@given(st.lists(seconds, min_size=1, max_size=8), st.integers(0, 8), st.floats(0.3, 10))
def test_a_process_that_takes_far_longer_than_the_others_is_slow(others, place, longest):
    place = min(place, len(others))
    assert slow(np.insert(np.array(others), place, longest), 1.0) == place
    assert slow(np.insert(np.array(others), place, longest), 100.0) is None, "it does not matter"


@given(st.lists(seconds, min_size=2, max_size=8))
def test_processes_that_take_about_as_long_are_not(own):
    assert slow(np.array(own), 1.0) is None


@given(st.integers(3, 9), st.data())
def test_who_has_another_loss_than_most_is_named(count, data):
    wrong = data.draw(st.sets(st.integers(0, count - 1), max_size=(count - 1) // 2))
    losses = np.array([7 + 10 * (n in wrong) for n in range(count)])
    assert different(losses) == sorted(wrong)


def test_of_two_that_differ_both_are_named():
    assert different(np.array([1, 2])) == [0, 1]


@pytest.fixture
def three(monkeypatch):
    """This process as the first of three, the last of which takes as long as it says."""
    found = SimpleNamespace(last=0.01, loss=1.0)

    def gathered(own):
        if own.dtype == np.float32:
            return np.array([own, own, found.last], np.float32)
        return np.array([own, own, np.float32(found.loss).view(np.int32)])

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gathered)
    monkeypatch.setattr(hosts.cluster, "hosts", lambda: ("n0", "n1", "n2"))
    return found


def test_a_host_is_named_when_it_was_slow_three_times_in_a_row(three, tmp_path, caplog):
    compared, loss = Hosts(tmp_path), jax.numpy.float32(1)
    for last in (1.0, 1.0, 0.01, 1.0, 1.0):
        three.last = last
        found = compared.compare(5, 0.01, 1.0, loss)
    assert found == {"hosts/slowest_s": 1.0, "hosts/median_s": pytest.approx(0.01)}
    assert not caplog.records and not (tmp_path / FILE).exists()
    with caplog.at_level(logging.WARNING):
        compared.compare(6, 0.01, 1.0, loss)
    line = "process 2 on n2 takes 1 s of a step by itself, the others 0.01 s"
    assert caplog.messages == [line]
    (told,) = journal.read(tmp_path / FILE).records
    assert (told["step"], told["process"], told["host"]) == (6, 2, "n2")


def test_a_host_with_another_loss_is_named_at_once(three, tmp_path, caplog):
    three.loss = 1.0000001
    Hosts(tmp_path).compare(5, 0.01, 1.0, jax.numpy.float32(1))
    (line,) = caplog.messages
    assert line.startswith("process 2 on n2 was given another loss")


def test_a_process_alone_has_nobody_to_be_compared_with(tmp_path):
    assert Hosts(tmp_path).compare(5, 0.01, 1.0, jax.numpy.float32(1)) == {}
