"""What near-duplicates have in common: a short check to compare, and bands to find each other by.

Two records that agree in any band are compared by their checks. Images of at most k different bits
agree in one of k + 1 bands, always; texts agree in one with a probability that rises steeply below
the asked similarity (Leskovec et al., "Mining of Massive Datasets", section 3.4).
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from l32jax.data.images import load_image
from l32jax.data.prepare.config import Duplicates
from l32jax.data.prepare.content import text_of
from l32jax.data.records import Record
from l32jax.errors import InputError

CHECK_BYTES = 129  # what kind it is, and its content
TEXT, IMAGE = 1, 2
PERMUTATIONS = 128
SHINGLE = 5  # words, as for GPT-3 and the Pile
SHINGLES_AT_ONCE = 10_000
# A letter of scripts without spaces stands for a word.
UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"
WORDS = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
HASH_BITS = 128
HASHED_SIDE = 64  # pixels
FREQUENCIES = 16
MAX_COLOUR_DIFFERENCE = 16  # of 255, of the mean colours


@dataclasses.dataclass(frozen=True)
class Signature:
    """check: uint8 [CHECK_BYTES]. bands: 64-bit keys."""

    check: np.ndarray
    bands: tuple[int, ...]


def signature(record: Record, rules: Duplicates) -> Signature | None:
    """By the image if it has one, else by the text; None where a rule is left out."""
    images, words = record.images, WORDS.findall(text_of(record).lower())
    if len(images) == 1:
        if rules.image_distance is None:
            return None
        about = " ".join(words) if record.messages else ""
        return _of_image(load_image(images[0]), about, rules.image_distance)
    if rules.text_similarity is None or not words:
        return None
    return _of_text(words, rules.text_similarity)


def similar(
    check: UInt8[np.ndarray, "byte"], others: UInt8[np.ndarray, "n byte"], rules: Duplicates
) -> bool:
    """Whether a record is a near-duplicate of any of the others."""
    others = others[others[:, 0] == check[0]]
    if check[0] == TEXT and rules.text_similarity is not None:
        same = others[:, 1 : 1 + PERMUTATIONS] == check[1 : 1 + PERMUTATIONS]
        return bool((same.mean(axis=1) >= rules.text_similarity).any())
    if check[0] == IMAGE and rules.image_distance is not None:
        end = 1 + HASH_BITS // 8
        differing = np.bitwise_count(others[:, 1:end] ^ check[1:end]).sum(axis=1)
        colours = np.abs(others[:, end : end + 3].astype(int) - check[end : end + 3]).max(axis=1)
        alike = (differing <= rules.image_distance) & (colours <= MAX_COLOUR_DIFFERENCE)
        return bool(alike.any())
    return False


def perceptual_hash(picture: Image.Image) -> UInt8[np.ndarray, "bit"]:
    """128 bits of what a picture looks like when it is small and grey, whatever its file.

    Its lowest frequencies, and whether each is above their median (Zauner 2010, "pHash"). Integers,
    so that every machine finds the same.
    """
    side = (HASHED_SIDE, HASHED_SIDE)
    grey = np.asarray(picture.convert("L").resize(side, Image.Resampling.BILINEAR), np.int64)
    basis, order = _cosines()
    frequencies = (basis @ grey @ basis.T).ravel()[order]
    return (frequencies > np.median(frequencies)).astype(np.uint8)


def min_hash(words: Sequence[str]) -> np.ndarray:
    """[PERMUTATIONS] uint32; the share of equal ones estimates the shingles in common."""
    try:
        from datasketch import MinHash
    except ImportError:
        raise InputError(
            "near-duplicates of text: datasketch is not installed; pip install 'l32jax[data]', "
            "or set duplicates.text_similarity=None"
        ) from None
    hashed = MinHash(num_perm=PERMUTATIONS, seed=1, scheme="affine32")
    starts = range(max(len(words) - SHINGLE + 1, 1))
    for begin in range(0, len(starts), SHINGLES_AT_ONCE):
        part = starts[begin : begin + SHINGLES_AT_ONCE]
        hashed.update_batch([" ".join(words[i : i + SHINGLE]).encode() for i in part])
    return np.asarray(hashed.hashvalues)


def _of_image(picture: Image.Image, about: str, distance: int) -> Signature:
    bits = perceptual_hash(picture)
    colour = np.asarray(picture.resize((1, 1), Image.Resampling.BOX), np.uint8).ravel()
    check = _check(IMAGE, np.concatenate([np.packbits(bits), colour]))
    parts = np.array_split(bits, distance + 1)
    return Signature(check, tuple(_keys("image " + about, parts)))


def _of_text(words: Sequence[str], similarity: float) -> Signature:
    hashed = min_hash(words)
    check = _check(TEXT, hashed.astype(np.uint8))  # a byte of each differs as a whole does
    return Signature(check, tuple(_keys("text", hashed.reshape(-1, _rows(similarity)))))


def _rows(similarity: float) -> int:
    """Hashes of a band: as many as find most pairs of that similarity, with a margin."""
    half_found = {r: (r / PERMUTATIONS) ** (1 / r) for r in (1, 2, 4, 8, 16)}
    return max(r for r, found in half_found.items() if found <= similarity - 0.05)


def _keys(kind: str, bands: Sequence[np.ndarray] | np.ndarray) -> Iterator[int]:
    for number, band in enumerate(bands):
        data = f"{kind} {number} ".encode() + np.ascontiguousarray(band).tobytes()
        yield int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _check(kind: int, content: np.ndarray) -> np.ndarray:
    check = np.zeros(CHECK_BYTES, np.uint8)
    check[0], check[1 : 1 + len(content)] = kind, content
    return check


@functools.cache
def _cosines() -> tuple[Int[np.ndarray, "f pixel"], Int[np.ndarray, "bit"]]:
    """The cosines of the first frequencies, in 1/1024, and which 128 pairs of them are lowest."""
    pixels = np.arange(HASHED_SIDE) + 0.5
    waves: Float[np.ndarray, "f pixel"] = np.cos(
        np.pi / HASHED_SIDE * np.arange(FREQUENCIES)[:, None] * pixels
    )
    pairs = np.add.outer(np.arange(FREQUENCIES), np.arange(FREQUENCIES)).ravel()
    order = np.argsort(pairs, kind="stable")[1 : 1 + HASH_BITS]  # the first is the mean
    return np.rint(1024 * waves).astype(np.int64), order
