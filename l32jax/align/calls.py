"""Whether an answer makes the right calls of tools, by the rules of BFCL's AST checker.

The Berkeley Function Calling Leaderboard (`ast_checker.py` of ShishirPatil/gorilla) says of a call:
the name is right, required arguments are there, others are known, types are those of the function's
description, and each value is one of those allowed. Calls count in any order.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from l32jax.align.prompts import Truth
from l32jax.data.tool_calls import ToolCall, parse_tool_calls
from l32jax.errors import InputError

# BFCL's names of types, and JSON Schema's.
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "float": (float, int),
    "number": (float, int),
    "boolean": (bool,),
    "array": (list,),
    "tuple": (list,),
    "dict": (dict,),
    "object": (dict,),
}
OPTIONAL = ""  # among the allowed values of an argument that may be left out
PASSED_OVER = re.compile(r"[ ,./\-_*^]")

# The allowed values of each argument.
Allowed = Mapping[str, Sequence[Any]]


def tool_calls(answer: str, truth: Truth) -> float:
    """1 if the answer consists of the right calls, else 0.

    The record's `check` has them as BFCL has its possible answers, and perhaps the descriptions of
    the functions: {"calls": [{"name": {"argument": [allowed, …]}}, …], "functions": […]}. Without
    `calls`, those of the reference answer are right, with its very values.
    """
    expected = _expected(truth)
    functions = {item["name"]: item for item in _descriptions(truth)}
    made = parse_tool_calls(answer)
    if len(made) != len(expected):
        return 0.0
    for call in made:  # greedy, as there
        fitting = next((e for e in expected if _fits(call, *e, functions.get(call.name))), None)
        if fitting is None:
            return 0.0
        expected.remove(fitting)
    return 1.0


def _expected(truth: Truth) -> list[tuple[str, Allowed]]:
    calls = truth.check.get("calls")
    if calls is None:
        made = parse_tool_calls(truth.answer or "")
        found = [(call.name, _just(call.arguments)) for call in made]
    else:
        found = [_allowed(call) for call in calls] if isinstance(calls, list) else []
    if not found:
        raise InputError('tool calls of a record: none; give {"calls": [{"name": {…}}]} as `check`')
    return found


def _just(value: Any) -> Any:
    """A value as the only one that is allowed; of objects, for each key."""
    if isinstance(value, dict):
        return {key: [_just(own)] for key, own in value.items()}
    return [_just(own) for own in value] if isinstance(value, list) else value


def _allowed(call: Any) -> tuple[str, Allowed]:
    match call:
        case dict() if len(call) == 1:
            ((name, arguments),) = call.items()
            if isinstance(arguments, dict) and all(isinstance(v, list) for v in arguments.values()):
                return name, arguments
    raise InputError(
        'tool call in a `check`: it is not {"name": {"argument": [allowed, …]}}; write it so'
    )


def _descriptions(truth: Truth) -> list[dict[str, Any]]:
    """Those that have what is looked at here."""
    found = truth.check.get("functions") or []
    items: list[Any] = found if isinstance(found, list) else [None]
    for item in items:
        match item:
            case {"name": str(), "parameters": {"properties": dict()}}:
                continue
        raise InputError(
            "functions in a `check`: one lacks its name, parameters or properties; give JSON Schema"
        )
    return items


def _fits(
    call: ToolCall, name: str, allowed: Allowed, description: Mapping[str, Any] | None
) -> bool:
    parameters = description["parameters"] if description else {}
    properties, required = parameters.get("properties"), parameters.get("required", [])
    given = call.arguments
    if call.name != name or any(argument not in given for argument in required):
        return False
    if any(argument not in given and OPTIONAL not in allowed[argument] for argument in allowed):
        return False
    return all(
        argument in allowed
        and (properties is None or argument in properties)
        and _has_type(value, properties and properties[argument], allowed[argument])
        and _is_allowed(value, allowed[argument])
        for argument, value in given.items()
    )


def _has_type(value: Any, schema: Any, allowed: Sequence[Any]) -> bool:
    """As described; or as what is allowed, where that is the name of a variable instead."""
    expected = TYPES.get(str(schema.get("type"))) if isinstance(schema, Mapping) else None
    if expected is None or _is_of(value, expected):
        return True
    meant = next((option for option in allowed if option != OPTIONAL), OPTIONAL)
    return meant != OPTIONAL and type(value) is type(meant)


def _is_of(value: Any, types: tuple[type, ...]) -> bool:
    return type(value) in types  # not isinstance: True is no integer here


def _is_allowed(value: Any, allowed: Sequence[Any]) -> bool:
    return any(_agrees(value, option) for option in allowed)


def _agrees(value: Any, option: Any) -> bool:
    """Whether a value is one that is allowed; of objects each key has several."""
    match value, option:
        case str(), str():
            return _letters(value) == _letters(option)
        case list(), list():
            return len(value) == len(option) and all(map(_agrees, value, option))
        case dict(), dict():
            return _objects_agree(value, option)
    return isinstance(value, bool) == isinstance(option, bool) and value == option


def _objects_agree(value: Mapping[str, Any], option: Mapping[str, Any]) -> bool:
    missing = [key for key in option if key not in value and OPTIONAL not in option[key]]
    known = all(key in option and _is_allowed(own, option[key]) for key, own in value.items())
    return known and not missing


def _letters(text: str) -> str:
    """What is left of dates and names when it does not matter how they are punctuated."""
    return PASSED_OVER.sub("", text).lower().replace("'", '"')
