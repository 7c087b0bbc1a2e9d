"""Flat drawings, once described, as SVG for a page and as pixels for a picture."""

import html
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

FONT_SIZE = 12
# Of each name: by day, which pictures have as well, and by night.
COLOURS = {
    "paper": ("#ffffff", "#16181b"),
    "ink": ("#1d2329", "#e4e6e8"),
    "faint": ("#6f7880", "#98a1a9"),
    "learned": ("#f6d66b", "#6f5a12"),
    "panel": ("#f2efe9", "#262a2f"),
    "text-0": ("#3d6b8e", "#6ea3cc"),
    "text-1": ("#8fb3cd", "#3d6b8e"),
    "image-0": ("#f0a35e", "#d98a43"),
    "image-1": ("#7a9e5f", "#8db870"),
    "image-2": ("#a5566d", "#c9768e"),
    "image-3": ("#8a74b0", "#a48fcb"),
    "wrong": ("#c62828", "#ff6b5e"),
}
IMAGE_COLOURS = 4

Pixels = int | float


class Shape(NamedTuple):
    """A polygon in pixels, in a colour of COLOURS, and what it says when pointed at."""

    corners: Sequence[tuple[Pixels, Pixels]]
    colour: str
    tip: str = ""


class Label(NamedTuple):
    """Text that begins at x, with y in its middle."""

    x: Pixels
    y: Pixels
    text: str
    colour: str = "ink"


class Drawing(NamedTuple):
    """Pixels; later shapes lie over earlier ones, labels over all."""

    width: int
    height: int
    shapes: Sequence[Shape]
    labels: Sequence[Label] = ()


def image_colour(number: int | None) -> str:
    return "panel" if number is None else f"image-{number % IMAGE_COLOURS}"


def box(x: Pixels, y: Pixels, width: Pixels, height: Pixels, colour: str, tip: str = "") -> Shape:
    corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
    return Shape(corners, colour, tip)


def font(size: int = FONT_SIZE) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def day(colour: str) -> str:
    return COLOURS[colour][0]


def svg(drawing: Drawing, name: str) -> str:
    """An element of a page, in which each colour is a class; `name` is its description."""
    return "".join(
        (
            f'<svg viewBox="0 0 {drawing.width} {drawing.height}" role="img" '
            f'aria-label="{html.escape(name)}">',
            *map(_svg_shape, drawing.shapes),
            *(
                f'<text class="{label.colour}" x="{label.x:g}" y="{label.y:g}">'
                f"{html.escape(label.text)}</text>"
                for label in drawing.labels
            ),
            "</svg>",
        )
    )


def _svg_shape(shape: Shape) -> str:
    corners = " ".join(f"{x:.6g},{y:.6g}" for x, y in shape.corners)
    tip = f"<title>{html.escape(shape.tip)}</title>" if shape.tip else ""
    return f'<polygon class="{shape.colour}" points="{corners}">{tip}</polygon>'


def paint(drawing: Drawing, image: Image.Image) -> None:
    """Draws over an image of at least the same size."""
    pen, letters = ImageDraw.Draw(image), font()
    for shape in drawing.shapes:
        # Pillow's polygons have the pixels of their last corners too.
        right, low = (max(corner[axis] for corner in shape.corners) for axis in (0, 1))
        corners = [(min(x, max(right - 1, 0)), min(y, max(low - 1, 0))) for x, y in shape.corners]
        pen.polygon(corners, fill=day(shape.colour))
    for label in drawing.labels:
        pen.text((label.x, label.y), label.text, day(label.colour), letters, anchor="lm")
