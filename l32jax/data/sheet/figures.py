"""The drawings of a row: how full it is, what its tokens see, and the tiles of its pictures."""

from collections.abc import Iterator

from PIL import Image

from l32jax.data.sheet.drawing import Drawing, Label, Shape, box, image_colour
from l32jax.data.sheet.rows import Passage, Picture, SeenRow

MARGIN, GAP = 110, 8  # pixels left of what is drawn, for labels; between two drawings
BAR, LANE, PANEL = 16, 14, 150  # pixels high: of a bar, a tile and all keys
SMALLEST, LARGEST = 168, 504  # pixels of the longer side of a picture
ALL_LANES = 420  # pixels that tiles share if there are many


def fill_bars(row: SeenRow, width: int) -> Drawing:
    """The share of its text, and of its vision axis, that the row uses."""
    room, height = width - MARGIN, BAR
    scale = room / row.length
    shapes = [box(MARGIN, 0, room, BAR, "panel")]
    for number, passage in enumerate(_documents(row)):
        size = (passage.end - passage.begin) * scale
        colour, tip = f"text-{number % 2}", _tip(number, passage)
        shapes.append(box(MARGIN + passage.begin * scale, 0, size, BAR, colour, tip))
    labels = [Label(0, BAR / 2, f"text {row.used / row.length:.0%}")]
    if row.owners:
        height, top = 2 * BAR + GAP, BAR + GAP
        scale = room / len(row.owners)
        for slot, owner in enumerate(row.owners):
            tip = f"place {slot}: " + ("no tile" if owner is None else f"image {owner + 1}")
            at, size = MARGIN + slot * scale, max(scale - 1, 0.5)
            shapes.append(box(at, top, size, BAR, image_colour(owner), tip))
        used = sum(owner is not None for owner in row.owners)
        labels.append(Label(0, top + BAR / 2, f"vision {used / len(row.owners):.0%}"))
    return Drawing(width, height, shapes, labels)


def intervals(row: SeenRow, width: int) -> Drawing:
    """For each token, from left to right, the keys and the tiles it sees, from the top down."""
    lane = max(2, min(LANE, ALL_LANES // max(len(row.owners), 1)))
    shapes = [box(MARGIN, 0, width - MARGIN, PANEL, "panel"), *_keys(row, width)]
    labels = [Label(0, BAR / 2, "sees text"), Label(0, PANEL - BAR / 2, "keys down", "faint")]
    top = PANEL + GAP
    for slot, owner in enumerate(row.owners):
        y = top + slot * lane
        shapes += [
            box(MARGIN, y, width - MARGIN, lane - 1, "panel"),
            *_lane(row, slot, y, lane, width),
        ]
        if lane == LANE:
            image = "" if owner is None else f" (image {owner + 1})"
            labels.append(
                Label(0, y + lane / 2, f"tile {slot}{image}", "ink" if image else "faint")
            )
    if row.owners and lane < LANE:
        labels.append(Label(0, top + BAR / 2, f"sees tiles 0-{len(row.owners) - 1}"))
    height = top + lane * len(row.owners) if row.owners else PANEL
    return Drawing(width, height, shapes, labels)


def tile_grid(picture: Picture, width: int, height: int) -> Drawing:
    """What lies over a picture of that size: where its tiles are cut, and their places."""
    rows, columns = picture.grid
    colour = image_colour(picture.number)
    lines = [box(width * cut / columns - 1, 0, 2, height, colour) for cut in range(1, columns)]
    lines += [box(0, height * cut / rows - 1, width, 2, colour) for cut in range(1, rows)]
    labels = []
    for tile, slot in enumerate(picture.slots):
        x, y = tile % columns * width / columns, tile // columns * height / rows
        text = "none" if slot is None else str(slot)
        lines.append(box(x, y, 8 * len(text) + 6, BAR, "paper"))
        labels.append(Label(x + 3, y + BAR / 2, text, "wrong" if slot is None else "ink"))
    return Drawing(width, height, lines, labels)


def shown(picture: Picture) -> Image.Image:
    """Small pictures are enlarged to whole pixels, large ones made smaller."""
    image = Image.fromarray(picture.canvas)
    longest = max(image.size)
    if longest > LARGEST:
        image.thumbnail((LARGEST, LARGEST))
        return image
    scale = max(1, round(SMALLEST / longest))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _documents(row: SeenRow) -> list[Passage]:
    return [passage for passage in row.passages if not passage.is_padding]


def _tip(number: int, passage: Passage) -> str:
    return f"document {number + 1}: tokens {passage.begin}-{passage.end - 1}"


def _keys(row: SeenRow, width: int) -> Iterator[Shape]:
    across, down = (width - MARGIN) / row.length, PANEL / row.length
    documents, number = _documents(row), 0
    for segment in row.keys:
        while documents[number].end <= segment.begin:
            number += 1
        corners = [(MARGIN + x * across, y * down) for x, y in segment.corners]
        yield Shape(corners, f"text-{number % 2}", _tip(number, documents[number]))


def _lane(row: SeenRow, slot: int, top: int, lane: int, width: int) -> Iterator[Shape]:
    across = (width - MARGIN) / row.length
    for segment in row.tiles[slot]:
        corners = [(MARGIN + x * across, top + (y - slot) * (lane - 1)) for x, y in segment.corners]
        tip = f"tokens {segment.begin}-{segment.end - 1} see tile {slot}"
        # An unused tile that is seen would have the colour of the panel.
        yield Shape(corners, _seen_colour(row.owners[slot]), tip)


def _seen_colour(owner: int | None) -> str:
    return "wrong" if owner is None else image_colour(owner)
