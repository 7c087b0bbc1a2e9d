"""What kind of record it is shows in its fields; the first kind below whose fields it has.

kind           fields                                                  places of its images
comparison     chosen, rejected, perhaps margin; and messages or       as of a conversation
               prompt (a text, or messages), unless the two have it
               answers, from best to worst, perhaps scores; the same
conversation   messages [{role, content}], perhaps images              in the content, see below
LLaVA's        conversations [{from, value}], perhaps image or images  <image> marks
question       image or images, question, answer                       before the question
asked          prompt (a text, or messages), completion (the same)     as of a conversation
in parts       parts [text or {image}]                                 where they stand
interleaved    texts [text or null], images [image or null]            where there is no text
marked text    text, images                                            <image> marks
caption        image, and text or caption                              before the text
text           text
prompt         question or prompt, perhaps image or images             as with an answer

The content of a message is text, or a list of texts, {"image": …}, {"type": "text", "text": …} and
{"type": "image"}. The latter stand for the record's `images` in order, and so do marks, <image> or
<|image|>, in the text of a record that has such a field. A line break beside a mark goes with it.
There must be as many places as images.

An image is a path beside the file, or {"bytes": …} or {"path": …} as Hugging Face writes them.
A field that is null is not there. `check`, an object, is kept as it is, for verifiers of answers.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from l32jax.data.chat import Image, Message
from l32jax.data.images import MAX_BYTES
from l32jax.data.records import MAX_IMAGES, Bad, Record
from l32jax.errors import InputError, one_line

FIELDS = (
    "messages", "conversations", "parts", "texts", "images", "image", "question", "answer", "text",
    "caption", "prompt", "completion", "chosen", "rejected", "margin", "answers", "scores", "check",
)  # fmt: skip
DOCUMENT = {"parts", "texts", "text", "caption"}  # who has one of these asks nothing
MAX_SCORE = 1e30  # no integer beyond a float, no infinity, no NaN
MARK = re.compile(r"\n?(?:<image>|<\|image\|>)\n?")
ROLES = {"human": "user", "gpt": "assistant"}  # as LLaVA names them; others are called as here
MAX_ANSWERS = 64  # to compare
PLACE = Image()  # of an image that is yet to be put there

Parts = tuple[str | Image, ...]
# From a name in a record to an encoded image or its path; InputError if there is none.
Find = Callable[[str], bytes | Path]


class Unusable(ValueError):
    """Why a record is Bad."""


def make_record(fields: Any, place: str, find: Find) -> Record | Bad:
    """The record that has these fields, as JSON, Parquet or Arrow give them."""
    try:
        if not isinstance(fields, Mapping):
            raise Unusable("it is not an object with fields")
        given = {k: v for k, v in fields.items() if v is not None}
        record = _record(given, place, find)
        return dataclasses.replace(record, check=_check(given)) if "check" in given else record
    except (Unusable, InputError) as error:
        return Bad(place, one_line(error))


def _record(fields: Mapping[str, Any], place: str, find: Find) -> Record:
    if "chosen" in fields or "answers" in fields:
        return _comparison(fields, place, find)
    if "messages" in fields or "conversations" in fields:
        return Record(place, messages=_conversation(fields, find))
    is_document = bool(DOCUMENT & fields.keys())
    if "question" in fields and ("answer" in fields or not is_document):
        return Record(place, messages=_question(fields, find))
    if "prompt" in fields and ("completion" in fields or not is_document):
        turns = _turns(fields, "prompt", "user") + _turns(fields, "completion", "assistant")
        return Record(place, messages=_conversation({**fields, "messages": turns}, find))
    parts = tuple(part for part in _document(fields, find) if part != "")
    if not any(isinstance(part, str) and part.strip() for part in parts):
        raise Unusable("it has no text")
    return Record(place, parts=parts)


def _check(fields: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(fields["check"], Mapping):
        raise Unusable("'check' is not an object")
    return dict(fields["check"])


def _document(fields: Mapping[str, Any], find: Find) -> Parts:
    if "parts" in fields:
        parts = tuple(_content(fields["parts"], find, marked=False))
        return _filled([parts], _images(fields, find))[0]
    if "texts" in fields:
        return tuple(_interleaved(fields, find))
    if "text" in fields and "images" in fields:
        return _filled([_marked(_text(fields["text"]))], _images(fields, find))[0]
    if "image" in fields and (text := fields.get("text", fields.get("caption"))) is not None:
        return *_images(fields, find), _text(text)
    if "text" in fields:
        return (_text(fields["text"]),)
    raise Unusable(f"its fields {sorted(fields)} are of no known kind")


def _interleaved(fields: Mapping[str, Any], find: Find) -> Iterable[str | Image]:
    texts = _list(fields["texts"], "texts")
    images = _list(fields.get("images", [None] * len(texts)), "images")
    if len(texts) != len(images):
        raise Unusable(f"it has {len(texts)} texts and {len(images)} images; null is missing")
    _check_count(image for image in images if image is not None)
    for text, image in zip(texts, images, strict=True):
        if text is not None and image is not None:
            raise Unusable("a text and an image stand at the same place")
        if text is not None:
            yield _text(text)
        elif image is not None:
            yield _image(image, find)


def _comparison(fields: Mapping[str, Any], place: str, find: Find) -> Record:
    if "chosen" in fields:
        given = [fields["chosen"], _field(fields, "rejected")]
        scores = [fields["margin"], 0.0] if "margin" in fields else []
    else:
        given = _list(fields["answers"], "answers")
        scores = _list(fields.get("scores", []), "scores")
    if not 2 <= len(given) <= MAX_ANSWERS or len(scores) not in (0, len(given)):
        raise Unusable(f"it has {len(given)} answers and {len(scores)} scores to compare")
    if not all(type(score) in (int, float) and abs(score) <= MAX_SCORE for score in scores):
        raise Unusable("a score is no number")
    if sorted(scores, reverse=True) != scores:
        raise Unusable("its answers are not in the order of their scores")
    if "messages" in fields:
        prompt = _list(fields["messages"], "messages")
    elif "prompt" in fields:
        prompt = _turns(fields, "prompt", "user")
    else:  # both dialogs begin with it
        prompt = _list(given[0], "chosen")[:-1]
    messages = _conversation({**fields, "messages": prompt}, find)
    if not messages:
        raise Unusable("it has answers to nothing")
    answers = tuple(Message("assistant", _answer(each, len(prompt))) for each in given)
    return Record(place, messages=messages, answers=answers, scores=tuple(map(float, scores)))


def _answer(given: Any, prompt: int) -> str:
    """A text; or a dialog that ends with it, after the prompt's turns or none."""
    if isinstance(given, list):
        if len(given) not in (1, prompt + 1) or _field(given[-1], "role") != "assistant":
            raise Unusable("an answer to compare is not one turn of the assistant")
        given = _field(given[-1], "content")
    if not _text(given).strip():
        raise Unusable("an answer to compare is empty")
    return given


