"""Files that are no tokenizers are refused in one line that names them."""

import pathlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from tests.data_tests import real_tokenizers
from tests.data_tests.awkward_text import SAMPLE
from tests.data_tests.small_tokenizer_files import (
    hugging_face,
    write_gguf,
    write_json,
)


@pytest.fixture(scope="module")
def rank_lines(small) -> list[bytes]:
    return small.to_bytes().splitlines()


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda lines: [b"!!!! 0", *lines[1:]], "line 1 is not 'base64 rank'"),
        (lambda lines: [lines[0] + b" 7", *lines[1:]], "line 1 is not"),
        (lambda lines: [b"= 0", *lines[1:]], "line 1 is not"),
        (lambda lines: [b"QUJD" * 200 + b" 0", *lines[1:]], "line 1 is not"),
        (lambda lines: [lines[0].replace(b" 0", b" -0"), *lines[1:]], "line 1 is not"),
        (lambda lines: [*lines, lines[5]], "line 317 repeats the token of rank 5"),
        (lambda lines: [*lines, b"QUJD 5"], "ranks are not 0 to 316, each once"),
        (lambda lines: lines[:40] + lines[41:], "ranks are not 0 to 314, each once"),
        (lambda lines: lines[:100], "no token for the byte 0x64"),
        (lambda lines: [], "no token for the byte 0x00"),
        (lambda lines: [*lines[:3], b"\xff\xfe\x00"], "line 4 is not"),
    ],
)
def test_damaged_rank_files_are_refused(rank_lines, tmp_path, damage, reason):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"\n".join(damage(rank_lines)))
    refused(file, reason)


def refused(file: pathlib.Path, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        Tokenizer.from_file(file)
    message = str(caught.value)
    assert reason in message and str(file) in message and "\n" not in message


@pytest.mark.parametrize(
    "where, value, reason",
    [
        ("model", {"type": "Unigram", "vocab": [["a", 0.0]]}, "not a BPE tokenizer"),
        ("model", None, "not a BPE tokenizer"),
        ("normalizer", {"type": "NFC"}, "it normalises text"),
        ("added_tokens", "x", "added_tokens are not a list"),
        ("added_tokens", [{"id": 3}], "added_tokens are not names with ids"),
        ("added_tokens", [{"id": 999, "content": "\ud800"}], "surrogates not allowed"),
        ("added_tokens", [{"id": 3, "content": "<x>"}], "two of its tokens have the same id"),
        ("added_tokens", [{"id": 1 << 40, "content": "<x>"}], "an id is not a number from 0"),
        ("pre_tokenizer", None, "its pre-tokenizer is none of"),
        ("pre_tokenizer", {"type": "Metaspace"}, "its pre-tokenizer is none of"),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "its pre-tokenizer"),
    ],
)
def test_foreign_tokenizer_json_is_refused(small, tmp_path, where, value, reason):
    refused(write_json(tmp_path, hugging_face(small) | {where: value}), reason)


@pytest.mark.parametrize(
    "where, value, reason",
    [
        ("vocab", {"▁the": 0}, "'▁the' shows that it is not byte-level"),
        ("vocab", {"a": "zero"}, "an id is not a number"),
        ("vocab", {}, "it has no tokens"),
        ("vocab", {"a" * 600: 0}, "is longer than 512 bytes"),
        ("byte_fallback", True, "'byte_fallback' shows"),
        ("end_of_word_suffix", "</w>", "'end_of_word_suffix' shows"),
        ("merges", ["a b c"], "is not a merge of two tokens"),
        ("merges", [["a"]], "is not a merge of two tokens"),
        ("merges", [3], "is not a merge of two tokens"),
        ("merges", ["z q"], "uses or makes an unknown token"),
    ],
)
def test_foreign_vocabularies_are_refused(small, tmp_path, where, value, reason):
    content = hugging_face(small)
    rest = {"merges": []} if where == "vocab" else {}
    content["model"] |= {where: value} | rest
    refused(write_json(tmp_path, content), reason)


