"""Rounds of post-training: sample, score, learn from the best, learn from comparisons, again.

    <directory>/rounds.json           a row of numbers for each finished round
    <directory>/round_1/answers/      what was sampled: best.jsonl, pairs.jsonl
    <directory>/round_1/unseen/       the same of the held-out prompts: what rewards are judged by
    <directory>/round_1/reward/       the run that makes the reward model
    <directory>/round_1/run/          the run that makes the next model

Each part is kept when it is done, and goes on where it was if it was not.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l32jax import api
from l32jax.align.judging import Judge
from l32jax.align.output import Report, appearing
from l32jax.align.prompts import Prompt, prompt_of
from l32jax.align.run import Scoring, sample
from l32jax.align.sampling import Engine, answers, fingerprint
from l32jax.align.verifiers import Verifier, unverifiable, verdict, verifier
from l32jax.checkpoint.engine.transfer import Progress
from l32jax.config_text import to_json
from l32jax.data.records import Bad
from l32jax.data.sources.open import open_records
from l32jax.errors import InputError
from l32jax.evaluate.reward import preferences
from l32jax.generate.model import Model
from l32jax.rounds_config import BEST, PAIRS, RoundsConfig
from l32jax.run_config import StageConfig, TrainConfig

ROUNDS, CONFIG = "rounds.json", "rounds_config.json"
SEEDS = 1_000_003  # between those of rounds
Row = dict[str, Any]


def run_rounds(config: RoundsConfig, progress: Progress) -> Iterator[Row]:
    """A row of numbers for each round when it is done, the start's first; done ones are not redone.

    Raises:
      InputError: a source or model is wrong, or the folder has rounds of another config.
    """
    directory = Path(config.run.directory)
    directory.mkdir(parents=True, exist_ok=True)
    _require_same(directory / CONFIG, config)
    rows = _read(directory / ROUNDS)
    if not rows:
        rows = [{"round": 0, "accuracy": _accuracy(api.load(_start(config, 1)), config)}]
        _write(directory / ROUNDS, rows)
    yield from rows
    for number in range(len(rows), config.rounds + 1):
        rows.append(_round(config, number, progress))
        _write(directory / ROUNDS, rows)
        yield rows[-1]


def _folder(config: RoundsConfig, number: int) -> Path:
    return Path(config.run.directory) / f"round_{number}"


def _start(config: RoundsConfig, number: int) -> str:
    """Where the model of a round starts: what the round before came to."""
    assert config.run.start_from is not None
    return config.run.start_from if number == 1 else str(_folder(config, number - 1) / "run")


def _round(config: RoundsConfig, number: int, progress: Progress) -> Row:
    """Answers are ranked by the reward model of the round before, if there is one."""
    folder, judge = _folder(config, number), _folder(config, number - 1) / "reward"
    model = api.load(_start(config, number))
    ranked = Judge(api.load(judge)) if config.reward is not None and judge.exists() else None
    prompts = config.prompts[(number - 1) % len(config.prompts)]
    report = _sampled(config, number, prompts, folder / "answers", model, ranked, progress)
    row: Row = {
        "round": number,
        "sampled_right": report.share_right,
        "any_right": report.share_of_prompts_with_a_right_answer,
    }
    if config.reward is not None:
        _sampled(config, number, config.held_out, folder / "unseen", model, None, progress)
        del model, ranked
        rewarding = api.run(_reward_run(config, config.reward, number))
        found = preferences(rewarding, str(folder / "unseen" / "pairs.jsonl"))
        row |= {"reward_accuracy": found.accuracy, "reward_calibration": found.calibration}
        del rewarding
    trained = api.run(_policy_run(config, number))
    return row | {"accuracy": _accuracy(trained, config)}


def _sampled(
    config: RoundsConfig,
    number: int,
    source: str,
    folder: Path,
    model: Model,
    judge: Judge | None,
    progress: Progress,
) -> Report:
    sampling = dataclasses.replace(config.sampling, seed=config.sampling.seed + number * SEEDS)
    report = sample(
        source,
        folder,
        Engine(model, sampling, config.answers, config.rows),
        number=config.answers,
        scoring=Scoring(verifier(config.verifier), judge),
        settings={
            "verifier": config.verifier,
            "parameters": fingerprint(model.params),
            "sampling": dataclasses.asdict(sampling),
        },
        progress=progress,
    )
    if not report.pairs:
        raise InputError(
            f"answers of round {number} to {source!r}: of {report.prompts} prompts {report.best} "
            "have a right one, and none a wrong one beside it; ask easier or harder ones, or draw "
            "more answers"
        )
    return report


def _reward_run(config: RoundsConfig, stage: StageConfig, number: int) -> TrainConfig:
    """Of the pairs of all rounds so far, as in Llama 3, section 4.1.2."""
    folders = [_folder(config, each) for each in range(1, number + 1)]
    return dataclasses.replace(
        config.run,
        model=dataclasses.replace(config.run.model, reward_head=True),
        stages=(_on(stage, folders),),
        directory=str(folders[-1] / "reward"),
        start_from=_start(config, number),
    )


def _policy_run(config: RoundsConfig, number: int) -> TrainConfig:
    folder = _folder(config, number)
    return dataclasses.replace(
        config.run,
        stages=tuple(_on(stage, [folder]) for stage in config.run.stages),
        directory=str(folder / "run"),
        start_from=_start(config, number),
    )


def _on(stage: StageConfig, rounds: Sequence[Path]) -> StageConfig:
    """A stage that learns, in equal shares, from what was sampled in these rounds."""
    mixture: list[tuple[str, float]] = []
    for name, weight in stage.data.mixture:
        files = [str(folder / "answers" / f"{name}.jsonl") for folder in rounds]
        sources = files if name in (BEST, PAIRS) else [name]
        mixture += [(source, weight / len(sources)) for source in sources]
    return dataclasses.replace(stage, data=dataclasses.replace(stage.data, mixture=tuple(mixture)))


def _accuracy(model: Model, config: RoundsConfig) -> float:
    """Of greedy answers to the held-out prompts."""
    check = verifier(config.verifier)
    greedy = dataclasses.replace(config.sampling, temperature=0.0)
    asked = _prompts(config.held_out, check)
    told = answers(model, asked, number=1, sampling=greedy, rows=config.rows)
    scores = [verdict(check, one.text, one.prompt.truth).score for (one,) in told]
    return float(np.mean(scores))


def _prompts(source: str, check: Verifier) -> Sequence[Prompt]:
    """Those whose answers can be verified."""
    records = open_records(source)
    found = [records[number] for number in range(len(records))]
    prompts = [each if isinstance(each, Bad) else prompt_of(each) for each in found]
    usable = [
        prompt
        for prompt in prompts
        if isinstance(prompt, Prompt) and unverifiable(check, prompt.truth) is None
    ]
    if not usable:
        raise InputError(f"held_out={source!r} of rounds: nothing in it can be asked and verified")
    return usable


def _require_same(path: Path, config: RoundsConfig) -> None:
    """More rounds may follow; all else is as it was, once anything is done."""
    told = json.loads(to_json(dataclasses.replace(config, rounds=1)))
    begun = path.exists() and path.with_name(ROUNDS).exists()
    if begun and json.loads(path.read_text(encoding="utf-8")) != told:
        raise InputError(
            f"rounds in {path.parent}: they have another config; give that, or another directory"
        )
    _write(path, told)


def _read(path: Path) -> list[Row]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _write(path: Path, content: Any) -> None:
    with appearing(path.parent, path.name) as (file,):
        file.write(json.dumps(content, indent=2) + "\n")
