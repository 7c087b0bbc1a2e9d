import json
import pathlib
import pickle
import struct

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from l32jax.data import tokenizer as tokenizer_module
from l32jax.data.tokenizer import StreamDecoder, Tokenizer
from l32jax.data.vocabulary import IMAGE
from l32jax.errors import InputError
from tests import golden
from tests.data_tests import real_tokenizers
from tests.data_tests.small_tokenizer_files import (
    hugging_face,
    ranks,
    small_tokenizer,
    write_gguf,
    write_json,
)

GOLDEN = golden.document("tokenizer_chat_meta.json")
SAMPLE = "what colour is the 3rd circle?\n\n  It's 2024, schöne 日本語 🙂👍🏽 <|eot_id|>\t²½Ⅷ"
# Includes what regular expressions treat differently: digits, spaces, apostrophes, marks.
AWKWARD = st.text(alphabet="aZ19 \n\t\r'.s²Ⅷé日½\u3000\xa0\u0085\u200b\x1cſ_🙂", max_size=30)
TEXT = st.one_of(st.text(max_size=60), AWKWARD)


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    return real_tokenizers.llama3()


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return real_tokenizers.smollm2()


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return small_tokenizer()


# Llama 3's own file


@pytest.mark.parametrize("text, tokens", GOLDEN["strings"])
def test_strings_encode_as_in_metas_code(llama3, text, tokens):
    assert llama3.encode(text) == tokens
    assert llama3.decode(tokens) == text


def test_special_tokens_are_metas_and_the_image_is_beyond_the_head(llama3):
    assert llama3.specials == GOLDEN["special"] | {"<|image|>": 128256}
    assert llama3.num_tokens == llama3.image_id == GOLDEN["n_words"]
    assert llama3.bos_id == 128000
    assert llama3.stop_ids == tuple(GOLDEN["stop"])
    assert llama3.pad_id == GOLDEN["pad"]
    assert llama3.is_llama3


def test_the_image_encodes_to_one_id_and_both_its_ids_decode(llama3):
    assert llama3.encode("<|image|>hi", allow_special=True) == [128256, 6151]
    assert llama3.decode([128256, 6151, 128011]) == "<|image|>hi<|image|>"


def test_special_names_in_text_are_text_unless_allowed(llama3):
    assert llama3.encode("<|eot_id|>") == [27, 91, 68, 354, 851, 91, 29]
    assert llama3.encode("<|eot_id|>", allow_special=True) == [128009]


@given(TEXT)
def test_decoding_inverts_encoding(text):
    tokenizer = real_tokenizers.llama3()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(TEXT)
