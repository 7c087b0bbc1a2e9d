"""Calls of tools as text: how assistants write them, how prompts ask for them, how to read them.

Four spellings exist, all of them Meta's: JSON and <function=…> tags (Llama 3.1 and the vision
models), Python lists (Llama 3.2 1B and 3B), and `name.call(query="…")` for built-in tools.
"""

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from l32jax.errors import InputError

ToolFormat = Literal["json", "function_tag", "python_list"]

QUERY_TOOLS = ("brave_search", "wolfram_alpha", "photogen")
CODE_INTERPRETER = "code_interpreter"
PYTHON_TAG = "<|python_tag|>"
MAX_CHARS = 1 << 16
MAX_DEPTH = 64

PYTHONIC_PROMPT = """\
You are an expert in composing functions. You are given a question and a set of possible functions.
Based on the question, you will need to make one or more function/tool calls to achieve the purpose.
If none of the function can be used, point it out. If the given question lacks the parameters \
required by the function,
also point it out. You should only return the function call in tools call sections.

If you decide to invoke any of the function(s), you MUST put it in the format of \
[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]
You SHOULD NOT include any other text in the response.

Here is a list of functions in JSON format that you can invoke.

"""
JSON_PROMPT = """\
Answer the user's question by making use of the following functions if needed.
If none of the function can be used, please say so.
Here is a list of functions in JSON format:
{tools}

Return function calls in JSON format."""

QUERY_CALL = re.compile(rf'({"|".join(QUERY_TOOLS)})\.call\(query="([^"]*)"\)')
FUNCTION_TAG = re.compile(r"<function=([\w.-]+)>\s*")
BETWEEN_CALLS = re.compile(r"[\s;,]*")
TURN_END = re.compile(r"(?:<\|eot_id\|>|<\|eom_id\|>|<\|end_of_text\|>)\s*$")


@dataclass(frozen=True)
class ToolCall:
    """A call that the assistant makes: JSON-like arguments by name."""

    name: str
    arguments: dict[str, Any]


def pythonic_tools_prompt(tools: Sequence[Mapping[str, Any]]) -> str:
    """System text with which Llama 3.2 1B and 3B were tuned; answers are Python lists of calls."""
    return PYTHONIC_PROMPT + json.dumps(list(tools), indent=4)


def json_tools_prompt(tools: Sequence[Mapping[str, Any]]) -> str:
    """Text in the style of Llama 3.1 and the vision models; the answer is one call as JSON."""
    return JSON_PROMPT.format(tools="\n".join(json.dumps(tool, indent=4) for tool in tools))


# Writing


def render_tool_call(call: ToolCall, tool_format: ToolFormat) -> str:
    """The call as Meta's formatter writes it (which quotes nothing inside Python strings)."""
    if call.name in QUERY_TOOLS:
        return f'{call.name}.call(query="{_text_argument(call, "query")}")'
    if call.name == CODE_INTERPRETER:
        return _text_argument(call, "code")
    if tool_format == "json":
        return json.dumps({"type": "function", "name": call.name, "parameters": call.arguments})
    if tool_format == "function_tag":
        return f"<function={call.name}>{json.dumps(call.arguments)}</function>"
    return f"[{call.name}({_python_items(call.arguments)})]"


def _text_argument(call: ToolCall, name: str) -> str:
    value = call.arguments.get(name)
    if not isinstance(value, str):
        raise InputError(
            f"arguments of {call.name} in a tool call: {name!r} is missing or no text; "
            f'give {{"{name}": "…"}}'
        )
    return value


def _python_items(items: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_python_value(value)}" for name, value in items.items())


def _python_value(value: Any) -> str:
    match value:
        case str():
            return f'"{value}"'
        case list():
            return f"[{', '.join(map(_python_value, value))}]"
        case dict():
            return f"{{{_python_items(value)}}}"
        case None | bool() | int() | float():
            return str(value)
    raise InputError(f"value {value!r:.80} in a tool call: it is no JSON value; convert it first")


# Reading


