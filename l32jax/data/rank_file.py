"""Meta's tokenizer.model: a line for each token, its bytes in base64 and its rank."""

import base64

from l32jax.data.vocabulary import (
    LLAMA3_FORMAT,
    LLAMA3_PATTERN,
    LLAMA3_RANKS,
    MAX_TOKEN_BYTES,
    Vocabulary,
    llama3_vocabulary,
)
from l32jax.errors import InputError


def meta_file(vocabulary: Vocabulary) -> bytes:
    """tokenizer.model, byte for byte Meta's if the vocabulary is, whichever file it came from.

    Names of special tokens and a chat template have no place in it. InputError if ids, pattern or
    chat tokens are not Llama 3's.
    """
    pieces = vocabulary.pieces
    rebuilt = llama3_vocabulary(pieces)
    is_same = (
        vocabulary.is_llama3
        and vocabulary.pattern == LLAMA3_PATTERN
        and vocabulary.ids == rebuilt.ids
        and all(vocabulary.specials[name] == rebuilt.specials[name] for name in LLAMA3_FORMAT)
    )
    if not is_same:
        raise InputError(
            "tokenizer of this model: only Llama 3's can be written as ranks, and this one has "
            "other tokens; copy its original file instead"
        )
    return b"".join(base64.b64encode(p) + b" %d\n" % rank for rank, p in enumerate(pieces))


def read_ranks(data: bytes) -> list[bytes]:
    """The tokens in order of rank; ValueError if `data` is no file of Llama 3's kind."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        piece, rank = _rank_line(line, number)
        if piece in ranks:
            raise ValueError(f"line {number} repeats the token of rank {ranks[piece]}")
        ranks[piece] = rank
    _check_ranks(ranks)
    return sorted(ranks, key=ranks.__getitem__)


def _rank_line(line: bytes, number: int) -> tuple[bytes, int]:
    try:
        encoded, rank = line.split()
        piece = base64.b64decode(encoded, validate=True)
        if 0 < len(piece) <= MAX_TOKEN_BYTES and rank.isdigit():
            return piece, int(rank)
    except ValueError:
        pass
    raise ValueError(f"line {number} is not 'base64 rank'")


def _check_ranks(ranks: dict[bytes, int]) -> None:
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"its ranks are not 0 to {len(ranks) - 1}, each once")
    if len(ranks) > LLAMA3_RANKS:
        raise ValueError(f"it has {len(ranks)} ranks and Llama 3 has {LLAMA3_RANKS}")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"it has no token for the byte 0x{missing[0]:02x}")
