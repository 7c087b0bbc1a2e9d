"""Scenes as pictures."""

from PIL import Image

from l32jax.data.charts.draw_charts import draw_bars, draw_line
from l32jax.data.charts.draw_documents import draw_receipt, draw_sign, draw_table
from l32jax.data.charts.page import Box, Page
from l32jax.data.charts.scenes import Scene

DRAW = {
    "bars": draw_bars,
    "line": draw_line,
    "table": draw_table,
    "receipt": draw_receipt,
    "sign": draw_sign,
}


def draw(scene: Scene) -> Image.Image:
    """The RGB picture of `scene.size`; the same from the same fonts.

    Raises:
      InputError: its face is one of Matplotlib's, and that is not installed.
    """
    page = Page(scene.size, scene.look)
    width, height = scene.size
    left, top, right, bottom = scene.margin
    area = Box(left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    if scene.title:
        split = area.split_bottom if scene.look.title_below else area.split_top
        strip, area = split(height * (0.1 if scene.difficulty.named else 0.2))
        page.write(scene.title, strip)
    DRAW[scene.picture](page, area, scene)
    return page.image
