"""What a preparation does, as frozen dataclasses; None leaves a rule out."""

import dataclasses

from l32jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRules:
    """Which plain documents are kept: Gopher's rules (Rae et al. 2021, table A1).

    They count words between spaces: leave them out for languages that are written without.

    min_stop_words: of "the, be, to, of, and, that, have, with"; Gopher asks for 2, of English.
    max_repeated: share of lines, and of paragraphs, that repeat an earlier one, and of characters
      in them.
    max_top_grams: share of characters in the most frequent sequence of 2, 3, … words.
    max_repeated_grams: share of characters in any repeated sequence of 5, 6, … words.
    """

    min_words: int = 50
    max_words: int = 100_000
    word_length: tuple[float, float] = (3.0, 10.0)
    max_symbols_per_word: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    min_stop_words: int = 0
    max_repeated: tuple[float, float] = (0.3, 0.2)
    max_top_grams: tuple[float, ...] = (0.20, 0.18, 0.16)
    max_repeated_grams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRules:
    """Which images are kept, with all of their record. `max_aspect` is long side over short."""

    min_side: int = 28
    max_aspect: float = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Duplicates:
    """What is a near-duplicate of an earlier record.

    text_similarity: share of sequences of five words in common, of records without images, or with
      several.
    image_distance: of the 128 bits of a perceptual hash, how many may differ, of records with one
      image; questions about one picture are duplicates only if their words are the same.
    """

    text_similarity: float | None = 0.8
    image_distance: int | None = 6

    def __post_init__(self):
        if self.text_similarity is not None and not 0.5 <= self.text_similarity <= 1:
            raise InputError(
                f"text_similarity={self.text_similarity} must lie between 0.5 and 1: below, "
                "records would be compared with nearly all others"
            )
        if self.image_distance is not None and not 0 <= self.image_distance <= 12:
            raise InputError(
                f"image_distance={self.image_distance} must lie between 0 and 12: above, "
                "images would be compared with nearly all others"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """From sources to a folder of shards.

    sources: of records, by name; see `data.sources`. An earlier one's duplicates win.
    tokenizer: its file or folder. seed: of the order of samples.
    image_size, max_tiles: images are shrunk to what a model with such tiles can see of them.
    languages: those to keep, as "en"; all of them if empty. min_language: how sure that must be.
    max_bad: share of records that may be unusable.
    """

    sources: tuple[str, ...]
    output: str
    tokenizer: str
    num_shards: int = 8
    seed: int = 0
    image_size: int = 560
    max_tiles: int = 4
    languages: tuple[str, ...] = ()
    min_language: float = 0.5
    text: TextRules | None = TextRules()
    images: ImageRules | None = ImageRules()
    duplicates: Duplicates | None = Duplicates()
    max_bad: float = 0.01

    def __post_init__(self):
        if not self.sources:
            raise InputError("sources=() of a preparation: give one at least")
        if len(set(self.sources)) < len(self.sources):
            raise InputError(f"sources={self.sources} of a preparation: one is there twice")
        if not 1 <= self.num_shards <= 100_000:
            raise InputError(f"num_shards={self.num_shards} must lie between 1 and 100,000")
        if self.image_size < 1 or self.max_tiles < 1:
            raise InputError(
                f"image_size={self.image_size} and max_tiles={self.max_tiles} must be at least 1"
            )
        if not 0 <= self.max_bad <= 1 or not 0 <= self.min_language <= 1:
            raise InputError(
                f"max_bad={self.max_bad} and min_language={self.min_language} must be from 0 to 1"
            )
