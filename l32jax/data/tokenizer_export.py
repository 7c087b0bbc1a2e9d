"""Writes a vocabulary as Hugging Face's files and as GGUF's entries; `tokenizer_files` reads both.

These formats list merges, and a vocabulary only ranks its tokens: the merges follow from the ranks.
"""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

from l32jax.data.llama3_template import LLAMA3_TEMPLATE, for_llama_cpp
from l32jax.data.tokenizer_files import CONFIG_FILE, IMAGE_ROLE, JSON_FILE, TEMPLATE_FILE
from l32jax.data.vocabulary import (
    DIGITS_GPT2_PATTERN,
    GGUF_CONTROL,
    GGUF_NORMAL,
    GGUF_PATTERNS,
    GGUF_UNUSED,
    GPT2_PATTERN,
    IMAGE,
    LLAMA3_PATTERN,
    Vocabulary,
    hugging_face_special_names,
    llama3_special_names,
    spelled,
)
from l32jax.errors import InputError

NO_RANK = 1 << 30


def hugging_face_files(vocabulary: Vocabulary, *, vision: bool = False) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and, if there is a template, chat_template.jinja.

    transformers' AutoTokenizer encodes with them as our Tokenizer does with special tokens allowed
    (but see Vocabulary about bytes without a token). Llama 3's special tokens get Hugging Face's
    names if the vocabulary has Meta's; `vision` adds the image's, after the last. Llama 3 gets a
    chat template if it has none.
    """
    vocabulary = _with_template(_with_hugging_face_names(vocabulary, vision=vision))
    files = {
        JSON_FILE: _json(_tokenizer_json(vocabulary)),
        CONFIG_FILE: _json(_tokenizer_config(vocabulary)),
    }
    if vocabulary.chat_template is not None:
        files[TEMPLATE_FILE] = vocabulary.chat_template.encode()
    return files


def gguf_metadata(vocabulary: Vocabulary) -> dict[str, Any]:
    """The entries of a text model's GGUF file that concern the tokenizer, as llama.cpp writes them.

    Values are str, int, bool, list[str] or list[int]. The names of special tokens are Hugging
    Face's. InputError if llama.cpp has no name for the pattern, or could not reach all tokens.
    """
    vocabulary = _with_template(_with_hugging_face_names(vocabulary, vision=False))
    pairs = merges(vocabulary)
    _check_reached(vocabulary, len(pairs))
    tokens, types = _token_table(vocabulary)
    roles = {
        "bos": vocabulary.bos_id,
        "eos": next(iter(vocabulary.stop_ids), None),
        "padding": vocabulary.pad_id,
    }
    entries = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _gguf_pattern(vocabulary),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in pairs],
        "tokenizer.ggml.add_bos_token": vocabulary.adds_bos,
        "tokenizer.ggml.add_space_prefix": False,
    }
    entries |= {f"tokenizer.ggml.{r}_token_id": i for r, i in roles.items() if i is not None}
    if vocabulary.chat_template is not None:
        entries["tokenizer.chat_template"] = for_llama_cpp(vocabulary.chat_template)
    return entries


def merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The two tokens that each longer token is merged of, in order of rank.

    There is at most one such pair: inside a longer word, the bytes of a token go through the same
    merges as alone, until two parts are left. Some tokens of Llama 3 (588) get stuck before that:
    they are found as whole words only. Others (81) need a merge of higher rank than their own.
    """
    tokens = zip(vocabulary.pieces, vocabulary.ids, strict=True)
    ranks = {piece: rank for rank, (piece, i) in enumerate(tokens) if i is not None}
    pairs = (_last_merge(piece, ranks) for piece in ranks if len(piece) > 1)
    return [(spelled(pair[0]), spelled(pair[1])) for pair in pairs if pair is not None]


