"""Reads the vocabulary out of any tokenizer file: Meta's ranks, Hugging Face's JSON, GGUF's header.

The kind of file is told by its content. Every file is hostile until read: sizes are bounded, and
whatever is wrong becomes one InputError that names the file and the reason.
"""

import base64
import json
import os
from pathlib import Path
from typing import Any

import tiktoken

from l32jax.data.gguf_header import read_header
from l32jax.data.vocabulary import (
    DIGITS_GPT2_PATTERN,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    LLAMA3_RANKS,
    Vocabulary,
    byte_level_vocabulary,
    llama3_vocabulary,
    stop_ids,
)
from l32jax.errors import InputError

MAX_BYTES = 64 << 20
GGUF_PATTERNS = {
    "llama-bpe": LLAMA3_PATTERN,
    "llama3": LLAMA3_PATTERN,
    "gpt-2": GPT2_PATTERN,
    "smollm": DIGITS_GPT2_PATTERN,
}
# What a splitting expression must keep: all of ASCII, and some of each class of character.
PROBE = "".join(map(chr, range(0x20, 0x7F))) + "  It's 1234\n\n\tÜber  日本語 "
GGUF_NORMAL, GGUF_CONTROL, GGUF_USER_DEFINED = 1, 3, 4


def read_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """Reads a tokenizer.model, tokenizer.json or .gguf, or the first of these in a directory."""
    file = Path(path)
    if file.is_dir():
        file = _tokenizer_file_in(file)
    data = _read(file)
    try:
        if data.startswith(b"GGUF"):
            return _from_gguf(read_header(data, prefix="tokenizer."))
        if len(data) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
        if data.lstrip()[:1] == b"{":
            return _from_json(json.loads(data), *_json_neighbours(file))
        return llama3_vocabulary(_read_ranks(data))
    except (ValueError, RecursionError) as error:
        raise _unreadable(file, error) from error


def parse_ranks(data: bytes, where: str | os.PathLike[str]) -> Vocabulary:
    """The vocabulary of a tokenizer.model's content; `where` it came from is for errors."""
    try:
        return llama3_vocabulary(_read_ranks(data))
    except ValueError as error:
        raise _unreadable(where, error) from error


def _unreadable(file: str | os.PathLike[str], error: Exception) -> InputError:
    if isinstance(error, InputError):
        return error
    why = "it is nested too deeply" if isinstance(error, RecursionError) else error
    return InputError(
        f"tokenizer in {file}: {why}; give an undamaged tokenizer.model, tokenizer.json or .gguf"
    )


def _tokenizer_file_in(folder: Path) -> Path:
    candidates = [folder / "tokenizer.model", folder / "tokenizer.json"]
    for file in candidates + sorted(folder.glob("*.gguf")):
        if file.is_file():
            return file
    raise InputError(
        f"tokenizer in {folder}: no tokenizer.model, tokenizer.json or *.gguf there; "
        "give the folder of a downloaded model"
    )


def _read(file: Path) -> bytes:
    """At most one byte more than the bound: enough for any vocabulary, and to know of excess."""
    try:
        with open(file, "rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"tokenizer in {file}: {error.strerror or error}; give a readable file"
        ) from error


def _read_ranks(data: bytes) -> list[bytes]:
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
        if piece and rank.isdigit():
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


def _from_json(content: dict[str, Any], config: dict[str, Any], template: str | None) -> Vocabulary:
    match content.get("model"):
        case {"type": "BPE", "vocab": dict(vocab), "merges": list(merges)} as model:
            pass
        case _:
            raise ValueError("it is not a BPE tokenizer of the tokenizers library")
    for option in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"its model option {option!r} shows that it is not byte-level")
    if content.get("normalizer"):
        raise ValueError("it normalises text, which byte-level tokenizers of this family do not")
    match content.get("added_tokens"):
        case None | list() as added:
            specials = _added_tokens(added)
        case _:
            raise ValueError("its added_tokens are not a list")
    tokens = {token: i for token, i in vocab.items() if token not in specials}
    named = {key: specials.get(_token_name(config.get(f"{key}_token"))) for key in ("bos", "eos")}
    pad = specials.get(_token_name(config.get("pad_token")), named["eos"])
    return byte_level_vocabulary(
        tokens,
        [_merge(merge) for merge in merges],
        specials,
        pattern=_json_pattern(content.get("pre_tokenizer")),
        bos_id=named["bos"] if config.get("add_bos_token") else None,
        stop_ids=stop_ids(specials, named["eos"]),
        pad_id=pad,
        chat_template=template,
    )


