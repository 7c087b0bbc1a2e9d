"""Real weights from GGUF to Orbax to Hugging Face to GGUF, and still the same text.

llama.cpp is not among the tests' packages, since it takes long to build. Where it is there
(`pip install llama-cpp-python`), it reads the original and our file.
"""

import ctypes

import numpy as np
import pytest

import l32jax
from l32jax.checkpoint import gguf_file
from l32jax.conversion.convert import convert
from tests.data_tests.real_tokenizers import smollm2_file
from tests.smollm2 import transformers_model

QUESTIONS = (
    "What is the capital of France?",
    "Explain gravity to a child.",
    "What is 2+2?",
)
NEW_TOKENS = 20
F16 = 1  # llama_ftype of llama.h

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folder with all of them, each made from the one before."""
    home = tmp_path_factory.mktemp("smollm2")
    convert(smollm2_file(), home / "orbax", verify=True)
    convert(home / "orbax", home / "hf", to="hf", verify=True)
    convert(home / "hf", home / "f16.gguf", dtype="float16", verify=True)
    return home


def test_transformers_says_what_it_says_with_the_original_weights(chain):
    torch = pytest.importorskip("torch", reason="torch is installed on Python 3.11 only")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(chain / "hf")
    exported, report = transformers.AutoModelForCausalLM.from_pretrained(
        chain / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    original = transformers_model(smollm2_file())
    for question in QUESTIONS:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        how = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        ours, theirs = (model.generate(**asked, **how)[0] for model in (exported, original))
        text = tokenizer.decode(ours[asked["input_ids"].shape[1] :], skip_special_tokens=True)
        assert ours.tolist() == theirs.tolist(), text
        assert text == l32jax.load(chain / "f16.gguf").generate(question, max_new_tokens=NEW_TOKENS)


def test_every_way_round_says_the_same(chain):
    answers = {
        path: l32jax.load(path).generate(list(QUESTIONS), max_new_tokens=NEW_TOKENS)
        for path in (smollm2_file(), chain / "orbax", chain / "hf", chain / "f16.gguf")
    }
    assert len(set(map(tuple, answers.values()))) == 1, answers


def test_llama_cpp_says_what_it_says_of_the_original(chain):
    """Of the original as llama.cpp itself unpacks it to F16: with packed weights it rounds
    activations to eight bits, and no longer agrees with its own unpacked file."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed")
    options = llama_cpp.llama_model_quantize_default_params()
    options.allow_requantize, options.ftype = True, F16
    unpacked = chain / "unpacked.gguf"
    paths = (str(path).encode() for path in (smollm2_file(), unpacked))
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(options)) == 0

    theirs, ours = gguf_file.read(unpacked), gguf_file.read(chain / "f16.gguf")
    assert theirs.tensors.keys() == ours.tensors.keys()
    for name in theirs.tensors:
        every = slice(None)
        np.testing.assert_array_equal(theirs.read(name, every), ours.read(name, every), name)

    def answers(path) -> list[str]:
        model = llama_cpp.Llama(str(path), n_ctx=256, verbose=False, seed=0)
        asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
        told = [
            model.create_chat_completion(messages, temperature=0, max_tokens=NEW_TOKENS)
            for messages in asked
        ]
        return [answer["choices"][0]["message"]["content"] for answer in told]

    assert answers(unpacked) == answers(chain / "f16.gguf")
