"""Tokenizers: two that real models have, and a small one that is learned in a moment."""

import pytest

from l32jax.data.tokenizer import Tokenizer
from tests.data_tests import real_tokenizers
from tests.data_tests.small_tokenizer_files import small_tokenizer


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    return real_tokenizers.llama3()


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return real_tokenizers.smollm2()


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return small_tokenizer()
