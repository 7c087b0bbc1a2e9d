"""What a policy learns from its own answers: groups against their mean, each answer once drawn."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import l32jax
from l32jax import api
from l32jax.align import own_answers
from l32jax.align.own_answers import OwnAnswers
from l32jax.data.batches import place
from l32jax.errors import InputError
from l32jax.model.llama import batch_logits, bind
from l32jax.model.parameters import flatten
from l32jax.objective_config import Grpo
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig
from tests.align_tests.sampling_child import letters
from tests.checkpoint_tests.weights import random_params
from tests.data_tests.pictures import png
from tests.lines import write_lines

LETTERS = "tests.align_tests.sampling_child:letters"
HOW = Grpo(answers=4, prompts=3, max_new_tokens=8, verifier=LETTERS)
LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    (folder / "a.png").write_bytes(png(28, 60))
    lines = [{"question": f"{n}?", "answer": f"{n}"} for n in range(7)]
    write_lines(folder / "sums.jsonl", lines)
    write_lines(folder / "seen.jsonl", [*lines[:2], lines[2] | {"image": "a.png"}])
    write_lines(folder / "long.jsonl", [{"question": "x" * 56, "answer": "1"}])
    write_lines(folder / "words.jsonl", [{"question": f"{n}?", "answer": "word"} for n in range(3)])
    write_lines(folder / "some.jsonl", [*lines, {"question": "0?", "answer": "word"}])
    return folder


def fed(
    source: Path, how: Grpo = HOW, *, model="tiny-text", seed=0, policy=0, **changes
) -> OwnAnswers:
    """As the loop feeds itself, by a policy with random parameters."""
    base = l32jax.load(model)
    data = DataConfig(mixture=((str(source), 1.0),), batch_size=2, length=LENGTH, **changes)
    if base.config.vision is not None:
        data = dataclasses.replace(data, max_images=2)
    stage = StageConfig(
        name="own",
        num_steps=8,
        trains=("language_model",),
        data=data,
        objective=how,
        optimizer=OptimizerConfig(peak_lr=1e-3),
    )
    run = TrainConfig(model=base.config, stages=(stage,), directory="none", seed=seed)
    answers = OwnAnswers(run, 0, base.require_tokenizer(), base.mesh)
    answers.policy = random_params(base.config, seed=policy)
    return answers


def taken(answers: Iterator, number: int) -> list[dict[str, np.ndarray]]:
    return [next(answers) for _ in range(number)]


def same(one, other) -> bool:
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name]) for name in one)


def learned(batch) -> Iterator[tuple[int, np.ndarray]]:
    """The row and the places of each answer."""
    for row, weights in enumerate(batch["weights"]):
        starts = np.flatnonzero((weights > 0) & (np.roll(weights, 1) == 0))
        for start in starts:
            end = start + np.argmin(np.append(weights[start:] > 0, False))
            yield row, np.arange(start, end)


@pytest.mark.parametrize(("name", "model"), [("sums", "tiny-text"), ("seen", "tiny-vision")])
def test_an_answer_has_its_probability_and_counts_against_its_group(folder, name, model):
    answers = fed(folder / f"{name}.jsonl", model=model)
    first = next(answers)
    batches = [first, *taken(answers, len(answers._rows()) - 1)]
    config, tokenizer = answers._config.model, l32jax.load(model).require_tokenizer()
    stops = tokenizer.stop_ids
    by_group: dict[bytes, list[tuple[float, float]]] = {}
    for batch in batches:
        with jax.set_mesh(answers._mesh):
            run = jax.jit(lambda p, b: jax.nn.log_softmax(batch_logits(bind(config, p), b)))
            logs = np.asarray(run(answers.policy, place(batch, answers._mesh)))
        for row, places in learned(batch):
            targets = batch["targets"][row, places]
            np.testing.assert_allclose(
                batch["old"][row, places], logs[row, places, targets], rtol=1e-4, atol=1e-4
            )
            assert batch["weights"][row, places].sum() == pytest.approx(1, rel=1e-6)
            (advantage,) = set(batch["advantage"][row, places].tolist())
            prompt = batch["tokens"][row, batch["start"][row, places[0]] : places[0] + 1]
            reward = letters(tokenizer.decode([t for t in targets if t not in stops]), None)
            by_group.setdefault(prompt.tobytes(), []).append((reward, advantage))
    assert 1 < len(by_group) <= 3 and sum(map(len, by_group.values())) == 4 * len(by_group)
    for group in by_group.values():
        rewards, advantages = np.array(group).T
        expected = (rewards - rewards.mean()) / (rewards.std() + own_answers.SMALL)
        np.testing.assert_allclose(advantages, expected, rtol=1e-4, atol=1e-4)
    if model == "tiny-vision":
        assert any(batch["aspect"].any() for batch in batches)


def test_answers_follow_from_the_seed_and_the_policy(folder):
    source = folder / "sums.jsonl"
    expected = taken(fed(source), 6)
    assert all(map(same, taken(fed(source), 6), expected))
    assert not same(next(fed(source, seed=1)), expected[0])
    assert not same(next(fed(source, policy=1)), expected[0])


def test_it_goes_on_within_answers_whose_policy_is_no_more(folder):
    """A run that is stopped between two asks has moved away from the policy that answered."""
    source = folder / "sums.jsonl"
    whole = fed(source, dataclasses.replace(HOW, epochs=2))
    next(whole)
    steps = 2 * len(whole._rows())
    assert steps >= 4
    state = whole.get_state()
    rest = fed(source, dataclasses.replace(HOW, epochs=2), policy=1)
    rest.set_state([state])
    assert all(map(same, taken(rest, steps - 1), taken(whole, steps - 1)))
    whole.policy = rest.policy
    assert same(next(rest), next(whole))


def test_answers_are_learned_from_as_often_as_there_are_epochs(folder):
    answers = fed(folder / "sums.jsonl", dataclasses.replace(HOW, epochs=2))
    first = next(answers)
    size = len(answers._rows())
    batches = [first, *taken(answers, 2 * size)]
    assert all(map(same, batches[:size], batches[size : 2 * size]))
    assert not same(batches[-1], batches[0])


def test_each_prompt_comes_once_before_any_comes_again(folder):
    answers = fed(folder / "sums.jsonl")
    asked = []
    for answers._asked in range(14):
        chosen = answers._next_prompts()
        assert len(chosen) == HOW.prompts
        asked += chosen
    for first in range(0, 42, 7):
        assert sorted(asked[first : first + 7]) == list(range(7))


def test_rewards_that_never_differ_are_an_input_error(folder, monkeypatch):
    monkeypatch.setattr(own_answers, "FRUITLESS", 2)
    with pytest.raises(InputError, match="2 times none of 3 had answers of different rewards"):
        next(fed(folder / "sums.jsonl", dataclasses.replace(HOW, verifier="number")))


def test_prompts_that_nothing_can_be_told_of_are_not_asked(folder):
    how = dataclasses.replace(HOW, verifier="number")
    assert len(fed(folder / "some.jsonl", how, max_bad=0.2)._prompts) == 7
    with pytest.raises(InputError, match="1 of 8 cannot be asked .*it has no number"):
        next(fed(folder / "some.jsonl", how))
    with pytest.raises(InputError, match="3 of 3 cannot be asked .*it has no number"):
        next(fed(folder / "words.jsonl", how, max_bad=1.0))


def test_an_answer_beyond_a_row_is_an_input_error(folder):
    with pytest.raises(InputError, match=f"a row of stage 'own' holds {LENGTH}; lengthen rows"):
        next(fed(folder / "long.jsonl", dataclasses.replace(HOW, prompts=1)))


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_one_that_was_not(folder, one_device, tmp_path, monkeypatch):
    """Within answers of a policy that is in no checkpoint."""
    whole = fed(folder / "sums.jsonl", dataclasses.replace(HOW, epochs=2))._config

    def run(directory, *, stop_at: int = -1) -> dict:
        taking = OwnAnswers.__next__
        taken = 0

        def take(self):
            nonlocal taken
            taken += 1
            if taken == stop_at:
                raise KeyboardInterrupt
            return taking(self)

        with monkeypatch.context() as patch:
            patch.setattr(OwnAnswers, "__next__", take)
            config = dataclasses.replace(
                whole, directory=str(directory), start_from="tiny-text", save_every=3
            )
            return flatten(api.run(config).params)

    expected = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop_at=6)
    found = run(tmp_path / "stopped")
    assert all(np.array_equal(found[path], leaf) for path, leaf in expected.items())
    begun = flatten(l32jax.load("tiny-text").params)
    assert not all(np.array_equal(begun[path], leaf) for path, leaf in expected.items())


@pytest.mark.parametrize("state", [b"", b"\x93\x01", b"\x93\x01\x00\x91\x01"])
def test_a_damaged_state_is_an_input_error(folder, state):
    with pytest.raises(InputError, match="state"):
        fed(folder / "sums.jsonl").set_state([state])
