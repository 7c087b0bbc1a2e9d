"""SkyPilot takes its file: `tests/environments/run.sh sky`, in an environment of its own."""

from pathlib import Path

import pytest

sky = pytest.importorskip("sky", reason="SkyPilot is in an environment of its own")

FILE = Path(__file__).parents[2] / "launch/skypilot/train.yaml"


def test_skypilot_takes_the_file():
    task = sky.Task.from_yaml(str(FILE))
    assert task.num_nodes == 2
    (resources,) = task.resources
    assert resources.use_spot
    assert resources.job_recovery["recover_on_exit_codes"] == [75]
    assert task.run.strip().splitlines()[-1].startswith('exec l32jax train "$CONFIG"')


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("accelerators", "acceleratorz"), ("num_nodes", "nodes"), ("use_spot: true", "use_spot: 7")],
)
def test_skypilot_sees_what_is_wrong(right, wrong, tmp_path):
    text = FILE.read_text()
    assert right in text
    (tmp_path / "train.yaml").write_text(text.replace(right, wrong, 1))
    with pytest.raises(ValueError):
        sky.Task.from_yaml(str(tmp_path / "train.yaml"))