def _added_tokens(added: Any) -> dict[str, int]:
    specials = {}
    for token in added or []:
        match token:
            case {"content": str(name), "id": int(number)} if name:
                name.encode()  # JSON can spell half a character, which no text contains
                specials[name] = number
            case _:
                raise ValueError("its added_tokens are not names with ids")
    return specials


def _token_name(token: Any) -> str:
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else ""


def _json_pattern(pre_tokenizer: Any) -> str:
    """The one regular expression that splits as the pre-tokenizer's steps do."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": [*steps]}:
            pass
        case _:
            steps = [pre_tokenizer]
    defaults = {"use_regex": True, "add_prefix_space": True, "invert": False}
    match [defaults | step if isinstance(step, dict) else step for step in steps]:
        case [
            {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"} as split,
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ] if not split["invert"] and _keeps_all_text(regex):
            return regex
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return GPT2_PATTERN
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False},
        ]:
            return DIGITS_GPT2_PATTERN
    raise ValueError("its pre-tokenizer is none of Llama 3's, GPT-2's and SmolLM2's kinds")


def _keeps_all_text(regex: str) -> bool:
    """Whether tiktoken can use the expression: it drops what is unmatched, and panics on ''."""
    try:
        encoding = tiktoken.Encoding(
            "probe",
            pat_str=regex,
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={},
        )
        return encoding.decode(encoding.encode_ordinary(PROBE)) == PROBE
    except BaseException as error:
        # A panic of tiktoken's Rust is no Exception, and its class cannot be imported.
        if isinstance(error, ValueError) or type(error).__name__ == "PanicException":
            return False
        raise


def _json_neighbours(file: Path) -> tuple[dict[str, Any], str | None]:
    """tokenizer_config.json and the chat template beside a tokenizer.json, as far as present."""
    config_file, template_file = (
        file.with_name(name) for name in ("tokenizer_config.json", "chat_template.jinja")
    )
    try:
        config = json.loads(_read(config_file)) if config_file.is_file() else {}
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise _unreadable(config_file, error) from error
    if template_file.is_file():
        try:
            return config, _read(template_file).decode()
        except ValueError as error:
            raise _unreadable(template_file, error) from error
    return config, _default_template(config.get("chat_template"))


def _default_template(template: Any) -> str | None:
    if isinstance(template, list):  # several named templates
        named = [
            t.get("template") for t in template if isinstance(t, dict) if t.get("name") == "default"
        ]
        template = named[0] if named else None
    return template if isinstance(template, str) else None


def _from_gguf(header: dict[str, Any]) -> Vocabulary:
    model = header.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ValueError(
            f"its vocabulary is of the kind {model!r}, and only 'gpt2' is byte-level BPE"
        )
    pre = header.get("tokenizer.ggml.pre")
    if pre not in GGUF_PATTERNS:
        raise ValueError(f"its pre-tokenizer {pre!r} is none of {', '.join(GGUF_PATTERNS)}")
    match [header.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges", "token_type")]:
        case [list(names), list(merges), list(types)] if len(names) == len(types):
            pass
        case _:
            raise ValueError("its tokens, merges and token types are not lists that fit together")
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ValueError("its tokens are not names, each once")
    tokens = {n: i for i, (n, t) in enumerate(zip(names, types, strict=True)) if t == GGUF_NORMAL}
    special_types = (GGUF_CONTROL, GGUF_USER_DEFINED)
    specials = {n: i for i, n in enumerate(names) if types[i] in special_types}
    eos = _gguf_id(header, "eos", len(names))
    pad = _gguf_id(header, "padding", len(names))
    template = header.get("tokenizer.chat_template")
    adds_bos = header.get("tokenizer.ggml.add_bos_token")
    return byte_level_vocabulary(
        tokens,
        [_merge(merge) for merge in merges],
        specials,
        pattern=GGUF_PATTERNS[pre],
        bos_id=_gguf_id(header, "bos", len(names)) if adds_bos else None,
        stop_ids=stop_ids(specials, eos),
        pad_id=eos if pad is None else pad,
        chat_template=template if isinstance(template, str) else None,
    )


def _gguf_id(header: dict[str, Any], role: str, size: int) -> int | None:
    value = header.get(f"tokenizer.ggml.{role}_token_id")
    if value is not None and not (isinstance(value, int) and 0 <= value < size):
        raise ValueError(f"its {role} token {value!r} is not one of its {size} tokens")
    return value


def _merge(merge: Any) -> tuple[str, str]:
    """Both spellings of a merge: "a b" and ["a", "b"]."""
    match merge.split(" ") if isinstance(merge, str) else merge:
        case [str(left), str(right)] if left and right:
            return left, right
    raise ValueError(f"{merge!r:.80} is not a merge of two tokens")
