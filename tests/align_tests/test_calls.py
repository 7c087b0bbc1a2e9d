"""Calls of tools are right by BFCL's rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l32jax.align.calls import tool_calls
from l32jax.align.prompts import Truth
from l32jax.align.verifiers import verdict
from l32jax.data.tool_calls import ToolCall, render_tool_call

WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "dict",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "units": {"type": "string"},
            "above": {"type": "float"},
            "hours": {"type": "array", "items": {"type": "integer"}},
            "place": {"type": "dict"},
        },
        "required": ["city"],
    },
}
EXPECTED = {
    "city": ["New York", "NYC"],
    "days": [3],
    "units": ["celsius", ""],
    "above": [20.0, ""],
    "hours": [[1, 2], ""],
    "place": [{"lat": [1.5], "name": ["Park", ""]}, ""],
}
TRUTH = Truth(None, {"calls": [{"get_weather": EXPECTED}], "functions": [WEATHER]})


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('[get_weather(city="New York", days=3)]', 1),
        ('{"name": "get_weather", "parameters": {"city": "NYC", "days": 3}}', 1),
        ('<function=get_weather>{"city": "NYC", "days": 3}</function>', 1),
        ('[get_weather(city="new-york", days=3, units="Celsius")]', 1),
        ('[get_weather(city="NYC", days=3, above=20)]', 1),
        ('[get_weather(city="NYC", days=3, hours=(1, 2))]', 1),
        ('[get_weather(city="NYC", days=3, hours=[2, 1])]', 0),
        ('[get_weather(city="NYC", days=3, place={"lat": 1.5})]', 1),
        ('[get_weather(city="NYC", days=3, place={"lat": 1.5, "name": "park"})]', 1),
        ('[get_weather(city="NYC", days=3, place={"name": "park"})]', 0),
        ('[get_weather(city="NYC", days=3, place={"lat": 1.5, "lon": 2})]', 0),
        ('[get_weather(city="Boston", days=3)]', 0),
        ("[get_weather(days=3)]", 0),
        ('[get_weather(city="NYC")]', 0),
        ('[get_weather(city="NYC", days="3")]', 0),
        ('[get_weather(city="NYC", days=3.0)]', 0),
        ('[get_weather(city="NYC", days=True)]', 0),
        ('[get_weather(city="NYC", days=3, wind=1)]', 0),
        ('[weather(city="NYC", days=3)]', 0),
        ('[get_weather(city="NYC", days=3), get_weather(city="NYC", days=3)]', 0),
        ("It will rain.", 0),
        ("", 0),
    ],
)
def test_a_call_is_right_in_name_arguments_types_and_values(answer, score):
    assert tool_calls(answer, TRUTH) == score


def test_calls_in_any_order_are_right_and_each_counts_once():
    truth = Truth(None, {"calls": [{"f": {"a": [1]}}, {"f": {"a": [2]}}, {"g": {}}]})
    assert tool_calls("[g(), f(a=2), f(a=1)]", truth) == 1
    assert tool_calls("[g(), f(a=1), f(a=1)]", truth) == 0
    assert tool_calls("[f(a=1), f(a=2)]", truth) == 0


def test_the_name_of_a_variable_may_stand_where_it_is_allowed():
    properties = {"data": {"type": "array"}}
    functions = [{"name": "f", "parameters": {"properties": properties, "required": ["data"]}}]
    truth = Truth(None, {"calls": [{"f": {"data": ["my_list"]}}], "functions": functions})
    assert tool_calls('[f(data="my_list")]', truth) == 1
    assert tool_calls("[f(data=[1])]", truth) == 0


VALUES = st.recursive(
    st.integers(-99, 99)
    | st.booleans()
    | st.none()
    | st.floats(-9, 9)
    | st.text("abc", min_size=1),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("xyz", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
CALLS = st.builds(
    ToolCall, st.text("fgh", min_size=1, max_size=3),
    st.dictionaries(st.text("abc", min_size=1, max_size=2), VALUES, max_size=3),
)  # fmt: skip


@given(CALLS, CALLS)
def test_the_calls_of_the_reference_are_right_and_others_are_not(call, other):
    reference, answer = render_tool_call(call, "json"), render_tool_call(other, "json")
    assert tool_calls(reference, Truth(reference)) == 1
    if not (call.name == other.name and call.arguments == other.arguments):
        same_shape = call.name == other.name and call.arguments.keys() == other.arguments.keys()
        assert same_shape or tool_calls(answer, Truth(reference)) == 0


@given(st.text() | CALLS.map(lambda call: render_tool_call(call, "json")), st.data())
def test_whatever_the_check_there_is_a_score(answer, data):
    names = st.sampled_from(["calls", "functions", "name", "parameters", "properties", "f", "a"])
    junk = st.recursive(
        VALUES, lambda inner: st.lists(inner) | st.dictionaries(names, inner), max_leaves=8
    )
    check = data.draw(st.dictionaries(names, junk, max_size=3))
    assert 0 <= verdict(tool_calls, answer, Truth("[f(a=1)]", check)).score <= 1
