"""What a tokenizer knows: byte strings in the order of merging, ids, special tokens, a pattern."""

from dataclasses import dataclass, field
from typing import Any

MAX_ID = 1 << 20
LLAMA3_RANKS = 128_000
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's pattern applied between single digits. One expression does both steps: a digit also ends
# a run of spaces, because to the second step the text ends there.
DIGITS_GPT2_PATTERN = (
    r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)
# Names with which the families that we load end a turn or a text; Meta's order.
STOP_NAMES = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|endoftext|>", "<|im_end|>")


def llama3_special_names() -> tuple[str, ...]:
    """The 256 names that follow the ranks in Llama 3.1 and 3.2, in the order of Meta's table."""
    named = (
        *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"),
        *("finetune_right_pad_id", "step_id", "start_header_id", "end_header_id"),
        *("eom_id", "eot_id", "python_tag", "image"),
    )
    reserved = (f"reserved_special_token_{i}" for i in range(2, 258 - len(named)))
    return tuple(f"<|{name}|>" for name in (*named, *reserved))


@dataclass(frozen=True)
class Vocabulary:
    """The content of a tokenizer file, whatever its format.

    Rank (the order of merging) and id (the row of the embedding) differ in general: `ids[rank]` is
    the id of `pieces[rank]`, None for a byte without a token, which is then dropped in encoding,
    as Hugging Face and llama.cpp do. `unreachable` are ids that text never becomes.
    """

    pieces: list[bytes]
    ids: list[int | None]
    specials: dict[str, int]
    pattern: str = LLAMA3_PATTERN
    unreachable: dict[int, bytes] = field(default_factory=dict)
    bos_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    chat_template: str | None = None


def llama3_vocabulary(pieces: list[bytes]) -> Vocabulary:
    """Ranks in Meta's format: ids are ranks, and the 256 special tokens follow them."""
    specials = {name: len(pieces) + i for i, name in enumerate(llama3_special_names())}
    return Vocabulary(pieces, list(range(len(pieces))), specials)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


BYTE_ALPHABET = _byte_alphabet()


def _to_bytes(token: str) -> bytes:
    try:
        return bytes(BYTE_ALPHABET[letter] for letter in token)
    except KeyError as error:
        raise ValueError(f"its token {token!r:.80} shows that it is not byte-level") from error


def byte_level_vocabulary(
    tokens: dict[str, Any], merges: list[tuple[str, str]], specials: dict[str, int], **rest: Any
) -> Vocabulary:
    """Bytes first, then products in the order of the merge list, which is not always id order.

    ValueError if the tokens are not spelled in GPT-2's alphabet of bytes, if ids collide or are
    no ids, and if a merge concerns an unknown token. `rest` are further fields of Vocabulary.
    """
    if not tokens:
        raise ValueError("it has no tokens")
    _check_ids([*tokens.values(), *specials.values()])
    ids: dict[bytes, int | None] = {}
    for token in sorted((t for t in tokens if len(t) == 1), key=tokens.__getitem__):
        ids[_to_bytes(token)] = tokens[token]
    for left, right in merges:
        if left not in tokens or right not in tokens or left + right not in tokens:
            raise ValueError(f"its merge {left!r:.40} {right!r:.40} uses or makes an unknown token")
        ids.setdefault(_to_bytes(left + right), tokens[left + right])
    for byte in range(256):
        ids.setdefault(bytes([byte]), None)
    reached = set(ids.values())
    unreachable = {i: _to_bytes(token) for token, i in tokens.items() if i not in reached}
    return Vocabulary(list(ids), list(ids.values()), specials, unreachable=unreachable, **rest)


def _check_ids(ids: list[Any]) -> None:
    if not all(type(i) is int and 0 <= i < MAX_ID for i in ids):
        raise ValueError(f"an id is not a number from 0 to {MAX_ID - 1}")
    if len(set(ids)) != len(ids):
        raise ValueError("two of its tokens have the same id")


def stop_ids(specials: dict[str, int], eos: int | None) -> tuple[int, ...]:
    """Everything that ends a turn: the declared end, then what is known by its name."""
    named = [specials[name] for name in STOP_NAMES if name in specials]
    return tuple(dict.fromkeys(([] if eos is None else [eos]) + named))
