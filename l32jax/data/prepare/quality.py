"""Which records are worth training on, by rules that look at one record alone.

The rules for text are Gopher's (Rae et al. 2021, "Scaling Language Models", section A.1.1). They
were made for web pages, so captions and conversations are not held to them.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from l32jax.data.prepare.config import TextRules
from l32jax.data.prepare.content import Removed, text_of
from l32jax.data.records import Record

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
BULLETS = ("•", "‣", "●", "- ", "* ")
ELLIPSES = ("…", "...")
PARAGRAPHS = re.compile(r"\n\s*\n")


def good_text(record: Record, rules: TextRules) -> Record | Removed:
    """Keeps plain documents that pass all rules, and everything that is not a plain document."""
    if record.messages or record.images:
        return record
    text = text_of(record)
    words = text.split()
    if not rules.min_words <= len(words) <= rules.max_words:
        return Removed("text length")
    if not _looks_like_prose(text, words, rules):
        return Removed("text quality")
    if _repeats_itself(text, words, rules):
        return Removed("text repetition")
    return record


def _looks_like_prose(text: str, words: Sequence[str], rules: TextRules) -> bool:
    count = len(words)
    if not count:
        return rules.min_words == 0
    shortest, longest = rules.word_length
    symbols = max(text.count("#"), sum(map(text.count, ELLIPSES)))
    alphabetic = sum(any(map(str.isalpha, word)) for word in words)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (
        shortest <= sum(map(len, words)) / count <= longest
        and symbols <= rules.max_symbols_per_word * count
        and alphabetic >= rules.min_alphabetic_words * count
        and sum(line.startswith(BULLETS) for line in lines) <= rules.max_bullet_lines * len(lines)
        and sum(line.endswith(ELLIPSES) for line in lines) <= rules.max_ellipsis_lines * len(lines)
        and len(STOP_WORDS.intersection(map(str.lower, words))) >= rules.min_stop_words
    )


def _repeats_itself(text: str, words: Sequence[str], rules: TextRules) -> bool:
    paragraphs = [part.strip() for part in PARAGRAPHS.split(text) if part.strip()]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    of_parts, of_characters = rules.max_repeated
    for parts in (lines, paragraphs):
        repeated = list(_repeated(parts))
        if len(repeated) > of_parts * len(parts):
            return True
        if sum(map(len, repeated)) > of_characters * sum(map(len, parts)):
            return True
    characters = sum(map(len, words))
    return any(
        _in_top_gram(words, size) > share * characters
        for size, share in enumerate(rules.max_top_grams, start=2)
    ) or any(
        _in_repeated_grams(words, size) > share * characters
        for size, share in enumerate(rules.max_repeated_grams, start=5)
    )


def _repeated(parts: Sequence[str]) -> Iterator[str]:
    seen: set[str] = set()
    for part in parts:
        if part in seen:
            yield part
        seen.add(part)


def _grams(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(size)), strict=False)


def _in_top_gram(words: Sequence[str], size: int) -> int:
    """Characters in the most frequent sequence of so many words, if it comes more than once."""
    counts = Counter(_grams(words, size))
    if not counts:
        return 0
    most = max(counts.values())
    longest = max(sum(map(len, gram)) for gram, count in counts.items() if count == most)
    return longest * most if most > 1 else 0


def _in_repeated_grams(words: Sequence[str], size: int) -> int:
    """Characters of words in sequences that came before; a word counts once."""
    seen: set[tuple[str, ...]] = set()
    characters, counted = 0, 0  # words before `counted` are
    for start, gram in enumerate(_grams(words, size)):
        if gram in seen:
            characters += sum(map(len, words[max(start, counted) : start + size]))
            counted = start + size
        seen.add(gram)
    return characters
