"""What a tokenizer knows: byte strings in the order of merging, ids, special tokens, a pattern."""

import heapq
from dataclasses import dataclass, field, replace
from typing import Any

MAX_ID = 1 << 20
MAX_TOKEN_BYTES = 512  # four times Llama 3's longest; finding a token's merge takes their square
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
# The names that GGUF has for these patterns; the first is the one to write.
GGUF_PATTERNS = {
    "llama-bpe": LLAMA3_PATTERN,
    "llama3": LLAMA3_PATTERN,
    "gpt-2": GPT2_PATTERN,
    "smollm": DIGITS_GPT2_PATTERN,
}
GGUF_NORMAL, GGUF_CONTROL, GGUF_USER_DEFINED, GGUF_UNUSED = 1, 3, 4, 5  # types of tokens there
IMAGE = "<|image|>"
LLAMA3_FORMAT = frozenset(
    f"<|{name}|>"
    for name in (
        *("begin_of_text", "end_of_text", "start_header_id", "end_header_id"),
        *("eot_id", "eom_id", "python_tag", "finetune_right_pad_id"),
    )
)
# Names with which the families that we load end a turn or a text; Meta's order.
STOP_NAMES = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|endoftext|>", "<|im_end|>")


def llama3_special_names() -> tuple[str, ...]:
    """The 256 names that follow the ranks in Llama 3.1 and 3.2, in the order of Meta's table."""
    return _numbered("step_id", "image")


def hugging_face_special_names(*, vision: bool) -> tuple[str, ...]:
    """The same tokens as Hugging Face's Llama 3.2 files name them, in the order of ids.

    There the text models reserve Meta's `step_id` too, and the vision models' image is the 257th.
    """
    return (*_numbered("step_id"), IMAGE) if vision else _numbered()


def _numbered(*named: str) -> tuple[str, ...]:
    """The 256 names, where `step_id` and `image` are reserved tokens unless they are `named`."""
    numbers = iter(range(256))
    names = (
        *("begin_of_text", "end_of_text", None, None),
        *("finetune_right_pad_id", "step_id", "start_header_id", "end_header_id"),
        *("eom_id", "eot_id", "python_tag", "image"),
        *[None] * 244,
    )
    free = {None, "step_id", "image"} - set(named)
    return tuple(
        f"<|reserved_special_token_{next(numbers)}|>" if name in free else f"<|{name}|>"
        for name in names
    )


@dataclass(frozen=True)
class Vocabulary:
    """The content of a tokenizer file, whatever its format.

    Rank (the order of merging) and id (the row of the embedding) differ in general: `ids[rank]` is
    the id of `pieces[rank]`, None for a byte without a token, which is dropped after merging, as
    in llama.cpp (Hugging Face drops it before, so that its neighbours may merge). `unreachable`
    are ids that text never becomes. `bos_id`, `stop_ids` (the declared end first) and `pad_id` are
    special tokens; `adds_bos` says whether a document opens with the first. The merges follow from
    the ranks (tokenizer_export). `adds_image`: it is that of a text model which was taught to see;
    the image is the id after all others, beyond the output head. Llama 3's have it without that.
    """

    pieces: list[bytes]
    ids: list[int | None]
    specials: dict[str, int]
    pattern: str = LLAMA3_PATTERN
    unreachable: dict[int, bytes] = field(default_factory=dict)
    bos_id: int | None = None
    adds_bos: bool = False
    stop_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    chat_template: str | None = None
    adds_image: bool = False

    @property
    def is_llama3(self) -> bool:
        """Whether it has Llama 3's chat tokens."""
        return self.specials.keys() >= LLAMA3_FORMAT


def llama3_vocabulary(pieces: list[bytes]) -> Vocabulary:
    """Ranks in Meta's format: ids are ranks, and the 256 special tokens follow them."""
    specials = {name: len(pieces) + i for i, name in enumerate(llama3_special_names())}
    ids: list[int | None] = list(range(len(pieces)))
    return _with_llama3_roles(
        Vocabulary(pieces, ids, specials, stop_ids=stop_ids(specials, eos=None))
    )


