"""Text to token ids and back: byte-pair encoding by tiktoken, from any of the family's files."""

import codecs
import difflib
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import SupportsIndex

import tiktoken

from l32jax.data.rank_file import meta_file
from l32jax.data.tokenizer_export import hugging_face_files
from l32jax.data.tokenizer_files import RANKS_FILE, parse_files, read_vocabulary
from l32jax.data.vocabulary import IMAGE, Vocabulary, llama3_vocabulary
from l32jax.errors import InputError

# Bounds of Meta's encoder: tiktoken's regular expression is slow or fails on longer stretches.
MAX_ENCODE_CHARS = 400_000
MAX_RUN_CHARS = 25_000
RUNS = re.compile(r"\s+|\S+")
# Llama 3's pattern as far as Python's `re` can say it; a word that it cuts otherwise only costs
# the trainer a merge that encoding never uses.
TRAINING_WORDS = re.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:[^\r\n\w]|_)?[^\W\d_]+|\d{1,3}|"
    r" ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """The tokenizer of one model.

    Attributes:
      num_tokens: width of the output head; 128,256 for every Llama 3.2 file.
      bos_id: opens a document; None in families without such a token (SmolLM2).
      stop_ids: any of these ends an answer. pad_id: fills rows; None if there is no such token.
      image_id: the input id of an image, `num_tokens`, which is beyond the output head: the model
        keeps a separate embedding for it. None for tokenizers that are not Llama 3's, until
        `with_image_token`.
      is_llama3: whether it has Llama 3's chat tokens. chat_template: Jinja source, if any.
      specials: name of every special token, and its id.
      vocabulary: what the file said, from which files of other formats are made.
    """

    def __init__(self, vocabulary: Vocabulary):
        specials = dict(vocabulary.specials)
        self.is_llama3 = vocabulary.is_llama3
        # Meta's table gives the image 128011, Hugging Face 128256 or nothing; models always take
        # the id after the last.
        image_id_of_file = specials.pop(IMAGE, None) if self.is_llama3 else None
        ids = [i for i in vocabulary.ids if i is not None]
        self.num_tokens = 1 + max([*ids, *vocabulary.unreachable, *specials.values()])
        self.image_id = None
        if self.is_llama3 or vocabulary.adds_image:
            self.image_id = specials[IMAGE] = self.num_tokens
        self.bos_id = vocabulary.bos_id if vocabulary.adds_bos else None
        self.stop_ids, self.pad_id = vocabulary.stop_ids, vocabulary.pad_id
        self.specials = specials
        self.chat_template = vocabulary.chat_template
        self.vocabulary = vocabulary
        self._build_encoder(vocabulary)
        self._bytes = self._bytes_by_id(vocabulary, image_id_of_file)

    def _build_encoder(self, vocabulary: Vocabulary) -> None:
        """tiktoken wants id == rank; where a file has them differ, `_ids` translates."""
        ranks = {piece: rank for rank, piece in enumerate(vocabulary.pieces)}
        self._ids: list[int | None] | None = None
        encoder_specials = self.specials
        if vocabulary.ids != list(range(len(ranks))):
            self._ids = [*vocabulary.ids, *self.specials.values()]
            encoder_specials = {name: len(ranks) + i for i, name in enumerate(self.specials)}
        self._encoding = tiktoken.Encoding(
            "l32jax",
            pat_str=vocabulary.pattern,
            mergeable_ranks=ranks,
            special_tokens=encoder_specials,
        )

    def _bytes_by_id(self, vocabulary: Vocabulary, image_id_of_file: int | None) -> list[bytes]:
        last = max(self.num_tokens - 1, self.image_id or 0, image_id_of_file or 0)
        table = [b""] * (last + 1)
        for i, piece in zip(vocabulary.ids, vocabulary.pieces, strict=True):
            if i is not None:
                table[i] = piece
        for i, piece in vocabulary.unreachable.items():
            table[i] = piece
        for name, i in self.specials.items():
            table[i] = name.encode()
        if image_id_of_file is not None:
            table[image_id_of_file] = IMAGE.encode()
        return table

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads tokenizer.model, tokenizer.json or .gguf, or finds one of them in a directory."""
        return cls(read_vocabulary(path))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], where: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer whose `files` these are; `where` they come from is for errors."""
        return cls(parse_files(files, where))

    @classmethod
    def bytes_only(cls) -> "Tokenizer":
        """256 bytes and Llama 3's 256 special tokens: 512 tokens, for tiny models."""
        return cls(llama3_vocabulary([bytes([byte]) for byte in range(256)]))

    @classmethod
    def train(cls, texts: Iterable[str], *, num_merges: int) -> "Tokenizer":
        """Learns up to `num_merges` merges from small texts; with Llama 3's special tokens."""
        pieces = [bytes([byte]) for byte in range(256)]
        return cls(llama3_vocabulary(pieces + _learn_merges(texts, num_merges)))

    def with_image_token(self) -> "Tokenizer":
        """The same for a vision model: with an `image_id`, which changes no other id.

        Raises:
          InputError: it has an ordinary special token of the image's name.
        """
        if self.image_id is not None:
            return self
        if IMAGE in self.specials:
            raise InputError(
                f"special token {IMAGE!r} in the tokenizer: the text model has it as a word; no "
                "vision model can be made of that"
            )
        return Tokenizer(replace(self.vocabulary, adds_image=True))

    def special(self, name: str) -> int:
        """The id of a special token such as "<|eot_id|>"."""
        if name not in self.specials:
            close = difflib.get_close_matches(name, self.specials, n=3) or list(self.specials)[:3]
            raise InputError(
                f"special token {name!r} in the tokenizer: there is none; use {', '.join(close)}"
            )
        return self.specials[name]

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`, without a beginning-of-text token.

        Names of special tokens inside the text are plain text, so that nobody can forge a turn,
        unless `allow_special`.
        """
        allowed = set(self.specials) if allow_special else set()
        ranks: list[int] = []
        for part in _encodable_parts(text):
            ranks += self._encoding.encode(part, allowed_special=allowed, disallowed_special=())
        if self._ids is None:
            return ranks
        return [i for rank in ranks if (i := self._ids[rank]) is not None]

    def decode(self, tokens: Iterable[SupportsIndex]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: Iterable[SupportsIndex]) -> bytes:
        """The bytes of the ids, which may end in the middle of a character."""
        ids = [token.__index__() for token in tokens]
        for i in ids:
            if not 0 <= i < len(self._bytes):
                raise InputError(
                    f"token {i} in the tokens to decode: the tokenizer has ids from 0 to "
                    f"{len(self._bytes) - 1}; use the tokenizer that belongs to the model"
                )
        return b"".join(self._bytes[i] for i in ids)

    def files(self) -> dict[str, bytes]:
        """Contents by name: Meta's file if that says everything, else Hugging Face's three.

        Hugging Face's take a second or two for Llama 3's 128,256 tokens.
        """
        if self.vocabulary == llama3_vocabulary(self.vocabulary.pieces):
            return {RANKS_FILE: meta_file(self.vocabulary)}
        return hugging_face_files(self.vocabulary)

    def to_bytes(self) -> bytes:
        """Meta's tokenizer.model, from which `from_file` makes the same tokenizer."""
        return meta_file(self.vocabulary)


class StreamDecoder:
    """Decodes token by token; what is not yet a whole character is held back."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: SupportsIndex) -> str:
        """The text that `token` completes, often the whole of it, sometimes nothing."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """The replacement character if the tokens end inside a character; starts afresh."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _encodable_parts(text: str) -> Iterator[str]:
    """Cuts as Meta's encoder does: every 400,000 characters, and inside runs beyond 25,000."""
    for start in range(0, len(text), MAX_ENCODE_CHARS):
        part = text[start : start + MAX_ENCODE_CHARS]
        cuts = [0, *_cuts_in_runs(part), len(part)]
        yield from (part[i:j] for i, j in itertools.pairwise(cuts))


def _cuts_in_runs(text: str) -> Iterator[int]:
    if not _may_have_long_runs(text):
        return
    for run in RUNS.finditer(text):
        yield from range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS)


def _may_have_long_runs(text: str) -> bool:
    """Whether any of the windows is all one run: a run beyond the limit fills at least one."""
    window = MAX_RUN_CHARS // 2
    starts = range(0, len(text) - window, window)
    return any(RUNS.fullmatch(text, start, start + window) for start in starts)


def _learn_merges(texts: Iterable[str], num_merges: int) -> list[bytes]:
    """New tokens in the order of learning; the most frequent pair first, ties by its bytes."""
    counts = Counter(word for text in texts for word in TRAINING_WORDS.findall(text))
    words = {word: [bytes([byte]) for byte in word.encode()] for word in counts}
    learned: dict[bytes, None] = {}
    while len(learned) < num_merges:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, pieces in words.items():
            for pair in itertools.pairwise(pieces):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        learned[best[0] + best[1]] = None
        words = {word: _merge_pair(pieces, best) for word, pieces in words.items()}
    return list(learned)


def _merge_pair(pieces: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged: list[bytes] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
