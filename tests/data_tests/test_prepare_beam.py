"""Apache Beam writes the same bytes as local processes; tests/environments/run.sh has it."""

from functools import partial

import pytest

from l32jax.data.prepare import run
from l32jax.data.prepare.runners import on_beam
from tests.data_tests.small_records import config_for, contents, prepare_here, write_records

pytest.importorskip("apache_beam", reason="tests/environments/run.sh beam")


def test_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "UNIT_RECORDS", 16)
    folder = write_records(tmp_path)
    index = prepare_here(config_for(folder, tmp_path / "here"))
    options = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    runner = partial(on_beam, runner="DirectRunner", options=options)
    assert run.prepare(config_for(folder, tmp_path / "beam"), runner) == index
    assert contents(tmp_path / "beam") == contents(tmp_path / "here")