def parse_tool_calls(text: str) -> list[ToolCall]:
    """The calls that an assistant's answer consists of; [] for ordinary text. Never raises.

    After <|python_tag|> whatever is no call is code for the code interpreter, as Meta reads it.
    """
    if len(text) > MAX_CHARS:
        return []
    body = TURN_END.sub("", text.strip())
    has_tag = body.startswith(PYTHON_TAG)
    body = body.removeprefix(PYTHON_TAG).strip()
    try:
        calls = _calls(body)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last: Python's parser
        calls = []
    if not calls and has_tag and body:
        return [ToolCall(CODE_INTERPRETER, {"code": body})]
    return calls


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def _calls(body: str) -> list[ToolCall]:
    if query := QUERY_CALL.fullmatch(body):
        return [ToolCall(query[1], {"query": query[2]})]
    if FUNCTION_TAG.search(body):
        return list(_tagged_calls(body))
    if body.startswith("{") or re.match(r"\[\s*\{", body):
        return list(_json_calls(body))
    if body.startswith("["):
        return _python_calls(body)
    return []


def _tagged_calls(body: str) -> Iterator[ToolCall]:
    position = 0
    while tag := FUNCTION_TAG.search(body, position):
        arguments, position = JSON.raw_decode(body, tag.end())
        if not isinstance(arguments, dict):
            raise ValueError("arguments are no object")
        yield ToolCall(tag[1], arguments)


def _json_calls(body: str) -> Iterator[ToolCall]:
    """One object, several in a row (also with ";" or "," between), or a list of objects."""
    position = 0
    while position < len(body):
        value, position = JSON.raw_decode(body, position)
        for item in value if isinstance(value, list) else [value]:
            yield _json_call(item)
        between = BETWEEN_CALLS.match(body, position)
        position = between.end() if between else position


def _json_call(item: Any) -> ToolCall:
    match item:
        case {"name": str(name), "parameters": dict(arguments)}:
            return ToolCall(name, arguments)
        case {"name": str(name), "arguments": dict(arguments)}:
            return ToolCall(name, arguments)
    raise ValueError("this JSON is no call")


def _python_calls(body: str) -> list[ToolCall]:
    """[f(a=1), g()], and [f(a=1)][g()] as Meta's formatter writes two calls."""
    _check_depth(body)
    with warnings.catch_warnings(action="ignore"):  # of odd escapes in the model's strings
        node = ast.parse(body, mode="eval").body
    groups: list[list[ast.expr]] = []
    while isinstance(node, ast.Subscript):
        inner = node.slice
        groups.append(inner.elts if isinstance(inner, ast.Tuple) else [inner])
        node = node.value
    if not isinstance(node, ast.List):
        raise ValueError("not a list")
    groups.append(node.elts)
    return [_python_call(element) for group in reversed(groups) for element in group]


def _check_depth(body: str) -> None:
    depth = 0
    for letter in body:
        depth += (letter in "([{") - (letter in ")]}")
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")


def _python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with named arguments only")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("**arguments")
        arguments[keyword.arg] = _literal(keyword.value)
    return ToolCall(_dotted_name(node.func), arguments)


def _dotted_name(node: ast.expr) -> str:
    match node:
        case ast.Name(name):
            return name
        case ast.Attribute(value, name):
            return f"{_dotted_name(value)}.{name}"
    raise ValueError("not the name of a function")


def _literal(node: ast.expr) -> Any:
    """A JSON value; also with JSON's own names of the constants, which models mix in."""
    match node:
        case ast.Constant(None | bool() | int() | float() | str() as value):
            return value
        case ast.Name("true" | "false" | "null" as name):
            return {"true": True, "false": False, "null": None}[name]
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return -value
        case ast.List(elements) | ast.Tuple(elements):
            return [_literal(element) for element in elements]
        case ast.Dict(keys, values) if all(isinstance(key, ast.Constant) for key in keys):
            names = [_literal(key) for key in keys if key is not None]
            if all(isinstance(name, str) for name in names):
                return dict(zip(names, map(_literal, values), strict=True))
    raise ValueError("not a literal")
