"""Writes small tokenizer files of each kind out of one tokenizer, for tests to read."""

import json
import pathlib
from itertools import pairwise

import gguf

from l32jax.data.tokenizer import Tokenizer
from l32jax.data.vocabulary import BYTE_ALPHABET, LLAMA3_PATTERN

LETTERS = {byte: letter for letter, byte in BYTE_ALPHABET.items()}
TEXTS = [
    "is there a circle in the image? what colour is the circle? is it a red circle?",
    "what shape is in the picture, and how many? 12345 schöne 日本語 🙂",
] * 3


def small_tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, num_merges=60)


def spelled(piece: bytes) -> str:
    return "".join(LETTERS[byte] for byte in piece)


def ranks(tokenizer: Tokenizer) -> list[bytes]:
    count = tokenizer.special("<|begin_of_text|>")
    return [tokenizer.decode_bytes([i]) for i in range(count)]


def merges(pieces: list[bytes]) -> list[tuple[str, str]]:
    """The two tokens that each longer token was merged of: what is left one merge before it."""
    rank = {piece: i for i, piece in enumerate(pieces)}
    found = []
    for piece in pieces[256:]:
        parts = [bytes([byte]) for byte in piece]
        while len(parts) > 2:
            best = min(pairwise(parts), key=lambda pair: rank.get(pair[0] + pair[1], 1 << 30))
            at = list(pairwise(parts)).index(best)
            parts[at : at + 2] = [best[0] + best[1]]
        found.append((spelled(parts[0]), spelled(parts[1])))
    return found


def hugging_face(tokenizer: Tokenizer, *, with_image: bool = False) -> dict:
    """The content of a tokenizer.json as Llama 3's files have it."""
    pieces = ranks(tokenizer)
    names = sorted(tokenizer.specials, key=tokenizer.specials.__getitem__)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": tokenizer.specials[name], "content": name, "special": True} | flags for name in names
    ]
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "added_tokens": added if with_image else added[:-1],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                split | {"behavior": "Isolated", "invert": False},
                byte_level | {"use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {spelled(piece): i for i, piece in enumerate(pieces)},
            "merges": [f"{left} {right}" for left, right in merges(pieces)],
        },
    }


def text_tokenizer(folder: pathlib.Path, *specials: str) -> Tokenizer:
    """Of a text model with these special tokens, and its file in the folder."""
    small = small_tokenizer()
    content = hugging_face(small)
    first = len(ranks(small))
    content["added_tokens"] = [{"id": first + n, "content": s} for n, s in enumerate(specials)]
    return Tokenizer.from_file(write_json(folder, content))


def write_json(folder: pathlib.Path, content: dict) -> pathlib.Path:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content))
    return file


def write_gguf(file: pathlib.Path, tokenizer: Tokenizer, **replaced) -> pathlib.Path:
    """With the package that the rest of the world writes GGUF with."""
    pieces = ranks(tokenizer)
    by_id = {i: name for name, i in tokenizer.specials.items()}
    # as in the text models' files, where the place of the image has another name
    names = [by_id.get(i, "<|reserved|>") for i in range(len(pieces), tokenizer.num_tokens)]
    fields = {
        "tokens": [spelled(piece) for piece in pieces] + names,
        "merges": [f"{left} {right}" for left, right in merges(pieces)],
        "types": [1] * len(pieces) + [3] * len(names),
        "model": "gpt2",
        "pre": "llama-bpe",
    } | replaced
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model(fields["model"])
    writer.add_tokenizer_pre(fields["pre"])
    writer.add_token_list(fields["tokens"])
    writer.add_token_merges(fields["merges"])
    writer.add_token_types(fields["types"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file
