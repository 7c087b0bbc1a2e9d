"""Stopping and going on: the same bits as never stopping, whatever stopped the run."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from l32jax import api
from l32jax.checkpoint.steps import Steps, verify
from l32jax.config import MeshConfig
from l32jax.conversion.convert import save
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from l32jax.model.parameters import flatten
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig
from l32jax.sharding import single_device_mesh
from l32jax.train import loop
from l32jax.train.step import TrainState
from tests.train_tests.small import MODEL

CHILD = Path(__file__).with_name("training_child.py")
NUM_STEPS, SAVE_EVERY = 6, 2
TIMEOUT = 300


class Trainer:
    """The parent of the processes; each is started by a line, and told of on its output."""

    def __init__(self, errors: Path):
        self.errors = errors
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.train_tests.training_child"],
            cwd=CHILD.parents[2],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors.open("w"),
            text=True,
        )

    def start(self, config: TrainConfig, log: Path, hold: tuple[str, int] | None = None) -> int:
        self.say({"config": dataclasses.asdict(config), "log": str(log), "hold": hold})
        return int(self.hear())

    def say(self, request) -> None:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        line = self._process.stdout.readline().strip()
        assert line, self.errors.read_text()
        return line

    def run(self, config: TrainConfig, log: Path) -> None:
        self.start(config, log)
        assert self.hear() == "0", self.errors.read_text()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(TIMEOUT)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    trainer = Trainer(tmp_path_factory.mktemp("trainer") / "errors.txt")
    yield trainer
    trainer.close()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[str, str]:
    """Conversations about text, and about pictures of several shapes."""
    folder = tmp_path_factory.mktemp("conversations")
    random = np.random.default_rng(0)
    text, looking = [], []
    for number, (height, width) in enumerate([(28, 28), (56, 28), (20, 60), (50, 50), (28, 90)]):
        picture = random.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png")
        answer = {"role": "assistant", "content": f"{number} {number}"}
        text.append([{"role": "user", "content": f"number {number}?"}, answer])
        looking.append([{"role": "user", "content": [{"image": f"{number}.png"}, "?"]}, answer])
    paths = folder / "text.jsonl", folder / "looking.jsonl"
    for path, conversations in zip(paths, (text, looking), strict=True):
        path.write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations))
    return str(paths[0]), str(paths[1])


@pytest.fixture(scope="module")
def config_in(sources):
    text, looking = sources

    def stage(name, parts, **data):
        return StageConfig(
            name=name,
            num_steps=NUM_STEPS,
            trains=parts,
            data=DataConfig(batch_size=4, length=128, **data),
            optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=2),
        )

    stages = (
        stage("trunk", ("language_model",), mixture=((text, 1.0),)),
        stage(
            "look",
            ("vision_tower", "adapter"),
            mixture=((looking, 0.7), (text, 0.3)),
            max_images=1,
            mirror_images=True,
        ),
    )

    def config_in(directory: Path) -> TrainConfig:
        return TrainConfig(
            model=MODEL, stages=stages, directory=str(directory), save_every=SAVE_EVERY
        )

    return config_in


@dataclasses.dataclass
class Told:
    """What the log says: digests by place, and how often a run was interrupted."""

    batches: dict
    leaves: dict
    interruptions: list[str]


def read(log: Path) -> Told:
    """A batch that is seen again, because a step was lost, must be the same one."""
    told = Told({}, {}, [])
    for record in map(json.loads, log.read_text().splitlines()):
        if "interrupted" in record:
            told.interruptions.append(record["interrupted"])
            continue
        kind = told.batches if "batch" in record else told.leaves
        place = tuple(record.get("batch") or record["leaf"])
        assert kind.setdefault(place, record["sha256"]) == record["sha256"], place
    return told


@pytest.fixture(scope="module")
def whole_folder(trainer, config_in, tmp_path_factory) -> Path:
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    trainer.run(config_in(folder / "run"), folder / "log")
    return folder


@pytest.fixture(scope="module")
def whole(whole_folder) -> Told:
    told = read(whole_folder / "log")
    assert list(told.batches) == list(itertools.product(("trunk", "look"), range(NUM_STEPS)))
    assert len(set(told.batches.values())) == len(told.batches)
    assert any("opt_state" in name for _, name in told.leaves)
    changed = [
        told.leaves["trunk", name] != told.leaves["look", name]
        for _, name in told.leaves
        if "params/vision/local_blocks/mlp" in name
    ]
    assert changed and all(changed)
    return told


@pytest.fixture
def begun(config_in, whole_folder, tmp_path) -> tuple[TrainConfig, Path]:
    """A run that has its first stage behind it, and its log."""
    folder = tmp_path / "begun"
    shutil.copytree(whole_folder / "run" / "1_trunk", folder / "run" / "1_trunk")
    lines = (whole_folder / "log").read_text().splitlines(keepends=True)
    (folder / "log").write_text("".join(line for line in lines if '"trunk"' in line))
    return config_in(folder / "run"), folder / "log"


def saved(config: TrainConfig, number: int) -> Steps:
    return Steps(Path(config.directory) / f"{number + 1}_{config.stages[number].name}")


def wait_for(steps: Steps, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while steps.latest() != step:
        assert time.monotonic() < deadline, steps.all()
        time.sleep(0.02)


def assert_same(ours: Told, whole: Told) -> None:
    assert ours.batches == whole.batches
    assert ours.leaves == whole.leaves


def kill_at(trainer, config, log, place, *, saved_step, stage: int = 1) -> None:
    process = trainer.start(config, log, hold=place)
    assert trainer.hear() == "holding"
    if saved_step:
        wait_for(saved(config, stage), saved_step)
    os.kill(process, signal.SIGKILL)
    assert trainer.hear() == str(-signal.SIGKILL)


@pytest.mark.parametrize(
    ("step", "saved_step"),
    [
        pytest.param(2, 2, id="right_after_a_save"),
        pytest.param(0, 0, id="before_the_first_save", marks=pytest.mark.slow),
        pytest.param(5, 4, id="a_step_after_a_save", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_with_the_same_bits(step, saved_step, trainer, begun, whole):
    config, log = begun
    kill_at(trainer, config, log, ("look", step), saved_step=saved_step)
    assert not any(stage == "look" for stage, _ in read(log).leaves)
    trainer.run(config, log)
    assert_same(read(log), whole)


def test_sigterm_saves_the_step_under_way_and_the_run_goes_on(trainer, begun, whole):
    config, log = begun
    process = trainer.start(config, log, hold=("look", 2))
    assert trainer.hear() == "holding"
    os.kill(process, signal.SIGTERM)
    trainer.say("go on")
    assert trainer.hear() == "0"
    assert read(log).interruptions == [
        "saved stage 'look' at step 3; the same command goes on from there"
    ]
    assert saved(config, 1).newest_undamaged() == (3, {})
    trainer.run(config, log)
    assert_same(read(log), whole)


def test_a_flipped_bit_costs_steps_and_changes_nothing(trainer, begun, whole):
    config, log = begun
    kill_at(trainer, config, log, ("look", 5), saved_step=4)
    steps = saved(config, 1)
    assert steps.all() == [2, 4]
    largest = max((steps.path(4) / "state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)

    trainer.run(config, log)
    told = trainer.errors.read_text().splitlines()
    (warning,) = (line for line in told if str(steps.path(4)) in line)
    assert "has changed since it was written" in warning
    assert "using step 2 instead" in warning
    assert_same(read(log), whole)
    assert steps.newest_undamaged() == (NUM_STEPS, {})


@pytest.fixture(scope="module")
def sharpening_in(config_in):
    """Small tiles, then larger ones: in bfloat16, by microbatches, to an average of its steps."""

    def sharpening_in(directory: Path) -> TrainConfig:
        whole = config_in(directory)
        look = dataclasses.replace(whole.stages[1], average="ema", ema_decay=0.5)
        sharp = dataclasses.replace(
            look,
            name="sharp",
            image_size=42,
            accumulate=2,
            z_loss=1e-3,
            average="polyak",
            average_from=0.3,
            average_every=2,
            optimizer=OptimizerConfig(peak_lr=1e-2, kind="adafactor", momentum="bfloat16"),
        )
        return dataclasses.replace(whole, stages=(look, sharp), params="bfloat16")

    return sharpening_in


@pytest.fixture(scope="module")
def sharpened(trainer, sharpening_in, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharpened")
    trainer.run(sharpening_in(folder / "run"), folder / "log")
    return folder


@pytest.mark.slow
def test_a_killed_chain_of_image_sizes_ends_with_the_same_bits(
    trainer, sharpening_in, sharpened, tmp_path
):
    config, log = sharpening_in(tmp_path / "run"), tmp_path / "log"
    told = len(trainer.errors.read_text())
    kill_at(trainer, config, log, ("look", 3), saved_step=2, stage=0)
    kill_at(trainer, config, log, ("sharp", 5), saved_step=4)
    trainer.run(config, log)
    assert_same(read(log), read(sharpened / "log"))
    assert "another config" not in trainer.errors.read_text()[told:]


@pytest.mark.slow
def test_checkpoints_tell_the_image_size_and_hold_the_average(sharpening_in, sharpened):
    run = sharpened / "run"
    config, told = sharpening_in(run), read(sharpened / "log").leaves
    for number, stage in enumerate(config.stages):
        folder = loop.stage_directory(config, number)
        assert api.load(folder).config == config.model_of(number)
        assert verify(folder) == []
        averages = {name for of, name in told if of == stage.name and name.startswith("average")}
        assert averages
        for name in averages:
            result = "params" + name.removeprefix("average")
            assert told[stage.name, result] == told[stage.name, name]
    assert api.load(run).config.vision.image_size == 42


@pytest.mark.slow
def test_a_chain_of_image_sizes_converts(sharpened, tmp_path):
    model = api.load(sharpened / "run")
    save(model, tmp_path / "hf", to="hf")
    assert api.load(tmp_path / "hf").config.vision.image_size == 42


def test_a_finished_run_is_left_as_it_is(trainer, config_in, whole_folder, whole, tmp_path):
    shutil.copytree(whole_folder / "run", tmp_path / "run")
    trainer.run(config_in(tmp_path / "run"), tmp_path / "log")
    assert read(tmp_path / "log").batches == {}
    assert read(tmp_path / "log").leaves == whole.leaves


def test_going_on_with_another_config_is_told(trainer, whole_folder, config_in, tmp_path):
    shutil.copytree(whole_folder / "run", tmp_path / "run")
    config = dataclasses.replace(config_in(tmp_path / "run"), save_every=7)
    trainer.run(config, tmp_path / "log")
    told = trainer.errors.read_text()
    assert f"stage 'look' goes on from step {NUM_STEPS} with another config: " in told
    assert f"save_every=7 (was {SAVE_EVERY})" in told


def test_a_signal_at_any_moment_of_a_step_finds_the_step_saved(config_in, tmp_path, monkeypatch):
    """It may come after the loop has decided not to save, and before it looks whether to stop."""
    answers = iter([False, True, True])

    def step(state, batch, rate):
        zero = jnp.float32(0)
        return state._replace(step=state.step + 1), {"loss": zero, "accuracy": zero}

    state = TrainState(jnp.int32(0), {"weight": jnp.zeros(2)}, (), jnp.zeros(2, jnp.uint32))
    monkeypatch.setattr(loop.Stop, "after_step", lambda _: next(answers))
    monkeypatch.setattr(loop, "_init_or_restore", lambda *_: state)
    monkeypatch.setattr(loop, "stage_step", lambda *_: step)
    config = config_in(tmp_path / "run")
    with pytest.raises(loop.Interrupted) as interrupted:
        loop.train(config, Tokenizer.bytes_only(), None, single_device_mesh())
    assert f"at step {saved(config, 0).latest()};" in str(interrupted.value)


@pytest.mark.slow
def test_a_run_may_split_its_rows_over_devices(config_in, tmp_path):
    whole = config_in(tmp_path)
    stage = dataclasses.replace(whole.stages[1], num_steps=2)
    mesh = MeshConfig(fsdp=2, context=2, tensor=2)
    model = api.run(dataclasses.replace(whole, stages=(stage,), mesh=mesh, start_from=None))
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in flatten(model.params).values())
    with pytest.raises(InputError, match="load the model on a mesh with context=1"):
        model.logits([1, 2, 3])
    assert np.isfinite(api.load(tmp_path).logits([1, 2, 3])).all()
