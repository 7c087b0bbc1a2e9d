"""Tables, receipts and signs as pictures."""

from l32jax.data.charts.looks import BLACK, WHITE, mixed
from l32jax.data.charts.page import Box, Page
from l32jax.data.charts.scenes import LETTERS, Scene, total

FILLING = 0.85  # of a line of a document, what its text takes


def draw_table(page: Page, area: Box, scene: Scene) -> None:
    columns = scene.difficulty.columns
    lines = [
        ("", *LETTERS[:columns]),
        *((name, *map(str, numbers)) for name, numbers in scene.rows),
    ]
    for index, cells in enumerate(lines):
        row = area.row(index, len(lines))
        if page.look.ruling == "bands" and index % 2:
            page.fill(row, mixed(page.look.paper, page.look.ink, 0.15))
        if page.look.ruling == "lines":
            page.rule((row.left, row.bottom), (row.right, row.bottom), dashed=False)
        head, rest = row.split_left(0.5 * row.width)
        page.write(cells[0], _text_line(head, scene), align="left")
        for column, cell in enumerate(cells[1:]):
            page.write(cell, _text_line(rest.column(column, columns), scene))


def draw_receipt(page: Page, area: Box, scene: Scene) -> None:
    lines = [(name, str(number)) for name, number in scene.firsts.items()]
    lines.append(("total", str(total(scene))))
    for index, (word, number) in enumerate(lines):
        row = _text_line(area.row(index, len(lines)), scene)
        if page.look.alignment == "centred":
            page.write(f"{word} {number}", row)
        else:
            words, numbers = row.split_left(0.68 * row.width)
            page.write(word, words, align="left")
            page.write(number, numbers, align="right")
        if index == len(lines) - 2:
            bottom = area.row(index, len(lines)).bottom
            page.rule((area.left, bottom), (area.right, bottom), dashed=True)


def draw_sign(page: Page, area: Box, scene: Scene) -> None:
    ends = tuple(map(round, area))
    (color, *_) = scene.colors
    shape = {
        "rectangle": page.pen.rectangle,
        "rounded": lambda box, fill: page.pen.rounded_rectangle(box, area.height / 6, fill=fill),
        "ellipse": page.pen.ellipse,
    }[page.look.plate]
    shape(ends, fill=color)
    inside = area.shrunk(0.1 * area.width, 0.18 * area.height)
    written = BLACK if 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2] > 127 else WHITE
    for index, word in enumerate(scene.names):
        line = _text_line(inside.row(index, len(scene.names)), scene)
        page.write(word, line, color=written)


def _text_line(box: Box, scene: Scene) -> Box:
    """Text of a reasonable size in the middle of the box."""
    largest = (0.3 if not scene.difficulty.named else 0.1) * scene.size[1]
    height = min(FILLING * box.height, largest)
    return box.shrunk(0.0, (box.height - height) / 2)
