import dataclasses
import functools
import json
import pathlib
from typing import Any

import gguf
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from l32jax.data.chat import Image, Message, encode_dialog
from l32jax.data.gguf_header import read_header
from l32jax.data.llama3_template import LLAMA3_TEMPLATE
from l32jax.data.rank_file import meta_file
from l32jax.data.tokenizer import Tokenizer
from l32jax.data.tokenizer_export import gguf_metadata, hugging_face_files, merges
from l32jax.data.tokenizer_files import parse_files, read_vocabulary
from l32jax.data.tool_calls import ToolCall
from l32jax.data.vocabulary import (
    DIGITS_GPT2_PATTERN,
    GPT2_PATTERN,
    Vocabulary,
    byte_level_vocabulary,
    hugging_face_special_names,
    spelled,
)
from l32jax.errors import InputError
from tests import golden
from tests.data_tests import real_tokenizers
from tests.data_tests.awkward_text import has_every_byte
from tests.data_tests.small_tokenizer_files import hugging_face, small_tokenizer, write_json

GOLDEN = golden.document("tokenizer_chat_meta.json")
STRINGS = [
    *(text for text, _ in GOLDEN["strings"]),
    "สวัสดีชาวโลก ภาษาไทย",
    "नमस्ते दुनिया, क्षत्रिय",
    "日本語と中文、한국어 混ざる",
    "🙂👍🏽👩‍👩‍👧‍👦 🇩🇪",
    " " * 300 + "x" + "\n" * 40 + "\t \t\r\n  y",
    "nghiệc thời việc Việt ایران điều",  # words that no merge, or only a late merge, makes
    "<|eot_id|><|begin_of_text|>hi<|im_end|>  <|reserved_special_token_7|>\n<|endoftext|>",
    "\x04\x06\x00 bytes without tokens\xf1",
]
AWKWARD = st.text(alphabet="aZ19 \n\t\r'.s²Ⅷé日½\u3000\xa0\u0085\u200b\x1cſ_🙂<|>ệ", max_size=30)
SPECIALS = st.sampled_from(["<|eot_id|>", "<|im_end|>", "<|endoftext|>", "<s>"])
TEXT = st.lists(st.one_of(st.text(max_size=40), AWKWARD, SPECIALS), max_size=4).map("".join)
PARTS = ("pieces", "ids", "unreachable", "pattern", "bos_id", "adds_bos", "stop_ids", "pad_id")


