"""Configs as text: JSON in checkpoints, and `dotted.path=value` on the command line."""

import dataclasses
import difflib
import json
import types
import typing
from ast import literal_eval
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar

from l32jax.errors import InputError

ConfigT = TypeVar("ConfigT")


def override(config: ConfigT, assignment: str) -> ConfigT:
    """Returns `config` with one `dotted.path=value` applied, checked against the field's type."""
    path, equals, text = assignment.partition("=")
    if not equals:
        raise InputError(f"override {assignment!r} is not of the form path=value")
    head, _, rest = path.partition(".")
    hints = typing.get_type_hints(type(config))
    if head not in hints:
        hint = did_you_mean(head, hints)
        raise InputError(f"{type(config).__name__} has no field {head!r}{hint}")
    old = getattr(config, head)
    if rest and old is None and _has_defaults(kind := _plain(hints[head])):
        old = kind()  # mesh.tensor=4
    if not rest:
        value = _parse(text, hints[head], where=path)
    elif isinstance(old, tuple):  # stages.0.num_steps=10
        value = _override_item(old, rest, text, where=path)
    elif dataclasses.is_dataclass(old):
        value = override(old, f"{rest}={text}")
    else:
        raise InputError(f"{head} of {type(config).__name__} has no parts, so not {rest!r}")
    return dataclasses.replace(config, **{head: value})  # type: ignore[type-var]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _override_item(items: tuple, rest: str, text: str, where: str) -> tuple:
    index, _, rest = rest.partition(".")
    if not index.isdecimal() or int(index) >= len(items) or not rest:
        raise InputError(f"{where} needs an index below {len(items)} and a field, not {index!r}")
    position = int(index)
    if not dataclasses.is_dataclass(items[position]):
        raise InputError(f"{where}.{index} has no fields, so not {rest!r}; give all of {where}")
    new = override(items[position], f"{rest}={text}")
    return (*items[:position], new, *items[position + 1 :])


def _parse(text: str, kind: Any, where: str) -> Any:
    if kind is str:
        return text
    plain = _plain(kind)
    try:
        value = literal_eval(text)
    except (ValueError, SyntaxError):
        if dataclasses.is_dataclass(plain) and (parse := getattr(plain, "parse", None)):
            return parse(text)  # mesh=fsdp=16,tensor=8
        value = text  # a bare word, for Literal[...] and `str | None`
    return decode(kind, value, where)


def to_json(config: Any) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(kind: type[ConfigT], text: str) -> ConfigT:
    """The config that `to_json` wrote; an unknown, missing or mistyped field is an error."""
    try:
        return decode(kind, json.loads(text), kind.__name__)
    except json.JSONDecodeError as error:
        raise InputError(f"{kind.__name__} is not JSON: {error}") from None


def changed_fields(before: str, now: Any) -> list[str]:
    """Where a config is not what the JSON of an earlier one says: "seed=1 (was 0)", and so on."""
    old, new = (dict(_leaves(json.loads(text))) for text in (before, to_json(now)))
    return [
        f"{path}={new.get(path)} (was {old.get(path)})"
        for path in {**new, **old}
        if old.get(path) != new.get(path)
    ]


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    parts = enumerate(tree) if isinstance(tree, list) else tree.items()
    for name, part in parts:
        if part and isinstance(part, (list, dict)):
            yield from _leaves(part, f"{path}{name}.")
        else:
            yield f"{path}{name}", part


def decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, made of JSON's types, as the annotated type `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, str) and value == _kind_of(kind) and _has_defaults(kind):
        return kind()  # objective=dpo
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        for name in value.keys() - hints.keys():
            raise InputError(f"{where} has no field {short(name)}{did_you_mean(name, hints)}")
        parts = {name: decode(hints[name], part, f"{where}.{name}") for name, part in value.items()}
        try:
            return kind(**parts)  # type: ignore[operator]
        except TypeError as error:
            raise InputError(f"{where}: {error}") from None
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return decode(_member(kind, value, where), value, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise InputError(f"{where}={short(value)} must be one of {', '.join(map(repr, arguments))}")
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else list(arguments)
        if len(kinds) != len(value):
            raise InputError(f"{where} needs {len(kinds)} values, not {len(value)}")
        return tuple(
            decode(k, v, f"{where}.{i}") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        )
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise InputError(f"{where}={short(value)} is a {type(value).__name__}, expected {kind}")


def _plain(kind: Any) -> Any:
    """The kind of an optional field that is set; None if it may be one of several."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind
    members = _members(kind)
    return members[0] if len(members) == 1 else None


def _members(kind: Any) -> list[Any]:
    return [part for part in typing.get_args(kind) if part is not type(None)]


def _member(kind: Any, value: Any, where: str) -> Any:
    """Of the configs that a field may be, the one whose `kind` the value names."""
    members = _members(kind)
    if len(members) == 1:
        return members[0]
    by_name = {_kind_of(member): member for member in members}
    name = value.get("kind") if isinstance(value, dict) else value
    if name not in by_name:
        raise InputError(
            f"{where}={short(value)} must be one of {', '.join(map(repr, by_name))}, or have one "
            "of these as its kind"
        )
    return by_name[name]


def _kind_of(kind: Any) -> str | None:
    """The name by which a config is told apart from others in its place."""
    return getattr(kind, "kind", None) if dataclasses.is_dataclass(kind) else None


def _has_defaults(kind: Any) -> bool:
    """Whether it is a config that can be made of nothing."""
    missing = dataclasses.MISSING
    return dataclasses.is_dataclass(kind) and not any(
        field.default is missing and field.default_factory is missing
        for field in dataclasses.fields(kind)
    )


def short(value: Any) -> str:
    """A value in an error's one line, whoever wrote it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
