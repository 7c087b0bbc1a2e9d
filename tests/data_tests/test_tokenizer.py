"""What Llama 3's tokenizer, and those made here, make of text."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax.data import tokenizer as tokenizer_module
from l32jax.data.tokenizer import StreamDecoder, Tokenizer
from l32jax.errors import InputError
from tests import golden
from tests.data_tests import real_tokenizers
from tests.data_tests.awkward_text import SAMPLE, TEXT
from tests.data_tests.small_tokenizer_files import ranks, small_tokenizer

GOLDEN = golden.document("tokenizer_chat_meta.json")


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