def _last_merge(piece: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    parts = [piece[i : i + 1] for i in range(len(piece))]
    found = [ranks.get(left + right, NO_RANK) for left, right in pairwise(parts)]
    while len(parts) > 2:
        best = min(found)
        if best == NO_RANK:
            return None
        i = found.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del found[i]
        for j in range(max(i - 1, 0), min(i + 1, len(found))):
            found[j] = ranks.get(parts[j] + parts[j + 1], NO_RANK)
    left, right = parts
    return (left, right) if left in ranks and right in ranks else None


def _with_hugging_face_names(vocabulary: Vocabulary, *, vision: bool) -> Vocabulary:
    """Meta's names become Hugging Face's, any others stay; the image is there for `vision` only."""
    if vocabulary.adds_image:
        return replace(vocabulary, specials=vocabulary.specials | {IMAGE: _next_id(vocabulary)})
    if not vocabulary.is_llama3:
        return vocabulary
    first = vocabulary.specials["<|begin_of_text|>"]
    specials = dict(vocabulary.specials)
    if specials == _numbered_from(first, llama3_special_names()):
        specials = _numbered_from(first, hugging_face_special_names(vision=vision))
    specials.pop(IMAGE, None)
    if vision:
        specials[IMAGE] = _next_id(replace(vocabulary, specials=specials))
    return replace(vocabulary, specials=specials)


def _next_id(vocabulary: Vocabulary) -> int:
    return 1 + max([*_spelled_ids(vocabulary).values(), *vocabulary.specials.values()])


def _numbered_from(first: int, names: tuple[str, ...]) -> dict[str, int]:
    return {name: first + i for i, name in enumerate(names)}


def _with_template(vocabulary: Vocabulary) -> Vocabulary:
    if vocabulary.chat_template is None and vocabulary.is_llama3:
        return replace(vocabulary, chat_template=LLAMA3_TEMPLATE)
    return vocabulary


def _spelled_ids(vocabulary: Vocabulary) -> dict[str, int]:
    """Every token that is not special, in the order of ids."""
    pieces = zip(vocabulary.pieces, vocabulary.ids, strict=True)
    by_id = {i: piece for piece, i in pieces if i is not None} | vocabulary.unreachable
    return {spelled(by_id[i]): i for i in sorted(by_id)}


# Hugging Face


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=2).encode()


def _tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    specials = dict(sorted(vocabulary.specials.items(), key=lambda item: item[1]))
    vocab = _spelled_ids(vocabulary)
    if [*vocab.values(), *specials.values()] != list(range(len(vocab) + len(specials))):
        vocab |= specials  # else the library would number the special tokens after the others
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(name, i) for name, i in specials.items()],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(vocabulary.pattern),
        "post_processor": _post_processor(vocabulary),
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # tiktoken looks whole words up first, and what is unreachable must stay so
            "ignore_merges": not vocabulary.unreachable,
            "vocab": vocab,
            "merges": merges(vocabulary),
        },
    }


def _added_token(name: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": name} | flags | {"special": True}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _pre_tokenizer(pattern: str) -> dict[str, Any]:
    """The steps that the tokenizers library splits with; `tokenizer_files` recognises them."""
    if pattern == GPT2_PATTERN:
        return _byte_level(use_regex=True)
    if pattern == DIGITS_GPT2_PATTERN:
        digits = {"type": "Digits", "individual_digits": True}
        return {"type": "Sequence", "pretokenizers": [digits, _byte_level(use_regex=True)]}
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Puts the beginning-of-text token before a text, and before the second of a pair."""
    if not vocabulary.adds_bos:
        return None
    name, number = _special_name(vocabulary, vocabulary.bos_id), vocabulary.bos_id

    def opened(sequence: str, type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": name, "type_id": type_id}},
            {"Sequence": {"id": sequence, "type_id": type_id}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": opened("A", 0),
        "pair": opened("A", 0) + opened("B", 1),
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }


def _tokenizer_config(vocabulary: Vocabulary) -> dict[str, Any]:
    roles = {
        "bos_token": vocabulary.bos_id,
        "eos_token": next(iter(vocabulary.stop_ids), None),
        "pad_token": vocabulary.pad_id,
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.adds_bos,
        **{role: _special_name(vocabulary, i) for role, i in roles.items() if i is not None},
        **({IMAGE_ROLE: IMAGE} if vocabulary.adds_image else {}),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def _special_name(vocabulary: Vocabulary, number: int | None) -> str:
    return next(name for name, i in vocabulary.specials.items() if i == number)


# GGUF


def _token_table(vocabulary: Vocabulary) -> tuple[list[str], list[int]]:
    """Names and types by id; an id without a token has llama.cpp's placeholder."""
    ordinary = {i: name for name, i in _spelled_ids(vocabulary).items()}
    special = {i: name for name, i in vocabulary.specials.items()}
    tokens, types = [], []
    for i in range(1 + max([*ordinary, *special])):
        tokens.append(ordinary.get(i) or special.get(i) or f"[PAD{i}]")
        types.append(
            GGUF_NORMAL if i in ordinary else GGUF_CONTROL if i in special else GGUF_UNUSED
        )
    return tokens, types


def _gguf_pattern(vocabulary: Vocabulary) -> str:
    names = [name for name, pattern in GGUF_PATTERNS.items() if pattern == vocabulary.pattern]
    if not names:
        raise InputError(
            "tokenizer of this model: GGUF has no name for the expression that splits its text; "
            "keep the tokenizer in Hugging Face's format"
        )
    return names[0]


def _check_reached(vocabulary: Vocabulary, num_merges: int) -> None:
    """llama.cpp looks whole words up, where no merge makes them, for Llama 3's pattern only."""
    stuck = sum(len(piece) > 1 for piece in vocabulary.pieces) - num_merges
    if stuck and vocabulary.pattern != LLAMA3_PATTERN:
        raise InputError(
            f"tokenizer of this model: no merge makes {stuck} of its tokens, and llama.cpp would "
            "never use them; keep the tokenizer in Hugging Face's format"
        )
