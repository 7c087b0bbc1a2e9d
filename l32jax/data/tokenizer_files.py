"""Reads the vocabulary out of any tokenizer file: Meta's ranks, Hugging Face's JSON, GGUF's header.

The kind of file is told by its content. Every file is hostile until read: sizes are bounded, and
whatever is wrong becomes one InputError that names the file and the reason.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tiktoken

from l32jax.data.gguf_header import read_header
from l32jax.data.rank_file import read_ranks
from l32jax.data.vocabulary import (
    DIGITS_GPT2_PATTERN,
    GGUF_CONTROL,
    GGUF_NORMAL,
    GGUF_PATTERNS,
    GGUF_USER_DEFINED,
    GPT2_PATTERN,
    IMAGE,
    LLAMA3_PATTERN,
    Vocabulary,
    byte_level_vocabulary,
    llama3_vocabulary,
    stop_ids,
)
from l32jax.errors import InputError, one_line

MAX_BYTES = 64 << 20
# What a splitting expression must keep: all of ASCII, and some of each class of character.
PROBE = "".join(map(chr, range(0x20, 0x7F))) + "  It's 1234\n\n\tÜber  日本語 "
RANKS_FILE, JSON_FILE = FILES = ("tokenizer.model", "tokenizer.json")
CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"  # beside JSON_FILE
IMAGE_ROLE = "image_token"  # in the config: the image is beyond the output head


def read_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """Reads a tokenizer.model, tokenizer.json or .gguf, or the first of these in a directory."""
    file = Path(path)
    if file.is_dir():
        file = _tokenizer_file_in(file)
    neighbours = (file.with_name(name) for name in (CONFIG_FILE, TEMPLATE_FILE))
    return _parse(file, _read(file), {n.name: _read(n) for n in neighbours if n.is_file()})


def parse_files(files: Mapping[str, bytes], where: str | os.PathLike[str]) -> Vocabulary:
    """The same from the contents of files by name; the folder `where` they stand is for errors."""
    for name in FILES:
        if name in files:
            return _parse(Path(where, name), files[name], files)
    raise _absent(where, f"no {RANKS_FILE} or {JSON_FILE}")


def _parse(file: Path, data: bytes, neighbours: Mapping[str, bytes]) -> Vocabulary:
    try:
        if data.startswith(b"GGUF"):
            return _from_gguf(read_header(data, prefix="tokenizer."))
        if len(data) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
        if data.lstrip()[:1] == b"{":
            return _from_json(json.loads(data), *_json_neighbours(file, neighbours))
        return llama3_vocabulary(read_ranks(data))
    except (ValueError, RecursionError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: str | os.PathLike[str], error: Exception) -> InputError:
    if isinstance(error, InputError):
        return error
    why = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error)
    return InputError(
        f"tokenizer in {file}: {why}; give an undamaged tokenizer.model, tokenizer.json or .gguf"
    )


def _tokenizer_file_in(folder: Path) -> Path:
    for file in [folder / RANKS_FILE, folder / JSON_FILE, *sorted(folder.glob("*.gguf"))]:
        if file.is_file():
            return file
    raise _absent(folder, f"no {RANKS_FILE}, {JSON_FILE} or *.gguf")


def _absent(where: str | os.PathLike[str], what: str) -> InputError:
    return InputError(f"tokenizer in {where}: {what} there; give the folder of a downloaded model")


def _read(file: Path) -> bytes:
    """At most one byte more than the bound: enough for any vocabulary, and to know of excess."""
    try:
        with open(file, "rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"tokenizer in {file}: {error.strerror or error}; give a readable file"
        ) from error


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
    adds_image = config.get(IMAGE_ROLE) == IMAGE and _is_last(IMAGE, specials, tokens)
    if adds_image:
        del specials[IMAGE]
    named = {key: specials.get(_token_name(config.get(f"{key}_token"))) for key in ("bos", "eos")}
    pad = specials.get(_token_name(config.get("pad_token")), named["eos"])
    return byte_level_vocabulary(
        tokens,
        [_merge(merge) for merge in merges],
        specials,
        ignore_merges=bool(model.get("ignore_merges")),
        pattern=_json_pattern(content.get("pre_tokenizer")),
        bos_id=named["bos"],
        adds_bos=named["bos"] is not None and bool(config.get("add_bos_token")),
        stop_ids=stop_ids(specials, named["eos"]),
        pad_id=pad,
        chat_template=template,
        adds_image=adds_image,
    )


def _is_last(name: str, specials: dict[str, int], tokens: dict[str, Any]) -> bool:
    """Whether no id is beyond that of a special token. (`tokens` are as yet unchecked.)"""
    others = [i for i in tokens.values() if type(i) is int]
    return name in specials and specials[name] == max([*others, *specials.values()])


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


def _json_neighbours(file: Path, files: Mapping[str, bytes]) -> tuple[dict[str, Any], str | None]:
    """tokenizer_config.json and the chat template beside a tokenizer.json, as far as present."""
    config = _neighbour(file, files, CONFIG_FILE, _json_object)
    template = _neighbour(file, files, TEMPLATE_FILE, bytes.decode)
    return config or {}, template or _default_template((config or {}).get("chat_template"))


def _neighbour(
    file: Path, files: Mapping[str, bytes], name: str, parse: Callable[[bytes], Any]
) -> Any:
    try:
        return parse(files[name]) if name in files else None
    except (ValueError, RecursionError) as error:
        raise _unreadable(file.with_name(name), error) from error


def _json_object(data: bytes) -> dict[str, Any]:
    content = json.loads(data)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


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
    if not isinstance(pre, str) or pre not in GGUF_PATTERNS:
        raise ValueError(f"its pre-tokenizer {pre!r} is none of {', '.join(GGUF_PATTERNS)}")
    header = {"tokenizer.ggml.merges": [], **header}  # llama.cpp's writer leaves out empty lists
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
    bos, eos, pad = (_gguf_id(header, role, names, specials) for role in ("bos", "eos", "padding"))
    template = header.get("tokenizer.chat_template")
    adds_bos = header.get("tokenizer.ggml.add_bos_token")
    return byte_level_vocabulary(
        tokens,
        [_merge(merge) for merge in merges],
        specials,
        ignore_merges=GGUF_PATTERNS[pre] == LLAMA3_PATTERN,  # llama.cpp goes by the name too
        pattern=GGUF_PATTERNS[pre],
        bos_id=bos,
        adds_bos=bos is not None and bool(adds_bos),
        stop_ids=stop_ids(specials, eos),
        pad_id=eos if pad is None else pad,
        chat_template=template if isinstance(template, str) else None,
    )


def _gguf_id(
    header: dict[str, Any], role: str, names: list[str], specials: dict[str, int]
) -> int | None:
    """The special token of a role; an ordinary token in it would be lost to text."""
    value = header.get(f"tokenizer.ggml.{role}_token_id")
    if value is None:
        return None
    if not (isinstance(value, int) and 0 <= value < len(names)):
        raise ValueError(f"its {role} token {value!r} is not one of its {len(names)} tokens")
    return value if names[value] in specials else None


def _merge(merge: Any) -> tuple[str, str]:
    """Both spellings of a merge: "a b" and ["a", "b"]."""
    match merge.split(" ") if isinstance(merge, str) else merge:
        case [str(left), str(right)] if left and right:
            return left, right
    raise ValueError(f"{merge!r:.80} is not a merge of two tokens")
