"""A picture in the making: boxes to lay it out with, and text that fits into them."""

from typing import Literal, NamedTuple

from PIL import Image, ImageDraw

from l32jax.data.charts.looks import RGB, Look, mixed
from l32jax.data.charts.typefaces import text_mask

Align = Literal["left", "middle", "right"]


class Box(NamedTuple):
    """Left, top, right and bottom edge in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top

    def split_top(self, size: float) -> tuple["Box", "Box"]:
        """The strip of that height at the top, and the rest."""
        return self._replace(bottom=self.top + size), self._replace(top=self.top + size)

    def split_bottom(self, size: float) -> tuple["Box", "Box"]:
        return self._replace(top=self.bottom - size), self._replace(bottom=self.bottom - size)

    def split_left(self, size: float) -> tuple["Box", "Box"]:
        return self._replace(right=self.left + size), self._replace(left=self.left + size)

    def split_right(self, size: float) -> tuple["Box", "Box"]:
        return self._replace(left=self.right - size), self._replace(right=self.right - size)

    def row(self, index: int, count: int) -> "Box":
        """One of `count` equal rows, from the top."""
        size = self.height / count
        return self._replace(top=self.top + index * size, bottom=self.top + (index + 1) * size)

    def column(self, index: int, count: int) -> "Box":
        size = self.width / count
        return self._replace(left=self.left + index * size, right=self.left + (index + 1) * size)

    def shrunk(self, dx: float, dy: float) -> "Box":
        return Box(self.left + dx, self.top + dy, self.right - dx, self.bottom - dy)


class Page:
    """An RGB picture of one look; `pen` draws on it, `write` puts text there."""

    def __init__(self, size: tuple[int, int], look: Look):
        self.image = Image.new("RGB", size, look.paper)
        self.pen = ImageDraw.Draw(self.image)
        self.look = look
        self.line = max(min(size) // 64, 1)  # the width of thin lines

    def fill(self, box: Box, color: RGB) -> None:
        """Of half-open boxes, as Pillow's are closed; one pixel at least."""
        left, top, right, bottom = map(round, box)
        self.pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), fill=color)

    def write(
        self, text: str, box: Box, *, align: Align = "middle", color: RGB | None = None
    ) -> None:
        """The text as large as its box, narrower if it is too long; in ink unless colored."""
        height, room = round(box.height), max(round(box.width), 1)
        mask = text_mask(self.look.face, text, height)
        if mask.width > room:
            mask = mask.resize((room, mask.height))
        x = {
            "left": box.left,
            "middle": (box.left + box.right - mask.width) / 2,
            "right": box.right - mask.width,
        }[align]
        self.image.paste(color or self.look.ink, (round(x), round(box.top)), mask)

    def rule(self, start: tuple[float, float], end: tuple[float, float], *, dashed: bool) -> None:
        """A thin straight line, weaker than ink."""
        color = mixed(self.look.paper, self.look.ink, 0.4)
        pieces = 8 if dashed else 1
        steps = [(b - a) / (2 * pieces - 1) for a, b in zip(start, end, strict=True)]
        for piece in range(pieces):
            ends = [
                tuple(a + (2 * piece + past) * step for a, step in zip(start, steps, strict=True))
                for past in (0, 1)
            ]
            self.pen.line(ends, fill=color, width=self.line)
