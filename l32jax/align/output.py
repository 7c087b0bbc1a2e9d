"""What is made of answers: data to tune with, pairs to prefer by, and a report."""

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image as Pillow

from l32jax.align.choosing import Scored, choose
from l32jax.align.prompts import Prompt, encoded
from l32jax.data.chat import Message
from l32jax.data.features import image_key
from l32jax.data.images import FORMATS
from l32jax.data.records import Bad

BEST, PAIRS, SKIPPED, REPORT = "best.jsonl", "pairs.jsonl", "bad.jsonl", "report.json"
IMAGES = "images"


@dataclasses.dataclass
class Report:
    """What came of a run. Shares are of answers and of prompts; None without a verifier.

    seconds, tokens_per_second: of drawing and verifying, in the command that ended the run.
    first_failure: what the first verifier that failed had to say.
    """

    prompts: int = 0
    bad: int = 0
    duplicates: int = 0
    answers: int = 0
    finished: int = 0
    tokens: int = 0
    verifier_failures: int = 0
    first_failure: str | None = None
    share_right: float | None = None
    share_of_prompts_with_a_right_answer: float | None = None
    best: int = 0
    pairs: int = 0
    seconds: float = 0.0
    tokens_per_second: float | None = None


def write(
    folder: Path,
    answered: Iterable[tuple[Prompt, Sequence[Scored]]],
    bad: Sequence[Bad],
    *,
    provenance: Mapping[str, Any],
    report: Report,
) -> None:
    """Fills in the report and writes the four files, which appear whole; the report is last."""
    right = prompts_right = 0
    verified = False
    with appearing(folder, BEST, PAIRS, SKIPPED, REPORT) as (best, pairs, skipped, reported):
        for prompt, answers in answered:
            _count(report, answers)
            right += sum(answer.is_right for answer in answers)
            prompts_right += any(answer.is_right for answer in answers)
            verified = verified or any(answer.verifier is not None for answer in answers)
            _write_choice(folder, prompt, answers, provenance, report, best, pairs)
        if verified:
            report.share_right = right / max(report.answers, 1)
            report.share_of_prompts_with_a_right_answer = prompts_right / max(report.prompts, 1)
        for item in bad:
            _write_line(skipped, dataclasses.asdict(item))
        reported.write(json.dumps(dataclasses.asdict(report), indent=2) + "\n")


def _count(report: Report, answers: Sequence[Scored]) -> None:
    failures = [answer.failure for answer in answers if answer.failure is not None]
    report.prompts += 1
    report.answers += len(answers)
    report.finished += sum(answer.finished for answer in answers)
    report.tokens += sum(answer.num_tokens for answer in answers)
    report.verifier_failures += len(failures)
    report.first_failure = report.first_failure or next(iter(failures), None)


def _write_choice(
    folder: Path,
    prompt: Prompt,
    answers: Sequence[Scored],
    provenance: Mapping[str, Any],
    report: Report,
    best: IO[str],
    pairs: IO[str],
) -> None:
    chosen, pair = choose(answers)
    if chosen is None:
        return
    asked = [_turn(folder, message) for message in prompt.messages]
    about = {**provenance, "place": prompt.place, "prompt": prompt.key, "answers": len(answers)}
    said = {"role": "assistant", "content": chosen.text}
    fields = {"messages": [*asked, said], "provenance": about | {"score": _scores(chosen)}}
    _write_line(best, fields)
    report.best += 1
    if pair is not None:
        scores = {"chosen": _scores(pair.chosen), "rejected": _scores(pair.rejected)}
        texts = {"chosen": pair.chosen.text, "rejected": pair.rejected.text}
        fields = {"messages": asked, **texts, "margin": pair.margin}
        _write_line(pairs, fields | {"provenance": about | {"scores": scores}})
        report.pairs += 1


def _scores(answer: Scored) -> dict[str, Any]:
    return {"number": answer.number, "verifier": answer.verifier, "reward": answer.reward}


def _write_line(file: IO[str], fields: Mapping[str, Any]) -> None:
    file.write(json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n")


def _turn(folder: Path, message: Message) -> dict[str, Any]:
    """As `data.sources.fields` reads it: images stand in the content, so marks are plain text."""
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    parts = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "path": _copied(folder, part.source)}
        for part in message.content
    ]
    return {"role": message.role, "content": parts}


def _copied(folder: Path, source: Any) -> str:
    """The path, in the folder, of a copy of an image; there is one of each content."""
    data = encoded(source)
    with Pillow.open(io.BytesIO(data), formats=FORMATS) as image:
        suffix = str(image.format).lower()
    name = f"{IMAGES}/{image_key(data).hex()}.{suffix}"
    if not (folder / name).exists():
        (folder / IMAGES).mkdir(exist_ok=True)
        unfinished = folder / f"{name}.unfinished"
        unfinished.write_bytes(data)
        unfinished.replace(folder / name)
    return name


@contextlib.contextmanager
def appearing(folder: Path, *names: str) -> Iterator[Sequence[IO[str]]]:
    """Files to write to, which get their names, in this order, unless there is an error."""
    paths = [folder / f"{name}.unfinished" for name in names]
    with contextlib.ExitStack() as stack:
        for path in paths:
            stack.callback(path.unlink, missing_ok=True)
        files = [stack.enter_context(path.open("w", encoding="utf-8")) for path in paths]
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        for path, name in zip(paths, names, strict=True):
            path.replace(folder / name)
