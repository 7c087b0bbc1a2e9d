"""What is drawn follows from the seed, the prompt and the answer's number, and nothing else."""

import jax
import numpy as np
import pytest

import l32jax
from l32jax.align.prompts import Prompt, Truth, prompt_of
from l32jax.align.sampling import answers, fault, fingerprint
from l32jax.config import MeshConfig, SamplingConfig
from l32jax.data.chat import Image, Message
from l32jax.data.records import Bad, Record
from l32jax.generate import decode as generation
from l32jax.generate.model import Model
from l32jax.model.llama import init_params
from l32jax.sharding import make_mesh, single_device_mesh
from tests import golden
from tests.checkpoint_tests.weights import random_params
from tests.data_tests.pictures import png

NUMBER = 3
SAMPLING = SamplingConfig(max_new_tokens=8, temperature=1.0)
TEXTS = ["Why?", "What is two and two?", "x" * 50, "Name a colour, and say who likes it."]


@pytest.fixture(scope="module")
def text_model():
    return l32jax.load("tiny-text")


@pytest.fixture(scope="module")
def vision_model():
    """Random gates: at zero, images would change nothing."""
    model = l32jax.load("tiny-vision")
    return Model(model.config, random_params(model.config), model.tokenizer, model.mesh)


def asked(text: str, *images: bytes) -> Prompt:
    return Prompt((Message("user", (*map(Image, images), text)),))


def drawn(model, prompts, *, rows=4, number=NUMBER, sampling=SAMPLING) -> dict:
    found = {}
    for group in answers(model, prompts, number=number, sampling=sampling, rows=rows):
        assert [answer.number for answer in group] == list(range(number))
        found[group[0].prompt.key] = [tuple(answer.tokens) for answer in group]
    assert len(found) == len(prompts)
    return found


@pytest.fixture(scope="module")
def expected(text_model):
    return drawn(text_model, list(map(asked, TEXTS)))


def test_answers_differ_from_each_other_and_by_the_seed(text_model, expected):
    assert len({tokens for each in expected.values() for tokens in each}) == NUMBER * len(TEXTS)
    sampling = SamplingConfig(max_new_tokens=8, temperature=1.0, seed=1)
    assert drawn(text_model, list(map(asked, TEXTS)), sampling=sampling) != expected


@pytest.mark.parametrize("rows", [1, 6, 100])
def test_neither_rows_nor_order_change_an_answer(rows, text_model, expected):
    prompts = [asked(text) for text in reversed(TEXTS)]
    assert drawn(text_model, prompts, rows=rows) == expected


def test_neither_neighbours_nor_the_number_of_answers_change_an_answer(text_model, expected):
    prompt = asked(TEXTS[1])
    (more,) = drawn(text_model, [prompt], number=5).values()
    assert more[:NUMBER] == expected[prompt.key]


@pytest.mark.slow
def test_devices_that_share_the_work_draw_the_same(text_model, expected):
    model = l32jax.load("tiny-text", mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert fingerprint(model.params) == fingerprint(text_model.params)
    assert drawn(model, list(map(asked, TEXTS))) == expected


def test_answers_to_prompts_with_pictures_depend_on_them(vision_model):
    one, other = png(28, 28), png(28, 60, 1)
    prompts = [asked("What?", one), asked("What?", other), asked("What?"), asked("?", one, other)]
    together = drawn(vision_model, prompts, rows=6)
    assert len({tuple(each) for each in together.values()}) == len(prompts)
    for prompt in prompts:
        assert drawn(vision_model, [prompt], rows=3) == {prompt.key: together[prompt.key]}


def test_new_parameters_of_the_same_shapes_compile_nothing(text_model):
    prompts = list(map(asked, TEXTS))

    def with_params(seed):
        with jax.set_mesh(text_model.mesh):
            params = jax.jit(lambda key: init_params(text_model.config, key))(jax.random.key(seed))
        return Model(text_model.config, params, text_model.tokenizer, text_model.mesh)

    first = drawn(with_params(1), prompts)
    compiled = (generation.prefill._cache_size(), generation.decode._cache_size())
    for seed in (2, 3):
        assert drawn(with_params(seed), prompts) != first
    assert (generation.prefill._cache_size(), generation.decode._cache_size()) == compiled


def test_an_answer_is_finished_if_it_ends_by_itself(text_model):
    sampling = SamplingConfig(max_new_tokens=60, temperature=1.0)
    stops = text_model.tokenizer.stop_ids
    groups = answers(text_model, [asked("?")], number=32, sampling=sampling, rows=32)
    told = [answer for group in groups for answer in group]
    assert {answer.finished for answer in told} == {True, False}
    for answer in told:
        assert answer.finished == (answer.tokens[-1] in stops)
        assert answer.num_tokens == len(answer.tokens) <= 60
        assert answer.finished or answer.num_tokens == 60
        assert not set(answer.tokens[:-1]) & set(stops)


def test_what_cannot_be_asked_is_told(text_model, vision_model):
    assert fault(text_model, asked("Why?"), SAMPLING) is None
    assert "above 1024" in fault(text_model, asked("x" * 1000), SAMPLING)
    assert "not one of BMP" in fault(vision_model, asked("?", b"x"), SAMPLING)
    assert "text" in fault(text_model, asked("?", png(28, 28)), SAMPLING)


# Prompts


def test_the_last_answer_is_the_truth_and_the_rest_is_asked():
    turns = tuple(Message(role, role) for role in ("system", "user", "assistant"))
    record = Record("here", messages=turns, check={"tests": "a"})
    assert prompt_of(record) == Prompt(turns[:2], Truth("assistant", {"tests": "a"}), "here")
    again = Record("here", messages=(*turns, turns[1]))
    assert prompt_of(again) == Prompt(again.messages, Truth(), "here")
    for bad in (Record("here", parts=("a",)), Record("here", messages=turns[2:])):
        assert isinstance(prompt_of(bad), Bad)


def test_the_key_of_a_prompt_is_that_of_what_it_holds(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(28, 28))
    user = Message("user", (Image(path), "?"))
    key = Prompt((user,), Truth("a")).key
    assert key == Prompt((Message("user", (Image(png(28, 28)), "?")),), Truth("a"), "x").key
    others = [
        Prompt((user,), Truth("b")),
        Prompt((user,), Truth("a", {"tests": ""})),
        Prompt((Message("user", (Image(png(28, 28, 1)), "?")),), Truth("a")),
        Prompt((Message("user", ("?", Image(path))),), Truth("a")),
        Prompt((Message("system", user.content),), Truth("a")),
    ]
    assert len({key, *(other.key for other in others)}) == 1 + len(others)


def test_the_fingerprint_is_that_of_the_bits_wherever_they_lie():
    params = random_params(golden.TEXT)
    told = fingerprint(params)
    assert (
        told
        == fingerprint(random_params(golden.TEXT))
        != fingerprint(random_params(golden.TEXT, seed=1))
    )
    leaves, tree = jax.tree.flatten(params)
    changed = np.array(leaves[0])
    changed.view(np.uint32).flat[0] ^= 1
    with jax.set_mesh(single_device_mesh()):
        assert told != fingerprint(jax.tree.unflatten(tree, [changed, *leaves[1:]]))
