"""What stands around bars and lines: axes with a grid and numbers, names, a legend.

Each that writes returns the room that it leaves.
"""

from l32jax.data.charts.page import Box, Page
from l32jax.data.charts.scenes import Scene

MARKED = (3, 6, 9)  # steps with a line and a number
TOP = 9.5  # where an axis ends, in steps


def small_text(scene: Scene) -> float:
    """The height of a line of it in pixels."""
    return scene.size[1] * (0.07 if scene.difficulty.named else 0.19)


def draw_axes(page: Page, area: Box) -> None:
    """The line below, and the one at the side."""
    x = area.right if page.look.axis_right else area.left
    page.pen.line([(x, area.top), (x, area.bottom)], fill=page.look.ink, width=page.line)
    ends = [(area.left, area.bottom), (area.right, area.bottom)]
    page.pen.line(ends, fill=page.look.ink, width=page.line)


def draw_grid(page: Page, area: Box, upright: bool) -> None:
    if page.look.grid == "none":
        return
    dashed = page.look.grid == "dashes"
    for step in MARKED:
        if upright:
            y = area.bottom - step / TOP * area.height
            page.rule((area.left, y), (area.right, y), dashed=dashed)
        else:
            x = _along(page, area, step)
            page.rule((x, area.top), (x, area.bottom), dashed=dashed)


def write_numbers(page: Page, area: Box, scene: Scene, upright: bool) -> Box:
    """At the side if bars are upright, else below."""
    height = 0.8 * small_text(scene)
    if upright:
        split = area.split_right if scene.look.axis_right else area.split_left
        strip, area = split(2.2 * height)
    else:
        strip, area = area.split_bottom(1.3 * height)
    for step in MARKED:
        if upright:
            y = area.bottom - step / TOP * area.height
            place = Box(strip.left, y - height / 2, strip.right - 2, y + height / 2)
        else:
            x = _along(page, area, step)
            place = Box(x - 2 * height, strip.bottom - height, x + 2 * height, strip.bottom)
        page.write(str(step * scene.difficulty.step), place)
    return area


def write_beside(page: Page, area: Box, scene: Scene, upright: bool) -> Box:
    """Each name below its bar, or at its left."""
    height, count = small_text(scene), len(scene.rows)
    if upright:
        strip, area = area.split_bottom(height)
        strip = strip._replace(left=strip.left + 1.8 * height)  # below bars, not the numbers
        cells = [strip.column(index, count).shrunk(2.0, 0.0) for index in range(count)]
    else:
        strip, area = area.split_left(3.5 * height)
        strip = strip._replace(bottom=strip.bottom - 1.1 * height)
        rows = [strip.row(index, count) for index in range(count)]
        cells = [row.shrunk(0.0, max((row.height - height) / 2, 0)) for row in rows]
    for name, cell in zip(scene.names, cells, strict=True):
        page.write(name, cell)
    return area


def write_legend(page: Page, area: Box, scene: Scene, upright: bool) -> Box:
    """The names in a list, each behind its color."""
    height = small_text(scene)
    split = area.split_right if scene.look.legend == "right" else area.split_left
    strip, area = split(0.28 * area.width)
    for name, color in zip(scene.names, scene.colors, strict=True):
        line, strip = strip.split_top(1.3 * height)
        key, text = line.shrunk(0.3 * height, 0.15 * height).split_left(0.8 * height)
        page.fill(key.shrunk(0.0, 0.2 * height), color)
        page.write(name, text._replace(left=text.left + 0.3 * height), align="left")
    return area


def _along(page: Page, area: Box, step: int) -> float:
    """How far lying bars of so many steps reach."""
    reach = step / TOP * area.width
    return area.right - reach if page.look.axis_right else area.left + reach