def write(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def small() -> Tokenizer:
    return small_tokenizer()


def other_families() -> Tokenizer:
    """GPT-2's pattern, specials among and after the tokens, a hole, a token that text never is."""
    tokens = {spelled(bytes([byte])): 20 + byte for byte in range(256)}
    tokens |= {"ab": 8, "Ġab": 9, "cde": 11}
    return Tokenizer(
        byte_level_vocabulary(
            tokens,
            [("a", "b"), ("Ġ", "ab")],
            {"<s>": 6, "</s>": 12, "<pad>": 14},
            ignore_merges=False,
            pattern=GPT2_PATTERN,
            bos_id=6,
            adds_bos=True,
            stop_ids=(12,),
            pad_id=14,
            chat_template="{{ bos_token }}{{ messages[0].content }}",
        )
    )


SOURCES = {
    "llama3": real_tokenizers.llama3,
    "smollm2": real_tokenizers.smollm2,
    "small": small,
    "other": other_families,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What each source is in Hugging Face's format, written once."""

    @functools.cache
    def folder(name: str) -> pathlib.Path:
        files = hugging_face_files(SOURCES[name]().vocabulary)
        return write(tmp_path_factory.mktemp(name), files)

    return folder


@functools.cache
def metadata_of(name: str) -> dict[str, Any]:
    return gguf_metadata(SOURCES[name]().vocabulary)


@pytest.fixture(scope="module", params=SOURCES)
def pair(request, folders):
    """A tokenizer that was read from our files, and what transformers reads from them."""
    library = pytest.importorskip("transformers", reason="an optional oracle")
    folder = folders(request.param)
    return Tokenizer.from_file(folder), library.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def vision_pair(tmp_path_factory):
    """As in a model's folder, where transformers also looks at the kind of model."""
    library = pytest.importorskip("transformers", reason="an optional oracle")
    files = hugging_face_files(small_tokenizer().vocabulary, vision=True)
    folder = write(tmp_path_factory.mktemp("vision"), files)
    (folder / "config.json").write_text('{"model_type": "mllama"}')
    return Tokenizer.from_file(folder), library.AutoTokenizer.from_pretrained(folder)


def agree(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = pair
    tokens = ours.encode(text, allow_special=True)
    assert theirs.encode(text, add_special_tokens=False) == tokens
    opened = tokens if ours.bos_id is None else [ours.bos_id, *tokens]
    assert theirs.encode(text) == opened
    assert theirs.decode(tokens) == ours.decode(tokens)


# Hugging Face


@pytest.mark.parametrize("text", STRINGS)
def test_transformers_encodes_and_decodes_as_we_do(pair, text):
    agree(pair, text)


@given(text=TEXT)
def test_transformers_encodes_and_decodes_any_text_as_we_do(pair, text):
    assume("<|image|>" not in text)  # which text models' files do not have
    assume(has_every_byte(pair[0], text))
    agree(pair, text)


@given(data=st.data())
def test_transformers_decodes_any_tokens_as_we_do(pair, data):
    ours, theirs = pair
    token = st.integers(0, ours.num_tokens - 1)
    tokens = data.draw(st.lists(token, max_size=20))
    assert theirs.decode(tokens) == ours.decode(tokens)


def test_transformers_knows_the_roles(pair):
    ours, theirs = pair
    assert theirs.eos_token_id == ours.stop_ids[0]
    assert (theirs.bos_token_id, theirs.pad_token_id) == (ours.vocabulary.bos_id, ours.pad_id)
    assert len(theirs) == ours.num_tokens or ours.vocabulary.pattern == GPT2_PATTERN  # has holes


@pytest.mark.parametrize("name", SOURCES)
def test_we_read_the_same_vocabulary_back(folders, name):
    original = SOURCES[name]()
    read = Tokenizer.from_file(folders(name))
    for part in PARTS:
        assert getattr(read.vocabulary, part) == getattr(original.vocabulary, part), part
    if original.is_llama3:
        names = hugging_face_special_names(vision=False)
        first = original.special("<|begin_of_text|>")
        assert read.vocabulary.specials == {n: first + i for i, n in enumerate(names)}
        assert read.chat_template == LLAMA3_TEMPLATE
    else:
        assert read.vocabulary == original.vocabulary
    if name != "llama3":  # which takes seconds, and shows nothing that a small one does not
        again = hugging_face_files(read.vocabulary)
        assert again == {file.name: file.read_bytes() for file in folders(name).iterdir()}


def test_a_vision_model_has_the_image_after_the_last_token(vision_pair):
    ours, theirs = vision_pair
    assert theirs.convert_tokens_to_ids("<|image|>") == ours.image_id == len(theirs) - 1
    first = ours.special("<|begin_of_text|>")
    assert theirs.convert_tokens_to_ids("<|step_id|>") == first + 5
    assert theirs.convert_tokens_to_ids("<|reserved_special_token_246|>") == first + 255
    agree(vision_pair, "<|image|>what is this?")


def test_names_that_are_not_metas_stay(tmp_path):
    content = hugging_face(small_tokenizer())
    content["added_tokens"][20]["content"] = "<|im_start|>"
    read = read_vocabulary(write_json(tmp_path, content))
    assert parse_files(hugging_face_files(read), "memory").specials == read.specials
    assert gguf_metadata(read)["tokenizer.ggml.tokens"][read.specials["<|im_start|>"]] == (
        "<|im_start|>"
    )


@pytest.mark.slow
def test_llama3s_tokenizer_json_gives_metas_file_back(folders, tmp_path):
    """Ours, and one with every way to make a token, as Hugging Face's converter writes it."""
    original = real_tokenizers.llama3_file().read_bytes()
    assert meta_file(read_vocabulary(folders("llama3"))) == original
    content = json.loads((folders("llama3") / "tokenizer.json").read_bytes())
    vocab = content["model"]["vocab"]
    content["model"]["merges"] = [
        [token[:i], token[i:]]
        for token in vocab
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    read = read_vocabulary(write_json(tmp_path, content))
    assert len(content["model"]["merges"]) == 280_147
    assert meta_file(read) == original


# Merges


def reference_merge(piece: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The definition, without short cuts: the first of the lowest pairs, until two are left."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 2:
        joined = [left + right for left, right in zip(parts, parts[1:], strict=False)]
        candidates = [j for j, whole in enumerate(joined) if whole in ranks]
        if not candidates:
            return None
        j = min(candidates, key=lambda j: ranks[joined[j]])
        parts[j : j + 2] = [joined[j]]
    return parts[0], parts[1]


@given(st.lists(st.binary(min_size=2, max_size=6).map(lambda b: bytes(x % 3 for x in b))))
def test_merges_are_the_last_step_of_encoding_each_token(words):
    ordered = [*(bytes([byte]) for byte in range(256)), *dict.fromkeys(words)]
    ranks = {piece: i for i, piece in enumerate(ordered)}
    expected = [reference_merge(piece, ranks) for piece in ordered[256:]]
    found = merges(Vocabulary(ordered, list(range(len(ordered))), {}))
    assert found == [(spelled(p[0]), spelled(p[1])) for p in expected if p is not None]


# GGUF


def write_gguf(file: pathlib.Path, metadata: dict[str, Any]) -> pathlib.Path:
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def test_gguf_metadata_of_smollm2_is_that_of_its_file():
    with real_tokenizers.smollm2_file().open("rb") as file:
        original = read_header(file.read(8 << 20), prefix="tokenizer.")
    # text never becomes the unknown token, and nothing reads its id
    assert original.pop("tokenizer.ggml.unknown_token_id") == 0
    assert metadata_of("smollm2") == original


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "llama3")) for name in SOURCES],
)
def test_we_read_the_same_vocabulary_back_from_gguf(tmp_path, name):
    original = SOURCES[name]().vocabulary
    read = read_vocabulary(write_gguf(tmp_path / "x.gguf", metadata_of(name)))
    for part in PARTS:
        assert getattr(read, part) == getattr(original, part), part
    if original.is_llama3:
        assert meta_file(read) == meta_file(original)
        assert "<|reserved_special_token_247|>" in read.specials
        assert "tojson }}" in (read.chat_template or "")
    else:
        assert read == original


def test_metadata_of_llama3_is_what_llama_cpp_expects():
    metadata = metadata_of("llama3")
    assert len(metadata["tokenizer.ggml.tokens"]) == 128_256
    assert metadata["tokenizer.ggml.token_type"][127_999:128_001] == [1, 3]
    assert metadata["tokenizer.ggml.pre"] == "llama-bpe"
    assert len(metadata["tokenizer.ggml.merges"]) == 128_000 - 256 - 588
    roles = [metadata[f"tokenizer.ggml.{r}_token_id"] for r in ("bos", "eos", "padding")]
    assert roles == [128_000, 128_001, 128_004]
    assert metadata["tokenizer.ggml.add_bos_token"] is True


def test_what_llama_cpp_cannot_do_is_refused():
    vocabulary = other_families().vocabulary
    with pytest.raises(InputError, match="GGUF has no name for the expression"):
        gguf_metadata(dataclasses.replace(vocabulary, pattern=r"\s+|\S+"))
    stuck = byte_level_vocabulary(
        {"a": 0, "b": 1, "aab": 2}, [], {}, ignore_merges=True, pattern=DIGITS_GPT2_PATTERN
    )
    with pytest.raises(InputError, match="no merge makes 1 of its tokens"):
        gguf_metadata(stuck)


def test_roles_of_ordinary_tokens_are_none(tmp_path):
    metadata = gguf_metadata(other_families().vocabulary)
    metadata |= {"tokenizer.ggml.bos_token_id": 8, "tokenizer.ggml.padding_token_id": 0}
    read = read_vocabulary(write_gguf(tmp_path / "x.gguf", metadata))
    assert (read.bos_id, read.adds_bos, read.pad_id) == (None, False, 12)


# The files of a run


@pytest.mark.parametrize(
    "name, kept",
    [
        ("small", ["tokenizer.model"]),
        ("other", ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]),
    ],
)
def test_a_tokenizer_survives_its_files(name, kept):
    tokenizer = SOURCES[name]()
    files = tokenizer.files()
    assert sorted(files) == kept
    assert Tokenizer.from_files(files, "memory").vocabulary == tokenizer.vocabulary


