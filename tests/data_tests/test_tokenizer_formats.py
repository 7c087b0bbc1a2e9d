"""Tokenizers of other formats and families are what their own libraries make of them."""

import json
import pathlib

import pytest
from hypothesis import assume, example, given

from l32jax.data.tokenizer import Tokenizer
from l32jax.data.vocabulary import IMAGE
from l32jax.errors import InputError
from tests.data_tests import real_tokenizers
from tests.data_tests.awkward_text import SAMPLE, TEXT, has_every_byte
from tests.data_tests.small_tokenizer_files import (
    hugging_face,
    ranks,
    write_gguf,
    write_json,
)

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
