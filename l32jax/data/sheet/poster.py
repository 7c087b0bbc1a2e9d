"""The sheet as one picture, for notebooks and terminals."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from PIL import Image, ImageColor, ImageDraw

from l32jax.data.sheet.drawing import Drawing, day, font, image_colour, paint
from l32jax.data.sheet.figures import fill_bars, intervals, shown, tile_grid
from l32jax.data.sheet.letters import letters, plainly
from l32jax.data.sheet.rows import Passage, Picture, Piece, SeenRow, Sheet

WIDTH, EDGE = 1600, 24  # pixels
ROOM = WIDTH - 2 * EDGE
SIZE, LINE, SPACE = 15, 22, 14  # pixels of letters, of their line, and between parts
MOST_PASSAGES, MOST_LINES = 12, 24  # of a row, of each: the page has all
WORD = re.compile(r"\S{1,80} ?| ")


class Word(NamedTuple):
    """`ends_line`: the next word begins a new one."""

    text: str
    ink: str = day("ink")
    paper: str = day("paper")
    ends_line: bool = False


def poster(sheet: Sheet) -> Image.Image:
    """An RGB picture of WIDTH pixels, by day, with the beginning of long rows and documents."""
    parts = list(_parts(sheet))
    height = sum(part.height + SPACE for part in parts) + 2 * EDGE
    whole = Image.new("RGB", (WIDTH, height), day("paper"))
    y = EDGE
    for part in parts:
        whole.paste(part, (EDGE, y))
        y += part.height + SPACE
    return whole


def _parts(sheet: Sheet) -> Iterator[Image.Image]:
    yield _title(sheet.title, 26)
    facts = [f"{name}: {value}" for name, value in sheet.facts]
    yield _written(word for line in (*facts, *sheet.messages) for word in _told(line))
    yield _written(_legend())
    for name, row in sheet.rows:
        yield _title(name, 20)
        yield from _row(row)


def _row(row: SeenRow) -> Iterator[Image.Image]:
    yield _painted(fill_bars(row, ROOM))
    yield from _pictures(row)
    for number, passage in enumerate(row.passages[:MOST_PASSAGES]):
        yield _written(_passage(number, passage))
    if len(row.passages) > MOST_PASSAGES:
        yield _written([_more(len(row.passages) - MOST_PASSAGES, "documents")])
    yield _painted(intervals(row, ROOM))


def _title(text: str, size: int) -> Image.Image:
    image = Image.new("RGB", (ROOM, 2 * size), day("paper"))
    ImageDraw.Draw(image).text((0, size), plainly(text), day("ink"), font(size), anchor="lm")
    return image


def _painted(drawing: Drawing) -> Image.Image:
    image = Image.new("RGB", (drawing.width, drawing.height), day("paper"))
    paint(drawing, image)
    return image


def _pictures(row: SeenRow) -> Iterator[Image.Image]:
    """Pictures side by side, in as many strips as they need."""
    strip: list[Image.Image] = []
    for picture in row.pictures:
        framed = _framed(picture)
        if strip and sum(each.width + SPACE for each in strip) + framed.width > ROOM:
            yield _joined(strip)
            strip = []
        strip.append(framed)
    if strip:
        yield _joined(strip)


def _framed(picture: Picture) -> Image.Image:
    image = shown(picture)
    paint(tile_grid(picture, *image.size), image)
    width = max(image.width, round(font(SIZE).getlength(picture.caption)))
    framed = Image.new("RGB", (width, image.height + LINE), day("paper"))
    framed.paste(image)
    pen = ImageDraw.Draw(framed)
    pen.text((0, image.height + LINE / 2), picture.caption, day("faint"), font(SIZE), anchor="lm")
    return framed


def _joined(images: list[Image.Image]) -> Image.Image:
    strip = Image.new("RGB", (ROOM, max(image.height for image in images)), day("paper"))
    x = 0
    for image in images:
        strip.paste(image, (x, 0))
        x += image.width + SPACE
    return strip


def _written(words: Iterable[Word]) -> Image.Image:
    lines = _lines(words)
    cut = len(lines) - MOST_LINES
    if cut > 0:
        lines = [*lines[:MOST_LINES], [(0.0, _more(cut, "lines"))]]
    image = Image.new("RGB", (ROOM, LINE * len(lines)), day("paper"))
    pen, face = ImageDraw.Draw(image), font(SIZE)
    for number, line in enumerate(lines):
        top = number * LINE
        for x, word in line:
            width = max(face.getlength(word.text), 1)  # marks over letters have none
            edges = (x, top + 1, x + width - 1, top + LINE - 2)
            pen.rectangle(edges, fill=word.paper)
            pen.text((x, top + LINE / 2), word.text, word.ink, face, anchor="lm")
    return image


def _lines(words: Iterable[Word]) -> list[list[tuple[float, Word]]]:
    """Words with where they begin, as many in a line as there is room for."""
    lines: list[list[tuple[float, Word]]] = [[]]
    face, x = font(SIZE), 0.0
    for word in words:
        width = face.getlength(word.text)
        if lines[-1] and x + width > ROOM:
            lines.append([])
            x = 0.0
        lines[-1].append((x, word))
        x += width
        if word.ends_line:
            lines.append([])
            x = 0.0
    return lines if lines[-1] else lines[:-1]


def _more(count: int, what: str) -> Word:
    return Word(f"... {count} more {what}", day("wrong"))


def _told(line: str) -> Iterator[Word]:
    yield from (Word(word) for word in WORD.findall(plainly(line)))
    yield Word("", ends_line=True)


def _legend() -> Iterator[Word]:
    for weight, text in ((0.0, "not learned"), (0.3, "weight 0.3"), (1.0, "weight 1")):
        yield Word(text, *_colours(weight))
        yield Word("   ")
    yield Word("[special token]", day("faint"))


def _passage(number: int, passage: Passage) -> Iterator[Word]:
    yield from (word._replace(ink=day("faint")) for word in _told(passage.heading(number)))
    for piece in passage.pieces:
        yield from _piece(piece)


def _piece(piece: Piece) -> Iterator[Word]:
    ink, paper = _colours(piece.weight)
    if piece.kind == "stray":
        yield Word(f"[learned, but not next: {plainly(piece.text)}]", day("wrong"))
    elif piece.kind == "image":
        seen, paper = piece.image, day(image_colour(piece.image))
        if seen is None:
            yield Word("[image, none seen]", day("wrong"), paper)
        else:
            yield Word(f"[image {seen + 1}]", day("ink"), paper)
    elif piece.kind == "special":
        yield Word(f"[{piece.text}]", ink, paper)
    else:
        for stretch, is_sign in letters(piece.text):
            if is_sign:
                yield Word(stretch, day("faint"), paper)
            else:
                yield from (Word(word, ink, paper) for word in WORD.findall(stretch))


def _colours(weight: float) -> tuple[str, str]:
    """Of letters and of what is behind them, as the page has them."""
    if weight == 0:
        return day("faint"), day("paper")
    share = min(max(weight, 0.0), 1.0)
    ends = zip(ImageColor.getrgb(day("paper")), ImageColor.getrgb(day("learned")), strict=True)
    mixed = (round(begin + share * (end - begin)) for begin, end in ends)
    return day("ink"), "#" + "".join(f"{value:02x}" for value in mixed)