def test_streaming_gives_the_same_text_in_whole_characters(text):
    tokenizer = Tokenizer.bytes_only()  # every character beyond ASCII is several tokens
    stream = StreamDecoder(tokenizer)
    pieces = [stream.feed(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert stream.finish() == ""


def test_a_stream_that_ends_inside_a_character_shows_it():
    stream = StreamDecoder(Tokenizer.bytes_only())
    assert [stream.feed(token) for token in "é".encode()[:1]] == [""]
    assert stream.finish() == "\ufffd"
    assert stream.feed(ord("a")) == "a"


def test_lone_surrogates_become_replacement_characters(llama3):
    assert llama3.decode(llama3.encode("a\ud800b")) == "a\ufffdb"


@given(st.text(alphabet="a \nb", max_size=60))
def test_long_texts_are_cut_inside_long_runs_only(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "MAX_RUN_CHARS", 5)
        patch.setattr(tokenizer_module, "MAX_ENCODE_CHARS", 20)
        parts = list(tokenizer_module._encodable_parts(text))
    assert "".join(parts) == text
    for part in parts:
        longest = max(map(len, tokenizer_module.RUNS.findall(part)), default=0)
        assert longest <= 5 and len(part) <= 20
    if len(text) <= 20 and max(map(len, tokenizer_module.RUNS.findall(text)), default=0) <= 5:
        assert len(parts) <= 1


def test_hard_texts_encode_in_bounded_time(llama3):
    for text in (" " * 500_000, "a" * 500_000, "\n" * 100_000 + "x", "\u0301" * 100_000):
        assert llama3.decode(llama3.encode(text)) == text


def test_unknown_ids_and_names_are_told(llama3):
    with pytest.raises(InputError, match="token 128257 in the tokens to decode"):
        llama3.decode([128257])
    with pytest.raises(InputError, match="token -1"):
        llama3.decode(np.array([1, -1]))
    with pytest.raises(InputError, match="eot_id"):
        llama3.special("<|eot|>")


def test_tokenizers_travel_to_worker_processes(small):
    copy = pickle.loads(pickle.dumps(small))
    assert copy.encode(SAMPLE) == small.encode(SAMPLE)


# Tokenizers made here


def test_bytes_only_is_utf8_and_llama3s_special_tokens():
    tokenizer = Tokenizer.bytes_only()
    assert tokenizer.encode("hé") == list("hé".encode())
    assert tokenizer.num_tokens == tokenizer.image_id == 512
    assert (tokenizer.bos_id, tokenizer.special("<|eot_id|>")) == (256, 265)


def test_training_learns_the_words_and_is_deterministic(small):
    assert small.num_tokens == 256 + 60 + 256
    assert len(small.encode(" circle")) == 1
    assert ranks(small) == ranks(small_tokenizer())
    assert small.decode(small.encode(SAMPLE)) == SAMPLE


def test_training_stops_when_every_word_is_one_token():
    tokenizer = Tokenizer.train(["ab"], num_merges=50)
    assert tokenizer.num_tokens == 256 + 1 + 256


def test_a_saved_tokenizer_reads_back_the_same(small, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(small.to_bytes())
    copy = Tokenizer.from_file(tmp_path)
    assert copy.encode(SAMPLE) == small.encode(SAMPLE)
    assert copy.specials == small.specials


def test_saving_reproduces_metas_file(llama3):
    assert llama3.to_bytes() == real_tokenizers.llama3_file().read_bytes()


def test_a_tokenizer_with_other_special_tokens_is_not_saved(smollm2):
    with pytest.raises(InputError, match="copy its original file"):
        smollm2.to_bytes()


# Hugging Face's tokenizer.json


@pytest.mark.parametrize("with_image", [False, True])
def test_tokenizer_json_agrees_with_the_rank_file(small, tmp_path, with_image):
    file = write_json(tmp_path, hugging_face(small, with_image=with_image))
    read = Tokenizer.from_file(file)
    assert read.encode(SAMPLE) == small.encode(SAMPLE)
    assert read.specials == small.specials
    for name in ("num_tokens", "bos_id", "stop_ids", "pad_id", "image_id", "is_llama3"):
        assert getattr(read, name) == getattr(small, name)


@pytest.fixture(scope="module")
def shuffled_file(small, tmp_path_factory) -> pathlib.Path:
    """The small tokenizer with its ids in another order."""
    content = hugging_face(small)
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {token: _new_id(rank, vocab) for token, rank in vocab.items()}
    return write_json(tmp_path_factory.mktemp("shuffled"), content)


def _new_id(rank: int, vocab: dict[str, int]) -> int:
    return len(vocab) - 1 - rank


@pytest.fixture(scope="module")
def shuffled(shuffled_file) -> Tokenizer:
    return Tokenizer.from_file(shuffled_file)


@given(text=TEXT)
def test_ids_need_not_be_in_the_order_of_merges(small, shuffled, text):
    last = len(ranks(small)) - 1
    assert shuffled.encode(text) == [last - rank for rank in small.encode(text)]
    assert shuffled.decode(shuffled.encode(text)) == text


def test_special_ids_survive_another_order_of_ids(small, shuffled):
    assert shuffled.encode("<|eot_id|>", allow_special=True) == [small.special("<|eot_id|>")]
    with pytest.raises(InputError, match="copy its original file"):
        shuffled.to_bytes()


GPT2_SPLIT = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "use_regex": True,
    "trim_offsets": True,
}
DIGITS_SPLIT = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2_SPLIT],
}


@pytest.fixture(
    scope="module", params=[{}, GPT2_SPLIT, DIGITS_SPLIT], ids=["llama3", "gpt2", "digits"]
)
def with_oracle(request, shuffled_file, tmp_path_factory):
    """A tokenizer.json read by us, and by the library that the format belongs to."""
    library = pytest.importorskip("tokenizers", reason="an optional oracle")
    content = json.loads(shuffled_file.read_text())
    if request.param:
        content["pre_tokenizer"] = request.param
    file = write_json(tmp_path_factory.mktemp("split"), content)
    return Tokenizer.from_file(file), library.Tokenizer.from_file(str(file))


@given(text=TEXT)
@example(text="a<|image|> b<|image|>")
def test_tokenizer_json_encodes_as_the_tokenizers_library_does(with_oracle, text):
    """But for the image: these files do not have it, and the model's input does all the same."""
    tokenizer, oracle = with_oracle
    first, *others = (oracle.encode(t, add_special_tokens=False).ids for t in text.split(IMAGE))
    expected = [*first, *(i for ids in others for i in [tokenizer.image_id, *ids])]
    assert tokenizer.encode(text, allow_special=True) == expected