def _question(fields: Mapping[str, Any], find: Find) -> tuple[Message, ...]:
    asked = *_images(fields, find), _text(fields["question"])
    turns: list[tuple[str, Parts]] = [("user", asked)]
    if "answer" in fields:
        turns.append(("assistant", (_text(fields["answer"]),)))
    return _checked(turns)


def _turns(fields: Mapping[str, Any], name: str, role: str) -> list[Any]:
    """A text is one turn of that role; nothing is none."""
    given = fields.get(name, [])
    return [{"role": role, "content": given}] if isinstance(given, str) else _list(given, name)


def _conversation(fields: Mapping[str, Any], find: Find) -> tuple[Message, ...]:
    has_images = "images" in fields or "image" in fields
    turns = []
    if "messages" in fields:
        for turn in _list(fields["messages"], "messages"):
            if _given(turn, "tool_calls") and turn["tool_calls"]:
                raise Unusable("a turn has tool_calls beside its content, which are not read yet")
            content = tuple(_content(_field(turn, "content"), find, marked=has_images))
            turns.append((_text(_field(turn, "role")), content))
    else:
        for turn in _list(fields["conversations"], "conversations"):
            role = _text(_field(turn, "from"))
            turns.append((ROLES.get(role, role), _marked(_text(_field(turn, "value")))))
    contents = _filled([content for _, content in turns], _images(fields, find))
    return _checked([(role, parts) for (role, _), parts in zip(turns, contents, strict=True)])


