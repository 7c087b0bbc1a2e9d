"""Chat templates that come with a model: Jinja source of strangers, rendered within bounds.

The sandbox keeps templates from Python's internals; here the source, the steps of loops and macros
and the rendered text are bounded too. A template can still build one huge string (by doubling it
again and again): load models from people whom you trust with that much.
"""

import functools
import itertools
import json
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from l32jax.errors import InputError

MAX_TEMPLATE_CHARS = 64 << 10
MAX_RENDERED_CHARS = 16 << 20
MAX_STEPS = 50_000  # each takes about 20 µs in the sandbox


def render_chat_template(source: str, **variables: Any) -> str:
    """Renders as Hugging Face does; InputError if the template is too large, wrong, or refuses."""
    if len(source) > MAX_TEMPLATE_CHARS:
        raise _error(f"it is longer than {MAX_TEMPLATE_CHARS} characters")
    try:
        return _render(_compile(source), variables)
    except InputError:
        raise
    except Exception as error:  # whatever the template's own operations can raise
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise _error(f"{reason:.200}") from error


def _render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    pieces, length = [], 0
    for piece in template.generate(variables, _steps=itertools.count()):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_RENDERED_CHARS:
            raise _error(f"it makes more than {MAX_RENDERED_CHARS} characters")
    return "".join(pieces)


def _error(why: str) -> InputError:
    return InputError(
        f"chat template in the tokenizer's files: {why}; change the messages or the template"
    )


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with Hugging Face's settings and additions."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        self.globals["raise_exception"] = _raise_exception
        self.filters["tojson"] = _to_json
        del self.globals["lipsum"]  # Jinja's own: any amount of Latin

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Of products and powers alone a single one can take for ever."""
        if _size(operator, left, right) > MAX_RENDERED_CHARS:
            raise _error(f"it makes more than {MAX_RENDERED_CHARS} characters")
        return super().call_binop(context, operator, left, right)

    def count_step(self, context: Context) -> str:
        if next(context.parent["_steps"]) >= MAX_STEPS:
            raise _error(f"it takes more than {MAX_STEPS} steps")
        return ""


class _StepCounting(NodeTransformer):
    """Begins the body of every loop and macro with a call of `count_step`.

    The call names an attribute of the environment, which a template cannot redefine.
    """

    def _count(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        call = nodes.Call(
            nodes.EnvironmentAttribute("count_step"), [nodes.ContextReference()], [], None, None
        )
        node.body.insert(0, nodes.Output([call]))
        return node

    visit_For = visit_Macro = visit_CallBlock = _count


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    environment = _Environment()
    tree = _StepCounting().visit(environment.parse(source))
    return environment.from_string(tree)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _size(operator: str, left: Any, right: Any) -> int:
    """About how many digits or items the result has."""
    match operator, left, right:
        case "*", int(), int():
            return left.bit_length() + right.bit_length()
        case "**", int(), int():
            return left.bit_length() * abs(right)
        case "*", int(), str() | list() | tuple():
            return left * len(right)
        case "*", str() | list() | tuple(), int():
            return len(left) * right
    return 0


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