def _with_llama3_roles(vocabulary: Vocabulary) -> Vocabulary:
    """Llama 3's tokens have their roles by name, whatever the file declares or leaves out."""
    if not vocabulary.is_llama3:
        return vocabulary
    bos, pad = (
        vocabulary.specials[name] for name in ("<|begin_of_text|>", "<|finetune_right_pad_id|>")
    )
    return replace(vocabulary, bos_id=bos, adds_bos=True, pad_id=pad)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


BYTE_ALPHABET = _byte_alphabet()
LETTERS = {byte: letter for letter, byte in BYTE_ALPHABET.items()}


def spelled(piece: bytes) -> str:
    """The token's name in the files of Hugging Face and GGUF."""
    return "".join([LETTERS[byte] for byte in piece])


def _to_bytes(token: str) -> bytes:
    if len(token) > MAX_TOKEN_BYTES:
        raise ValueError(f"its token {token!r:.40} is longer than {MAX_TOKEN_BYTES} bytes")
    try:
        return bytes(BYTE_ALPHABET[letter] for letter in token)
    except KeyError as error:
        raise ValueError(f"its token {token!r:.80} shows that it is not byte-level") from error


def byte_level_vocabulary(
    tokens: dict[str, Any],
    merges: list[tuple[str, str]],
    specials: dict[str, int],
    *,
    ignore_merges: bool,
    **rest: Any,
) -> Vocabulary:
    """Bytes first, then products in the order of the merge list, which is not always id order.

    With `ignore_merges` a whole word may also be a token that no merge makes; that has the rank
    of its id, as in Llama 3's files, which Hugging Face derives from Meta's. `rest` are further
    fields of Vocabulary. ValueError if the tokens are not spelled in GPT-2's alphabet of bytes, if
    ids collide or are no ids, and if a merge concerns an unknown token.
    """
    if not tokens:
        raise ValueError("it has no tokens")
    _check_ids([*tokens.values(), *specials.values()])
    by_id = sorted(tokens, key=tokens.__getitem__)
    letters = [token for token in by_id if len(token) == 1]
    products = _products(tokens, merges)
    known = {*letters, *products}
    others = [token for token in by_id if token not in known]
    if ignore_merges:
        products, others = list(heapq.merge(products, others, key=tokens.__getitem__)), []
    ids: dict[bytes, int | None] = {_to_bytes(t): tokens[t] for t in [*letters, *products]}
    for byte in range(256):
        ids.setdefault(bytes([byte]), None)
    unreachable = {tokens[token]: _to_bytes(token) for token in others}
    return _with_llama3_roles(
        Vocabulary(list(ids), list(ids.values()), specials, unreachable=unreachable, **rest)
    )


def _products(tokens: dict[str, Any], merges: list[tuple[str, str]]) -> list[str]:
    """What the merges make, once each: Llama 3's files list every way to make a token."""
    products: dict[str, None] = {}
    for left, right in merges:
        if left not in tokens or right not in tokens or left + right not in tokens:
            raise ValueError(f"its merge {left!r:.40} {right!r:.40} uses or makes an unknown token")
        products[left + right] = None
    return list(products)


def _check_ids(ids: list[Any]) -> None:
    if not all(type(i) is int and 0 <= i < MAX_ID for i in ids):
        raise ValueError(f"an id is not a number from 0 to {MAX_ID - 1}")
    if len(set(ids)) != len(ids):
        raise ValueError("two of its tokens have the same id")


def stop_ids(specials: dict[str, int], eos: int | None) -> tuple[int, ...]:
    """Everything that ends a turn: the declared end, then what is known by its name."""
    named = [specials[name] for name in STOP_NAMES if name in specials]
    return tuple(dict.fromkeys(([] if eos is None else [eos]) + named))
