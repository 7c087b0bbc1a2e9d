"""Which languages records are in, by py3langid: no model to fetch, half a millisecond a text."""

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

from l32jax.data.prepare.content import Removed, text_of
from l32jax.data.records import Record
from l32jax.errors import InputError

MAX_CHARS = 4000
MIN_LETTERS = 40  # of fewer, such as of one answer, the language is a guess


def in_languages(record: Record, languages: Collection[str], least: float) -> Record | Removed:
    """Keeps records in one of the languages with that probability, and those too short to tell."""
    text = text_of(record)[:MAX_CHARS]
    if sum(map(str.isalpha, text)) < MIN_LETTERS:
        return record
    language, probability = _identifier().classify(text)
    return record if language in languages and probability >= least else Removed("language")


def check_languages(languages: Collection[str]) -> None:
    """InputError for languages that nobody could find."""
    known = set(_identifier().labels)
    if unknown := sorted(set(languages) - known):
        raise InputError(
            f"language {unknown[0]!r} to keep: unknown; use one of {', '.join(sorted(known))}"
        )


@functools.cache  # a second to read
def _identifier() -> Any:
    try:
        from py3langid import langid  # type: ignore[import-not-found]
    except ImportError:
        raise InputError(
            "languages to keep: py3langid is not installed; pip install 'l32jax[data]'"
        ) from None
    model = Path(langid.__file__).parent / langid.MODEL_FILE
    return langid.LanguageIdentifier.from_modelpath(model, norm_probs=True)
