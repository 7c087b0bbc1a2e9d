"""Records at a glance: pictures in a grid, each with what is on it."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from l32jax.data.charts.draw import draw
from l32jax.data.charts.scenes import Scene, description

CELL, CAPTION, COLUMNS = 224, 44, 6  # pixels, pixels, pictures


def contact_sheet(scenes: Sequence[Scene]) -> Image.Image:
    """The scenes' pictures, fitted to equal cells, with their descriptions below."""
    rows = -(-len(scenes) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * CELL, rows * (CELL + CAPTION)), "lightsteelblue")
    pen = ImageDraw.Draw(sheet)
    for index, scene in enumerate(scenes):
        row, column = divmod(index, COLUMNS)
        x, y = column * CELL, row * (CELL + CAPTION)
        picture = draw(scene)
        scale = (CELL - 8) / max(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        sheet.paste(picture.resize(size, Image.Resampling.NEAREST), (x + 4, y + 4))
        text = "\n".join(textwrap.wrap(description(scene), 38)[:3])
        pen.multiline_text((x + 4, y + CELL), text, "black", ImageFont.load_default(12), spacing=1)
    return sheet
