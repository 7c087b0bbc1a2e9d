from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax.data.chat import Image, Message
from l32jax.data.records import Bad, Record, to_sample
from l32jax.data.sources import fields
from l32jax.data.sources.fields import make_record
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError

ONE, TWO = Image(Path("folder/1.png")), Image(b"2")
HF_ONE, HF_TWO = {"bytes": None, "path": "1.png"}, {"bytes": b"2", "path": "lost.png"}


def find(name: str) -> Path:
    if ".." in name:
        raise InputError(f"file {name!r}: it lies outside")
    return Path("folder") / name


def asked(*content: str | Image) -> tuple[Message, ...]:
    return Message("user", content if len(content) > 1 else str(content[0])), ANSWER


ANSWER = Message("assistant", "red")
SAID = {"role": "assistant", "content": "red"}
GPT = {"from": "gpt", "value": "red"}

DOCUMENTS = [
    ({"prompt": "write a story", "text": "once"}, ("once",)),
    ({"image": "1.png", "question": "?", "caption": "a dog"}, (ONE, "a dog")),
    ({"text": "a <image>"}, ("a <image>",)),
    ({"text": "a", "image": None, "caption": None}, ("a",)),
    ({"image": "1.png", "text": "a <image>"}, (ONE, "a <image>")),
    ({"image": HF_TWO, "caption": "a"}, (TWO, "a")),
    ({"image": b"2", "caption": "a", "url": "x"}, (TWO, "a")),
    ({"texts": ["a", None, "b", None], "images": [None, "1.png", None, HF_TWO]},
     ("a", ONE, "b", TWO)),
    ({"texts": ["a", None, "b"]}, ("a", "b")),
    ({"texts": [None, "b"], "images": [None, None]}, ("b",)),
    ({"parts": [{"image": "1.png"}, "a", {"image": HF_TWO}]}, (ONE, "a", TWO)),
    ({"parts": ["a <image>", ""]}, ("a <image>",)),
    ({"text": "<image>\na<|image|>b", "images": ["1.png", b"2"]}, (ONE, "a", TWO, "b")),
]  # fmt: skip

DIALOGS = [
    ({"messages": [{"role": "user", "content": "<image>?"}, SAID]}, asked("<image>?")),
    (
        {"messages": [{"role": "user", "content": [{"image": "1.png"}, "?"]}, SAID]},
        asked(ONE, "?"),
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [
                    {"type": "image", "text": None}, {"type": "text", "text": "?"},
                    {"type": "image", "text": None},
                ]},
                {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
            ],
            "images": [HF_ONE, HF_TWO],
        },
        asked(ONE, "?", TWO),
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "1.png"}]}, SAID]},
        (Message("user", (ONE,)), ANSWER),
    ),
    (
        {"messages": [{"role": "user", "content": "<image>\na <|image|>"}, SAID],
         "images": ["1.png", b"2"]},
        asked(ONE, "a ", TWO),
    ),
    (
        {"image": "1.png", "conversations": [{"from": "human", "value": "?\n<image>"}, GPT]},
        asked("?", ONE),
    ),
    ({"conversations": [{"from": "human", "value": "?"}, GPT]}, asked("?")),
    ({"image": "1.png", "question": "?", "answer": "red"}, asked(ONE, "?")),
    ({"images": ["1.png", b"2"], "question": "?", "answer": "red"}, asked(ONE, TWO, "?")),
    ({"question": "?", "answer": "red"}, asked("?")),
    ({"prompt": "?", "completion": "red"}, asked("?")),
    ({"prompt": "?", "completion": "red", "text": "? red"}, asked("?")),
    ({"prompt": [{"role": "user", "content": "?"}], "completion": [SAID]}, asked("?")),
    ({"image": "1.png", "prompt": "<image>?", "completion": "red"}, asked(ONE, "?")),
]  # fmt: skip