def test_a_llama3_with_a_template_keeps_it():
    files = hugging_face_files(small_tokenizer().vocabulary)
    read = Tokenizer.from_files(files, "memory")
    assert read.is_llama3 and read.files() == files


def test_files_without_a_tokenizer_are_refused():
    with pytest.raises(InputError, match="tokenizer in run: no tokenizer.model or tokenizer.json"):
        Tokenizer.from_files({"tokenizer_config.json": b"{}"}, "run")
    with pytest.raises(InputError, match="tokenizer in run/tokenizer_config.json: "):
        Tokenizer.from_files({"tokenizer.json": b"{}", "tokenizer_config.json": b"["}, "run")


# The chat template


CALL = ToolCall("wetter", {"ort": "Köln", "tage": [1, 2], "genau": True})
SEARCH = ToolCall("brave_search", {"query": "Llama 3"})
CODE = ToolCall("code_interpreter", {"code": "print(1)"})
DIALOGS = [
    [Message("user", "Who are you?")],
    [Message("system", "  Be brief.  "), Message("user", "hi "), Message("assistant", "Hello!")],
    [Message("user", (Image(), "what colour", " is it?", Image())), Message("assistant", "red")],
    [Message("assistant", "", (CALL,)), Message("ipython", '{"grad": 21}')],
    [Message("assistant", "", (SEARCH,), "end_of_message"), Message("tool", "found")],
    [Message("assistant", "so: ", (CODE,), "end_of_message"), Message("tool", "1")],
    [Message("assistant", "two", (CALL, CALL))],
]


