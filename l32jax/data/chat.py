"""Dialogs to tokens: Meta's chat format for Llama 3, the model's own template for others."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from l32jax.data.chat_template import render_chat_template
from l32jax.data.tokenizer import Tokenizer
from l32jax.data.tool_calls import (
    CODE_INTERPRETER,
    PYTHON_TAG,
    ToolCall,
    ToolFormat,
    render_tool_call,
)
from l32jax.errors import InputError

END_OF_TEXT = ("<|end_of_text|>", "<|endoftext|>")
ROLES = ("system", "user", "assistant", "ipython", "tool")
# A noncharacter of Unicode, never in text: it keeps a special token's name in a message from
# becoming that token when the rendered dialog is encoded.
GUARD = "\ufdd0"
IMAGE_MARK = "\ufdd1"  # another one: the place of an image in what a template renders
RESERVED = re.compile(f"[{GUARD}{IMAGE_MARK}]")


@dataclass(frozen=True)
class Image:
    """The place of an image in a message; `source` is whatever the caller loads it from."""

    source: Any = None


@dataclass(frozen=True)
class Message:
    """One turn of a dialog.

    `role` is system, user, assistant, or ipython (a tool's result; "tool" means the same).
    `tool_calls` and `stop` are the assistant's: end_of_message says that a tool has to run next.
    """

    role: str
    content: str | tuple[str | Image, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    stop: Literal["end_of_turn", "end_of_message"] = "end_of_turn"

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InputError(
                f"role {self.role!r} in a message: no such role; use one of {', '.join(ROLES)}"
            )


def encode_dialog(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tool_format: ToolFormat = "json",
    add_generation_prompt: bool = True,
) -> list[int]:
    """Tokens of the dialog, by default up to where the assistant's next answer begins.

    Llama 3: exactly Meta's ChatFormat, which adds no system text, no date, and trims nothing.
    Other tokenizers: their chat template, where `tool_format` is the template's own affair.
    """
    if not tokenizer.is_llama3:
        rendered = _render(tokenizer, messages, add_generation_prompt)
        return _encode_rendered(tokenizer, rendered)
    parts = _llama3_parts(tokenizer, messages, tool_format)
    tokens = [token for part, _ in parts for token in part]
    return tokens + _header(tokenizer, "assistant") if add_generation_prompt else tokens


def encode_for_training(
    tokenizer: Tokenizer, messages: Sequence[Message], *, tool_format: ToolFormat = "json"
) -> tuple[list[int], list[float]]:
    """Tokens of a finished dialog, and for each its weight as a target of the loss.

    1 for what the assistant says, up to and including the token that ends its turn; else 0.
    """
    if tokenizer.is_llama3:
        parts = _llama3_parts(tokenizer, messages, tool_format)
    else:
        parts = _template_parts(tokenizer, messages)
    tokens: list[int] = []
    weights: list[float] = []
    for part, is_answer in parts:
        tokens += part
        weights += [float(is_answer)] * len(part)
    return tokens, weights


def encode_document(
    tokenizer: Tokenizer, parts: Sequence[str | Image]
) -> tuple[list[int], list[float]]:
    """Text and images in order, as in pretraining; every word and the end are to be learned.

    It begins with the beginning-of-text token if the tokenizer's documents do, and ends with the
    end-of-text one.
    """
    tokens = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    weights = [0.0] * len(tokens)
    for part in parts:
        encoded = _encode_part(tokenizer, part)
        tokens += encoded
        weights += [float(isinstance(part, str))] * len(encoded)
    return [*tokens, _end_of_text(tokenizer)], [*weights, 1.0]


def _end_of_text(tokenizer: Tokenizer) -> int:
    """By name: the first of the stop tokens may be the one that ends a turn."""
    named = [tokenizer.specials[name] for name in END_OF_TEXT if name in tokenizer.specials]
    ends = [*named, *tokenizer.stop_ids]
    if not ends:
        raise InputError(
            "end of a document in the data: the tokenizer has no token for it; use one that "
            f"has, such as {END_OF_TEXT[0]}"
        )
    return ends[0]


def encode_caption(
    tokenizer: Tokenizer, text: str, images: Sequence[Any] = ()
) -> tuple[list[int], list[float]]:
    """Images and the text that goes with them, as a document."""
    return encode_document(tokenizer, [*map(Image, images), text])


# Llama 3


def _llama3_parts(
    tokenizer: Tokenizer, messages: Sequence[Message], tool_format: ToolFormat
) -> Iterator[tuple[list[int], bool]]:
    """Pieces of the dialog, and whether the assistant said them."""
    yield [tokenizer.special("<|begin_of_text|>")], False
    for message in messages:
        yield _header(tokenizer, message.role), False
        yield _body(tokenizer, message, tool_format), message.role == "assistant"


def _header(tokenizer: Tokenizer, role: str) -> list[int]:
    return [
        tokenizer.special("<|start_header_id|>"),
        *tokenizer.encode("ipython" if role == "tool" else role),
        tokenizer.special("<|end_header_id|>"),
        # on its own: newlines at the beginning of the content must not merge with these
        *tokenizer.encode("\n\n"),
    ]


def _body(tokenizer: Tokenizer, message: Message, tool_format: ToolFormat) -> list[int]:
    is_assistant = message.role == "assistant"
    calls = message.tool_calls if is_assistant else ()
    tokens = []
    if calls and calls[0].name == CODE_INTERPRETER:
        tokens.append(tokenizer.special(PYTHON_TAG))
    for part in _content_parts(message):
        tokens += _encode_part(tokenizer, part)
    for call in calls:
        tokens += tokenizer.encode(render_tool_call(call, tool_format))
    tool_is_next = is_assistant and message.stop == "end_of_message"
    return [*tokens, tokenizer.special("<|eom_id|>" if tool_is_next else "<|eot_id|>")]


def _content_parts(message: Message) -> tuple[str | Image, ...]:
    return (message.content,) if isinstance(message.content, str) else message.content


def _encode_part(tokenizer: Tokenizer, part: str | Image) -> list[int]:
    if isinstance(part, str):
        return tokenizer.encode(part)
    return [_image_id(tokenizer)]


def _image_id(tokenizer: Tokenizer) -> int:
    if tokenizer.image_id is None:
        raise InputError(
            "image in a message: this tokenizer's model reads text only; use a vision model"
        )
    return tokenizer.image_id


# Chat templates


def _render(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise InputError(
            "dialog in the chat: the tokenizer has neither Llama 3's chat tokens nor a chat "
            "template; use an instruct model, or plain text"
        )
    end_id = tokenizer.stop_ids[0] if tokenizer.stop_ids else None
    names = _special_names(tokenizer)
    entries = [_as_dict(message, names) for message in messages]
    rendered = render_chat_template(
        tokenizer.chat_template,
        messages=entries,
        add_generation_prompt=add_generation_prompt,
        bos_token="" if tokenizer.bos_id is None else tokenizer.decode([tokenizer.bos_id]),
        eos_token="" if end_id is None else tokenizer.decode([end_id]),
    )
    _require_all_images(rendered, entries)
    return rendered


def _require_all_images(rendered: str, entries: Sequence[dict[str, Any]]) -> None:
    given = sum(entry["content"].count(IMAGE_MARK) for entry in entries)
    if rendered.count(IMAGE_MARK) != given:
        raise InputError(
            f"chat template in the tokenizer's files: it shows {rendered.count(IMAGE_MARK)} of "
            f"{given} images; use one that keeps the content of messages"
        )


def _as_dict(message: Message, names: re.Pattern[str]) -> dict[str, Any]:
    """What templates read, without the name of a special token that would become one."""
    role = "tool" if message.role == "ipython" else message.role
    parts = _content_parts(message)
    shown = "".join(IMAGE_MARK if isinstance(p, Image) else RESERVED.sub("", p) for p in parts)
    entry: dict[str, Any] = {"role": role, "content": _broken_up(shown, names)}
    if message.tool_calls:
        functions = [{"name": c.name, "arguments": c.arguments} for c in message.tool_calls]
        calls = [{"type": "function", "function": f} for f in functions]
        entry["tool_calls"] = _guarded(calls, names)
    return entry


def _special_names(tokenizer: Tokenizer) -> re.Pattern[str]:
    longest_first = sorted(tokenizer.specials, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _guarded(value: Any, names: re.Pattern[str]) -> Any:
    """The same with every special token's name broken up, so that messages cannot forge turns."""
    if isinstance(value, dict):
        return {_guarded(key, names): _guarded(item, names) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_guarded(item, names) for item in value]
    if not isinstance(value, str):
        return value
    return _broken_up(RESERVED.sub("", value), names)


def _broken_up(text: str, names: re.Pattern[str]) -> str:
    return names.sub(lambda name: GUARD.join(name[0]), text)


def _encode_rendered(tokenizer: Tokenizer, text: str) -> list[int]:
    tokens = []
    for i, piece in enumerate(_special_names(tokenizer).split(text)):
        if i % 2 == 1:  # split() alternates between what is between and what matches
            tokens.append(tokenizer.special(piece))
            continue
        plain, *after_images = piece.replace(GUARD, "").split(IMAGE_MARK)
        tokens += tokenizer.encode(plain)
        for plain in after_images:
            tokens += [_image_id(tokenizer), *tokenizer.encode(plain)]
    return tokens


def _template_parts(
    tokenizer: Tokenizer, messages: Sequence[Message]
) -> Iterator[tuple[list[int], bool]]:
    """An answer is what the dialog up to it adds to the prompt that asks for it."""
    done = ""
    for i, message in enumerate(messages):
        if message.role == "assistant":
            prompt = _render(tokenizer, messages[:i], add_generation_prompt=True)
            finished = _render(tokenizer, messages[: i + 1], add_generation_prompt=False)
            yield _encode_rendered(tokenizer, _continuation(done, prompt)), False
            yield from _answer(tokenizer, _continuation(prompt, finished))
            done = finished
    rest = _continuation(done, _render(tokenizer, messages, add_generation_prompt=False))
    yield _encode_rendered(tokenizer, rest), False


def _continuation(beginning: str, whole: str) -> str:
    if not whole.startswith(beginning):
        raise InputError(
            "chat template in the tokenizer's files: a longer dialog does not begin with the "
            "shorter one, so its answers cannot be told apart; train on a template that appends"
        )
    return whole[len(beginning) :]


def _answer(tokenizer: Tokenizer, text: str) -> Iterator[tuple[list[int], bool]]:
    """The answer with the token that ends it; the template's line break after it is not said."""
    tokens = _encode_rendered(tokenizer, text)
    ends = [i + 1 for i, token in enumerate(tokens) if token in tokenizer.stop_ids]
    end = ends[0] if ends else len(tokens)
    yield tokens[:end], True
    yield tokens[end:], False