USER = {"role": "user", "content": "?"}
BAD = [
    ({"messages": [USER, {"role": "assistant", "content": "I look.", "tool_calls": [{}]}]},
     "tool_calls beside its content"),
    *(({"prompt": "?", "chosen": "a", "rejected": "b", "margin": margin}, "a score is no number")
      for margin in (10**400, float("nan"), float("inf"))),
    ([], "not an object"),
    ({}, "no known kind"),
    ({"image": "1.png"}, "no known kind"),
    ({"image": "1.png", "prompt": "?"}, "0 places for 1 images"),
    ({"prompt": 5}, "'prompt' is not a list"),
    ({"prompt": []}, "no turns"),
    ({"prompt": "?", "completion": " "}, "'assistant' is empty"),
    ({"text": " \n"}, "no text"),
    ({"text": ""}, "no text"),
    ({"text": 5}, "int stands where text"),
    ({"text": "\ud800"}, "not Unicode"),
    ({"image": "../1.png", "text": "a"}, "outside"),
    ({"image": 5, "text": "a"}, "neither bytes nor a path"),
    ({"image": {"bytes": None, "path": None}, "text": "a"}, "neither bytes nor a path"),
    ({"parts": [{"image": "1.png"}]}, "no text"),
    ({"parts": "a"} | {"parts": 5}, "'content' is not a list"),
    ({"parts": [5]}, "lacks 'text'"),
    ({"parts": [{"type": "image"}, "a"]}, "1 places for 0 images"),
    ({"texts": ["a"], "images": [None, None]}, "1 texts and 2 images"),
    ({"texts": ["a"], "images": ["1.png"]}, "at the same place"),
    ({"texts": [None], "images": ["1.png"]}, "no text"),
    ({"text": "a<image>", "images": []}, "1 places for 0 images"),
    ({"text": "a", "images": ["1.png"]}, "0 places for 1 images"),
    ({"text": "a", "images": ["1.png"] * 1001}, "more than 1000"),
    ({"image": "1.png", "conversations": [{"from": "human", "value": "?"}, GPT]}, "0 places for 1"),
    ({"conversations": [{"from": "human", "value": "<image>"}, GPT]}, "1 places for 0"),
    ({"conversations": [{"from": "gpt"}]}, "lacks 'value'"),
    ({"messages": []}, "no turns"),
    ({"text": "a", "check": "a"}, "'check' is not an object"),
    ({"messages": [USER, SAID | {"content": " "}]}, "'assistant' is empty"),
    ({"messages": [USER, {"role": "assistant"}]}, "lacks 'content'"),
    ({"messages": [USER | {"role": "nobody"}, SAID]}, "no such role"),
    ({"messages": [USER, SAID], "images": ["1.png"]}, "0 places for 1 images"),
    ({"messages": {"role": "user"}}, "'messages' is not a list"),
    ({"messages": ["?"]}, "lacks 'content'"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "parts"), DOCUMENTS)
def test_documents_are_known_by_their_fields(given, parts):
    assert make_record(given, "here", find) == Record("here", parts=parts)


@pytest.mark.parametrize(("given", "messages"), DIALOGS)
def test_conversations_are_known_by_their_fields(given, messages):
    assert make_record(given, "here", find) == Record("here", messages=messages)


def test_a_check_is_kept_as_it_is_with_whatever_it_belongs_to():
    check = {"tests": "assert f(1) == 2", "calls": [{"f": {"a": [1]}}]}
    record = make_record({"question": "?", "answer": "red", "check": check}, "here", find)
    assert record == Record("here", messages=asked("?"), check=check)


@pytest.mark.parametrize("given", [{"messages": [USER]}, {"prompt": "?"}, {"question": "?"}])
def test_a_prompt_without_an_answer_is_a_record_of_which_nothing_can_be_learned(given):
    record = make_record(given, "here", find)
    assert record == Record("here", messages=(Message("user", "?"),))
    sample = to_sample(record, Tokenizer.bytes_only(), with_images=True)
    assert sample == Bad("here", "the assistant says nothing in it")


@pytest.mark.parametrize(("given", "why"), BAD)
def test_what_does_not_fit_is_bad(given, why):
    found = make_record(given, "here", find)
    assert isinstance(found, Bad) and why in found.why and found.place == "here"


def test_large_images_are_bad(monkeypatch):
    monkeypatch.setattr(fields, "MAX_BYTES", 3)
    found = make_record({"image": b"1234", "text": "a"}, "here", find)
    assert isinstance(found, Bad) and "more than 3 bytes" in found.why


NAMES = st.sampled_from(
    [*fields.FIELDS, "role", "content", "from", "value", "type", "bytes", "path", "other"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(max_size=5)
    | st.sampled_from(["user", "assistant", "<image>", "image", "text", "gpt"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(NAMES, VALUES, max_size=5))
def test_whatever_the_fields_nothing_is_raised(given_fields):
    assert isinstance(make_record(given_fields, "here", find), Record | Bad)