def test_chat_template_and_ends_come_from_the_neighbours(small, tmp_path):
    content = hugging_face(small)
    first = len(ranks(small))
    content["added_tokens"] = [
        {"id": first, "content": "<s>"},
        {"id": first + 1, "content": "</s>"},
        {"id": first + 2, "content": "<|im_end|>"},
    ]
    config = {
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    read = Tokenizer.from_file(write_json(tmp_path, content).parent)
    assert (read.bos_id, read.stop_ids, read.pad_id) == (first, (first + 1, first + 2), first + 1)
    assert (read.num_tokens, read.image_id, read.is_llama3) == (first + 3, None, False)
    assert read.chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("j")
    assert Tokenizer.from_file(tmp_path).chat_template == "j"


# GGUF


def test_gguf_agrees_with_the_rank_file(small, tmp_path):
    read = Tokenizer.from_file(write_gguf(tmp_path / "small.gguf", small))
    assert read.encode(SAMPLE) == small.encode(SAMPLE)
    for name in ("num_tokens", "bos_id", "stop_ids", "pad_id", "image_id", "is_llama3"):
        assert getattr(read, name) == getattr(small, name)


def test_smollm2_is_what_its_file_says(smollm2):
    assert (smollm2.num_tokens, smollm2.bos_id, smollm2.pad_id) == (49152, None, 2)
    assert smollm2.stop_ids == (2, 0)  # <|im_end|>, <|endoftext|>
    assert smollm2.image_id is None and not smollm2.is_llama3
    assert smollm2.special("<|im_start|>") == 1
    assert "<|im_start|>" in smollm2.chat_template
    assert smollm2.encode("12 34") == [33, 34, 216, 35, 36]  # digit by digit
    assert smollm2.decode(smollm2.encode(SAMPLE)) == SAMPLE


def test_an_image_token_is_one_more_that_the_head_does_not_know(smollm2, small):
    seeing = smollm2.with_image_token()
    assert seeing.num_tokens == seeing.image_id == smollm2.num_tokens
    assert seeing.encode("<|image|>") == smollm2.encode("<|image|>")
    assert seeing.encode("a<|image|>", allow_special=True) == [*seeing.encode("a"), 49152]
    assert seeing.decode([49152, *seeing.encode(SAMPLE)]) == "<|image|>" + SAMPLE
    assert seeing.with_image_token() is seeing
    assert small.with_image_token() is small


def test_an_image_token_stays_in_the_files(smollm2):
    seeing = smollm2.with_image_token()
    files = seeing.files()
    read = Tokenizer.from_files(files, "memory")
    assert read.vocabulary == seeing.vocabulary
    assert (read.image_id, read.num_tokens) == (49152, 49152)
    assert read.files() == files


def test_an_image_token_that_is_not_the_last_is_a_word(tmp_path, small):
    """What a file says of it is not believed: the embedding has no place for it there."""
    content = hugging_face(small)
    first = content["added_tokens"][0]["id"]
    content["added_tokens"] = [
        {"id": first, "content": "<|image|>"},
        {"id": first + 1, "content": "</s>"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"image_token": "<|image|>"}))
    read = Tokenizer.from_file(write_json(tmp_path, content).parent)
    assert (read.image_id, read.num_tokens, read.special("<|image|>")) == (None, first + 2, first)
    with pytest.raises(InputError, match="the text model has it as a word"):
        read.with_image_token()


@pytest.fixture(scope="module")
def smollm2_oracle():
    """The same vocabulary in Hugging Face's own library, read by GGUF's own."""
    library = pytest.importorskip("tokenizers", reason="an optional oracle")
    import gguf
    from tokenizers import models, pre_tokenizers

    fields = gguf.GGUFReader(real_tokenizers.smollm2_file()).fields
    tokens, merges = (fields[f"tokenizer.ggml.{k}"].contents() for k in ("tokens", "merges"))
    vocab = {token: i for i, token in enumerate(tokens)}
    oracle = library.Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    oracle.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    return oracle


def has_every_byte(tokenizer: Tokenizer, text: str) -> bool:
    """Else Hugging Face merges what stands on both sides of a lost byte, and we do not."""
    vocabulary = tokenizer.vocabulary
    tokens = zip(vocabulary.pieces, vocabulary.ids, strict=True)
    lost = {piece[0] for piece, i in tokens if i is None}
    return lost.isdisjoint(text.encode(errors="replace"))


def test_a_byte_without_a_token_is_dropped_after_merging(smollm2):
    colon = smollm2.encode(":")
    assert smollm2.encode(":\x16:") == colon + colon != smollm2.encode("::")


@given(text=TEXT)
def test_smollm2_encodes_as_the_tokenizers_library_does(smollm2, smollm2_oracle, text):
    assume(has_every_byte(smollm2, text))
    assert smollm2.encode(text) == smollm2_oracle.encode(text, add_special_tokens=False).ids


def test_every_word_of_smollm2_encodes_as_in_the_tokenizers_library(smollm2, smollm2_oracle):
    words = [smollm2.decode([i]) for i in range(17, smollm2.num_tokens)]
    expected = smollm2_oracle.encode_batch(words, add_special_tokens=False)
    for word, encoding in zip(words, expected, strict=True):
        assert smollm2.encode(word) == encoding.ids, word


def test_the_image_is_after_the_last_token_wherever_a_file_puts_it(small, tmp_path):
    content = hugging_face(small)
    content["added_tokens"].append(
        content["added_tokens"][0] | {"id": 9000, "content": "<|image|>"}
    )
    read = Tokenizer.from_file(write_json(tmp_path, content))
    assert (read.num_tokens, read.image_id) == (small.num_tokens, small.image_id)
    assert read.decode([9000]) == "<|image|>"


# Files that are no tokenizers


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


@settings(max_examples=200, deadline=None)
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
