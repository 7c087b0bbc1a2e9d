"""Rejection sampling: many answers to each prompt of a source, of which the best are kept."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from l32jax.align.answer_log import AnswerLog
from l32jax.align.choosing import Scored
from l32jax.align.output import Report, appearing, write
from l32jax.align.prompts import Prompt, Wanted, prompt_of
from l32jax.align.sampling import Answer
from l32jax.align.verifiers import Verifier, unverifiable, verdict
from l32jax.checkpoint.engine.locks import take
from l32jax.checkpoint.engine.transfer import Progress
from l32jax.data.chat import Message
from l32jax.data.images import ImageSource
from l32jax.data.records import Bad, Record
from l32jax.data.sources.open import open_records
from l32jax.errors import InputError, one_line

WINDOW = 1024  # prompts in memory, among which those of one length are looked for
ANSWERS, SETTINGS, LOCK = "answers.jsonl", "settings.json", "lock"

# Rewards of answers to a dialog with these images; higher is better.
Judge = Callable[[Sequence[Message], Sequence[ImageSource], Sequence[str]], list[float]]


@runtime_checkable
class Answerer(Protocol):
    """Who answers: `sampling.Engine` or `endpoint.Endpoint`."""

    def fault(self, prompt: Prompt) -> str | None:
        """Why it cannot be asked this, if so."""
        ...

    def answers(self, wanted: Sequence[Wanted]) -> Generator[list[Answer] | Bad, None, None]:
        """Answers to one prompt at a time as they come; Bad for a prompt that is refused."""
        ...


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How answers are told apart: by a verifier, a reward model, or both in this order."""

    verifier: Verifier | None = None
    judge: Judge | None = None

    def __post_init__(self):
        if self.verifier is None and self.judge is None:
            raise InputError("answers to choose from: nothing scores them; give a verifier")


def sample(
    source: str,
    folder: Path,
    answerer: Answerer,
    *,
    number: int,
    scoring: Scoring,
    settings: Mapping[str, Any],
    progress: Progress,
) -> Report:
    """Draws what is missing of `number` answers to each prompt, and writes what comes of them.

    Answers are kept in the folder as they come; the same call goes on after a stop or kill.

    Args:
      source: as `data.sources.open` names it, with conversations or questions.
      settings: what the answers depend on beside their prompts, in JSON; a folder holds answers of
        one kind.
    Raises:
      InputError: nothing in the source can be asked, or the folder is of other settings.
    """
    records = open_records(source)
    _refuse_others(folder)
    with take(folder, f"answers in {folder}"):
        _keep_settings(folder, settings)
        with closing(AnswerLog(folder / ANSWERS)) as log:
            return _Run(records, folder, answerer, number, scoring, log, progress).run(settings)