def as_dict(message: Message) -> dict[str, Any]:
    content: Any = message.content
    if not isinstance(content, str):
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in content
        ]
    entry = {"role": message.role, "content": content, "stop": message.stop}
    if message.tool_calls:
        calls = [{"name": c.name, "arguments": c.arguments} for c in message.tool_calls]
        entry["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return entry


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("dialog", DIALOGS, ids=range(len(DIALOGS)))
def test_the_template_says_what_we_encode(vision_pair, dialog, prompt):
    ours, theirs = vision_pair
    expected = encode_dialog(ours, dialog, add_generation_prompt=prompt)
    found = theirs.apply_chat_template(
        [as_dict(message) for message in dialog],
        add_generation_prompt=prompt,
        return_dict=False,
    )
    assert found == expected


def test_the_template_refuses_tools_that_it_would_drop(vision_pair):
    _, theirs = vision_pair
    with pytest.raises(Exception, match="Describe the tools"):
        theirs.apply_chat_template(
            [as_dict(DIALOGS[0][0])], tools=[{"type": "function", "function": {"name": "f"}}]
        )


@settings(max_examples=50)
@given(contents=st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_the_template_renders_any_contents_verbatim(vision_pair, contents):
    ours, theirs = vision_pair
    dialog = [Message("user", content) for content in contents]
    rendered = theirs.apply_chat_template([as_dict(m) for m in dialog], tokenize=False)
    assert rendered == ours.decode(encode_dialog(ours, dialog, add_generation_prompt=False))