@pytest.mark.parametrize("regex", ["", "(", "a", "x*", r"\p{Nonsense}", "(?=(a+)+$)x"])
def test_expressions_that_lose_text_are_refused(small, tmp_path, regex):
    content = hugging_face(small)
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = regex
    refused(write_json(tmp_path, content), "its pre-tokenizer is none of")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_damaged_neighbours_are_named(small, tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff[")
    write_json(tmp_path, hugging_face(small))
    with pytest.raises(InputError, match=name):
        Tokenizer.from_file(tmp_path)


@pytest.mark.parametrize(
    "replaced, reason",
    [
        ({"model": "llama"}, "of the kind 'llama'"),
        ({"pre": "qwen2"}, "its pre-tokenizer 'qwen2' is none of"),
        ({"types": [1, 1]}, "lists that fit together"),
        ({"merges": ["a"]}, "'a' is not a merge of two tokens"),
    ],
)
def test_foreign_gguf_vocabularies_are_refused(small, tmp_path, replaced, reason):
    refused(write_gguf(tmp_path / "small.gguf", small, **replaced), reason)


def gguf_with(entry: bytes, count: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, count) + entry


KEY = struct.pack("<Q", 11) + b"tokenizer.x"


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"GGUF", "cut short"),
        (gguf_with(b"", count=1 << 60), "cut short"),
        (gguf_with(KEY + struct.pack("<IIQ", 9, 0, 1 << 60)), "an array of"),
        (gguf_with(KEY + struct.pack("<IIQ", 9, 8, 1 << 20)), "cut short"),
        (gguf_with(KEY + struct.pack("<IIQ", 9, 9, 1)), "an array of the type 9"),
        (gguf_with(KEY + struct.pack("<IQ", 8, 1 << 62)), "cut short"),
        (gguf_with(KEY + struct.pack("<I", 77)), "unknown type 77"),
        (gguf_with(struct.pack("<Q", 1) + b"\xff"), "utf-8"),
        (b"FUGG" + bytes(40), "line 1 is not"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "not a little-endian GGUF"),
        (gguf_with(b"", count=0), "of the kind None"),
    ],
)
def test_hostile_gguf_headers_are_refused_at_once(tmp_path, data, reason):
    (tmp_path / "x.gguf").write_bytes(data)
    refused(tmp_path / "x.gguf", reason)


def test_what_is_no_file_of_a_tokenizer_is_refused(tmp_path, monkeypatch):
    refused(tmp_path / "absent", "No such file")
    refused(tmp_path, "no tokenizer.model, tokenizer.json or *.gguf there")
    (tmp_path / "deep").write_text('{"a":' * 100_000)
    refused(tmp_path / "deep", "nested too deeply")
    (tmp_path / "half").write_text('{"model": {"type"')
    refused(tmp_path / "half", "Expecting")
    monkeypatch.setattr("l32jax.data.tokenizer_files.MAX_BYTES", 10)
    (tmp_path / "large").write_text("{" + " " * 100)
    refused(tmp_path / "large", "it is larger than")


def test_another_familys_ranks_are_refused(tmp_path):
    other = real_tokenizers.llama3_file().parents[1] / "llama4" / "tokenizer.model"
    refused(other, "it has 200000 ranks and Llama 3 has 128000")


@settings(max_examples=200)
@given(data=st.data())
def test_random_damage_is_refused_or_harmless(damageable, data):
    """Either one line that names the file, or a tokenizer that works."""
    file = damageable[data.draw(st.integers(0, 2))]
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    victim = file.with_name("damaged")
    victim.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        tokenizer = Tokenizer.from_file(victim)
    except InputError as error:
        assert str(victim) in str(error) and "\n" not in str(error)
    else:
        tokenizer.decode(tokenizer.encode(SAMPLE))


@pytest.fixture(scope="module")
def damageable(small, tmp_path_factory) -> list[pathlib.Path]:
    folder = tmp_path_factory.mktemp("damage")
    (folder / "tokenizer.model").write_bytes(small.to_bytes())
    return [
        folder / "tokenizer.model",
        write_json(folder, hugging_face(small)),
        write_gguf(folder / "small.gguf", small),
    ]