def _refuse_others(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names - {LOCK, f"{SETTINGS}.unfinished"} and SETTINGS not in names:
        raise InputError(f"answers in {folder}: it holds something else; give another folder")


def _keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Those of the first answer: until there is one, others may take their place."""
    path, drawn = folder / SETTINGS, folder / ANSWERS
    if not (drawn.exists() and drawn.stat().st_size):
        with appearing(folder, SETTINGS) as (file,):
            file.write(json.dumps(settings, indent=2) + "\n")
    before, now = _flat(_read_settings(path)), _flat(settings)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise InputError(
                f"answers in {folder}: they were drawn with {name}={before.get(name)!r}, not "
                f"{now.get(name)!r}; give the same again, or another folder"
            )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"settings in {path}: they are damaged; give another folder")
    return found


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    groups = [
        value if isinstance(value, dict) else {name: value} for name, value in settings.items()
    ]
    return {name: value for group in groups for name, value in group.items()}


@dataclasses.dataclass
class _Run:
    records: Sequence[Record | Bad]
    folder: Path
    answerer: Answerer
    number: int
    scoring: Scoring
    log: AnswerLog
    progress: Progress

    def run(self, settings: Mapping[str, Any]) -> Report:
        report, bad = Report(), []
        asked: dict[str, int] = {}
        made, begun = 0, time.monotonic()
        self.progress.begin("answers", len(self.records) * self.number)
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for first in range(0, len(self.records), WINDOW):
                wanted = self._window(first, asked, bad, report)
                with closing(self.answerer.answers(wanted)) as answers:
                    for answered in answers:
                        made += self._keep(answered, bad, threads)
        report.seconds = round(time.monotonic() - begun, 3)
        report.tokens_per_second = round(made / report.seconds, 1) if made else None
        if not any(map(self.log.numbers, asked)):
            why = f": {bad[0].place}: {bad[0].why}" if bad else ""
            raise InputError(f"prompts in the source: none of them is answered{why}; give others")
        report.bad = len(bad)
        provenance = {**settings, "l32jax": version("l32jax")}
        write(self.folder, self._answered(asked), bad, provenance=provenance, report=report)
        return report

    def _window(
        self, first: int, asked: dict[str, int], bad: list[Bad], report: Report
    ) -> list[Wanted]:
        """What is missing of answers to the next prompts."""
        wanted = []
        for index in range(first, min(first + WINDOW, len(self.records))):
            prompt = self._prompt(index)
            if isinstance(prompt, Bad):
                bad.append(prompt)
                missing = frozenset()
            elif prompt.key in asked:
                report.duplicates += 1
                missing = frozenset()
            else:
                asked[prompt.key] = index
                missing = frozenset(range(self.number)) - self.log.numbers(prompt.key)
                if missing:
                    wanted.append((prompt, missing))
            self.progress.advance(self.number - len(missing))
        return wanted

    def _prompt(self, index: int) -> Prompt | Bad:
        record = self.records[index]
        prompt = record if isinstance(record, Bad) else prompt_of(record)
        if isinstance(prompt, Bad):
            return prompt
        try:
            done = self.log.numbers(prompt.key) >= set(range(self.number))
            why = None if done else self._fault(prompt)
        except (InputError, OSError) as error:  # of its images
            why = one_line(error)
        return prompt if why is None else Bad(prompt.place, why)

    def _fault(self, prompt: Prompt) -> str | None:
        why = self.answerer.fault(prompt)
        if why is None and self.scoring.verifier is not None:
            why = unverifiable(self.scoring.verifier, prompt.truth)
        return why

    def _keep(
        self, answered: list[Answer] | Bad, bad: list[Bad], threads: ThreadPoolExecutor
    ) -> int:
        """Scores and writes answers; how many tokens they have."""
        if isinstance(answered, Bad):
            bad.append(answered)
            return 0
        prompt = answered[0].prompt
        self.log.append(prompt.key, self._scored(prompt, answered, threads))
        self.progress.advance(len(answered))
        return sum(answer.num_tokens for answer in answered)

    def _scored(
        self, prompt: Prompt, answers: Sequence[Answer], threads: ThreadPoolExecutor
    ) -> list[Scored]:
        scored = [Scored(a.number, a.text, a.num_tokens, a.finished) for a in answers]
        if (check := self.scoring.verifier) is not None:
            verdicts = threads.map(lambda a: verdict(check, a.text, prompt.truth), answers)
            scored = [
                dataclasses.replace(answer, verifier=score, failure=failure)
                for answer, (score, failure) in zip(scored, verdicts, strict=True)
            ]
        return scored if self.scoring.judge is None else _judged(self.scoring.judge, prompt, scored)

    def _answered(self, asked: Mapping[str, int]) -> Iterator[tuple[Prompt, list[Scored]]]:
        """Prompts that have answers, in the order of the source."""
        self.progress.begin("prompts written", len(asked))
        for key, index in asked.items():
            record = self.records[index]
            prompt = record if isinstance(record, Bad) else prompt_of(record)
            if isinstance(prompt, Bad) or prompt.key != key:
                raise InputError(f"{prompt.place} of the source: it has changed; start again")
            if answers := self.log.read(key, self.number):
                yield prompt, answers
            self.progress.advance(1)


def _judged(judge: Judge, prompt: Prompt, answers: Sequence[Scored]) -> list[Scored]:
    """With rewards for those that are right, or may be."""
    right = [answer for answer in answers if answer.is_right]
    rewards = judge(prompt.messages, prompt.images, [a.text for a in right]) if right else []
    if len(rewards) != len(right) or not all(map(math.isfinite, rewards)):
        raise InputError(
            f"rewards of answers to {prompt.place}: {len(rewards)} for {len(right)} answers, or "
            "one that is not finite; look at the reward model"
        )
    by_number = {a.number: float(r) for a, r in zip(right, rewards, strict=True)}
    return [dataclasses.replace(a, reward=by_number.get(a.number)) for a in answers]
