"""Rounds of post-training: each goes on from the last, and a stop costs nothing that was done."""

import dataclasses
import json
from pathlib import Path

import pytest

import l32jax
from configs import arithmetic_base, arithmetic_rounds
from l32jax import api
from l32jax.__main__ import main
from l32jax.align import judging
from l32jax.align.verifiers import number
from l32jax.config import SamplingConfig
from l32jax.errors import InputError
from l32jax.rounds import run as rounds
from l32jax.rounds.run import run_rounds
from l32jax.rounds_config import RoundsConfig
from l32jax.run_config import StageConfig
from tests.align_tests.test_run import Silent
from tests.conftest import CACHE
from tests.lines import write_lines

DIGITS = "tests.align_tests.sampling_child:digits"  # answers of any model differ in it
REWARD = {"reward_accuracy", "reward_calibration"}

pytestmark = pytest.mark.usefixtures("one_device")


def small(stage: StageConfig) -> StageConfig:
    data = dataclasses.replace(stage.data, batch_size=2, length=160)
    return dataclasses.replace(stage, num_steps=2, data=data)


def config(folder: Path, start: Path | str, **changes) -> RoundsConfig:
    """Those of the arithmetic, as little as may be."""
    whole = arithmetic_rounds.config()
    lines = [{"question": f"{n}?", "answer": f"{n}"} for n in range(12)]
    write_lines(folder / "asked.jsonl", lines[:8])
    write_lines(folder / "unseen.jsonl", lines[8:])
    run = dataclasses.replace(
        whole.run,
        stages=tuple(map(small, whole.run.stages)),
        directory=str(folder / "rounds"),
        start_from=str(start),
    )
    assert whole.reward is not None
    fields = {
        "run": run,
        "prompts": (str(folder / "asked.jsonl"),),
        "held_out": str(folder / "unseen.jsonl"),
        "rounds": 2,
        "verifier": DIGITS,
        "answers": 3,
        "rows": 12,
        "sampling": SamplingConfig(max_new_tokens=48, temperature=1.0),
        "reward": small(whole.reward),
    }
    return dataclasses.replace(whole, **(fields | changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model that has learned to answer, and to end."""
    whole, folder = arithmetic_base.config(), tmp_path_factory.mktemp("base") / "run"
    stage = small(whole.stages[0])
    stage = dataclasses.replace(
        stage, num_steps=60, data=dataclasses.replace(stage.data, batch_size=8)
    )
    api.run(dataclasses.replace(whole, stages=(stage,), directory=str(folder)))
    return folder


@pytest.fixture(scope="module")
def done(base, tmp_path_factory):
    chosen = config(tmp_path_factory.mktemp("done"), base)
    return chosen, list(run_rounds(chosen, Silent()))


@pytest.mark.slow
def test_a_round_has_its_numbers_and_its_model(done):
    chosen, rows = done
    folder = Path(chosen.run.directory)
    assert json.loads((folder / rounds.ROUNDS).read_text()) == rows
    assert [row["round"] for row in rows] == [0, 1, 2] and rows[0].keys() == {"round", "accuracy"}
    for row in rows[1:]:
        assert row.keys() == {"round", "accuracy", "sampled_right", "any_right"} | REWARD
        assert all(0 <= row[name] <= 1 for name in row if name != "round")
    models = [l32jax.load(folder / f"round_{number}/run") for number in (1, 2)]
    assert len({rounds.fingerprint(model.params) for model in models}) == 2
    judging.Judge(l32jax.load(folder / "round_1/reward"))
    first, second = (folder / f"round_{n}/answers/best.jsonl" for n in (1, 2))
    assert first.read_text() != second.read_text()


@pytest.mark.slow
def test_the_same_command_goes_on_after_any_part(done, base, tmp_path, monkeypatch):
    """Stopped as each part begins, it does what was not done, and all is as if it never was."""
    chosen, expected = config(tmp_path, base), done[1]
    parts = ("_sampled", "preferences", "_policy_run", "_accuracy")
    due: list[str] = []

    def stopping(name: str, part):
        def begin(*arguments, **options):
            if name in due:
                due.remove(name)
                raise KeyboardInterrupt
            return part(*arguments, **options)

        return begin

    for name in parts:
        monkeypatch.setattr(rounds, name, stopping(name, getattr(rounds, name)))
    for name in parts:
        due.append(name)
        with pytest.raises(KeyboardInterrupt):
            list(run_rounds(chosen, Silent()))
    assert list(run_rounds(chosen, Silent())) == expected
    assert list(run_rounds(dataclasses.replace(chosen, rounds=1), Silent())) == expected


@pytest.mark.slow
def test_rounds_without_a_reward_model_have_none(base, tmp_path):
    (_, row) = run_rounds(config(tmp_path, base, reward=None, rounds=1), Silent())
    assert not row.keys() & REWARD
    assert not (tmp_path / "rounds/round_1/reward").exists()
    assert not (tmp_path / "rounds/round_1/unseen").exists()


def test_reward_models_learn_from_all_rounds_and_policies_from_the_last(tmp_path):
    chosen = config(tmp_path, "tiny-text")
    assert chosen.reward is not None
    folder = tmp_path / "rounds"
    rewarding = rounds._reward_run(chosen, chosen.reward, 2)
    assert rewarding.directory == str(folder / "round_2/reward") and rewarding.model.reward_head
    pairs = [str(folder / f"round_{number}/answers/pairs.jsonl") for number in (1, 2)]
    assert rewarding.stages[0].data.mixture == tuple((source, 0.5) for source in pairs)
    sft, dpo = rounds._policy_run(chosen, 2).stages
    assert sft.data.mixture == ((str(folder / "round_2/answers/best.jsonl"), 1.0),)
    assert dpo.data.mixture == ((pairs[1], 1.0),)


def test_answers_that_teach_nothing_are_told_after_what_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(CACHE))
    file = tmp_path / "untaught.py"
    file.write_text(
        "from pathlib import Path\n"
        "from tests.align_tests import test_rounds\n"
        "def config():\n"
        f"    folder = Path({str(tmp_path)!r})\n"
        "    return test_rounds.config(folder, 'tiny-text', verifier='number')\n"
    )
    assert main(["rounds", str(file)]) == 2
    table, complaint = capsys.readouterr()
    assert "of 8 prompts 0 have a right one, and none a wrong one" in complaint
    assert "start" in table and "0.0%" in table and "The model" not in table


def test_accuracy_is_of_what_can_be_verified(tmp_path):
    lines = [{"question": "1?", "answer": "word"}, {"question": "2?", "answer": "2"}]
    write_lines(tmp_path / "mixed.jsonl", lines)
    write_lines(tmp_path / "words.jsonl", lines[:1])
    (asked,) = rounds._prompts(str(tmp_path / "mixed.jsonl"), number)
    assert asked.truth.answer == "2"
    with pytest.raises(InputError, match="nothing in it can be asked and verified"):
        rounds._prompts(str(tmp_path / "words.jsonl"), number)


def test_a_folder_of_other_rounds_is_left_alone(tmp_path):
    chosen = config(tmp_path, "tiny-text")
    (tmp_path / "rounds").mkdir()
    rounds._require_same(tmp_path / "rounds" / rounds.CONFIG, dataclasses.replace(chosen, rows=1))
    rounds._require_same(tmp_path / "rounds" / rounds.CONFIG, chosen)  # nothing was done
    (tmp_path / "rounds" / rounds.ROUNDS).write_text("[]")
    with pytest.raises(InputError, match="they have another config; give that, or another"):
        list(run_rounds(dataclasses.replace(chosen, answers=4), Silent()))


@pytest.mark.parametrize(
    ("source", "assignments", "said"),
    [
        ("rounds", ("answers=1",), "answers=1"),
        ("rounds", ("rounds=0",), "rounds=0"),
        ("rounds", ("run.start_from=none",), "none"),
        ("rounds", ("anwsers=4",), "anwsers"),
        ("base", (), "not a RoundsConfig"),
        ("nothing", (), "nothing.py"),
    ],
)
def test_what_is_no_rounds_is_told(source, assignments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(CACHE))
    file = Path(arithmetic_rounds.__file__).with_name(f"arithmetic_{source}.py")
    directory = (f"run.directory={tmp_path}",) * (source == "rounds")
    assert main(["rounds", str(file), *directory, *assignments]) == 2
    complaint = capsys.readouterr().err.strip()
    assert said in complaint and len(complaint.splitlines()) == 1