def _checked(turns: list[tuple[str, Parts]]) -> tuple[Message, ...]:
    if not turns:
        raise Unusable("it has no turns")
    for role, content in turns:
        if not any(isinstance(part, Image) or part.strip() for part in content):
            raise Unusable(f"a turn of role {role!r} is empty")
    return tuple(Message(role, _plain(content)) for role, content in turns)


def _plain(content: Parts) -> str | Parts:
    return content[0] if len(content) == 1 and isinstance(content[0], str) else content


def _content(content: Any, find: Find, *, marked: bool) -> Iterable[str | Image]:
    """`marked` says whether marks in a text are places of images."""
    items = [content] if isinstance(content, str) else _list(content, "content")
    _check_count(item for item in items if not isinstance(item, str))
    for item in items:
        if isinstance(item, str):
            yield from _marked(_text(item)) if marked else [_text(item)]
        elif _given(item, "image"):
            yield _image(item["image"], find)
        elif _given(item, "type") and item["type"] == "image":
            has_own = any(_given(item, name) for name in ("bytes", "path"))
            yield _image(item, find) if has_own else PLACE
        else:
            text = _text(_field(item, "text"))
            yield from _marked(text) if marked else [text]


def _marked(text: str) -> Parts:
    """The text with its marks as places of images."""
    first, *rest = MARK.split(text)
    parts = [first, *(part for piece in rest for part in (PLACE, piece))]
    return tuple(part for part in parts if part != "")


def _filled(contents: list[Parts], images: list[Image]) -> list[Parts]:
    """The same with images at their places."""
    places = sum(part is PLACE for parts in contents for part in parts)
    if places != len(images):
        raise Unusable(f"it has {places} places for {len(images)} images")
    waiting = iter(images)
    return [tuple(next(waiting) if p is PLACE else p for p in parts) for parts in contents]


def _images(fields: Mapping[str, Any], find: Find) -> list[Image]:
    given = fields.get("images", fields.get("image", []))
    values = given if isinstance(given, list) else [given]
    _check_count(values)
    return [_image(value, find) for value in values]


def _check_count(images: Iterable[Any]) -> None:
    if (count := sum(1 for _ in images)) > MAX_IMAGES:
        raise Unusable(f"it has {count} images; more than {MAX_IMAGES} are not read")


def _image(value: Any, find: Find) -> Image:
    if isinstance(value, Mapping):
        names = ("bytes", "path", "image")
        value = next((value[name] for name in names if _given(value, name)), None)
    if isinstance(value, str):
        value = find(_text(value))
    if not isinstance(value, bytes | Path):
        raise Unusable("an image is neither bytes nor a path")
    if isinstance(value, bytes) and len(value) > MAX_BYTES:
        raise Unusable(f"an image has more than {MAX_BYTES} bytes")
    return Image(value)


def _given(item: Any, name: str) -> bool:
    return isinstance(item, Mapping) and item.get(name) is not None


def _field(item: Any, name: str) -> Any:
    if not _given(item, name):
        raise Unusable(f"an item lacks {name!r}")
    return item[name]


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise Unusable(f"{name!r} is not a list")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unusable(f"a {type(value).__name__} stands where text belongs")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a pair
        raise Unusable("a text is not Unicode") from None
    return value
