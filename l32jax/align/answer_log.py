"""All answers of a run as they come, a line of JSON each, which a restart goes on from."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l32jax.align.choosing import Scored
from l32jax.errors import InputError

FIELDS = {field.name for field in dataclasses.fields(Scored)}


class AnswerLog:
    """Lines are only ever added. In memory is where each begins.

    What a kill left of the last line goes when the file is opened; any other line that is no
    answer is an InputError.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("a+b", buffering=0)
        self._places: dict[str, dict[int, int]] = {}
        whole = 0
        with path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    key, answer = self._parse(line, line_number)
                    self._places.setdefault(key, {})[answer.number] = whole
                    whole += len(line)
        self._file.truncate(whole)
        self._end = whole

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def append(self, key: str, answers: Sequence[Scored]) -> None:
        """Answers to the prompt of that key; they are with the system when this returns."""
        lines = [_line(key, answer) for answer in answers]
        data = memoryview(b"".join(lines))
        while data:
            data = data[self._file.write(data) :]
        for answer, line in zip(answers, lines, strict=True):
            self._places.setdefault(key, {})[answer.number] = self._end
            self._end += len(line)

    def numbers(self, key: str) -> set[int]:
        """Of the answers to a prompt that are here."""
        return set(self._places.get(key, ()))

    def read(self, key: str, number: int) -> list[Scored]:
        """The first so many answers to a prompt, those that are here."""
        places = self._places.get(key, {})
        found = []
        with self._path.open("rb") as file:
            for wanted in sorted(places):
                if wanted < number:
                    file.seek(places[wanted])
                    found.append(self._parse(file.readline(), 0)[1])
        return found

    def _parse(self, line: bytes, line_number: int) -> tuple[str, Scored]:
        try:
            fields = json.loads(line)
            return fields["prompt"], Scored(**{name: fields[name] for name in FIELDS})
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"answers in {self._path} line {line_number}: it is no answer; remove the line"
            ) from None


def _line(key: str, answer: Scored) -> bytes:
    fields: dict[str, Any] = {"prompt": key, **dataclasses.asdict(answer)}
    return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode() + b"\n"
