"""Bars and lines as pictures."""

from l32jax.data.charts.axes import (
    TOP,
    draw_axes,
    draw_grid,
    small_text,
    write_beside,
    write_legend,
    write_numbers,
)
from l32jax.data.charts.page import Box, Page
from l32jax.data.charts.scenes import Scene

GAP = 0.14  # at either side of a bar, of the room for it


def draw_bars(page: Page, area: Box, scene: Scene) -> None:
    upright = scene.look.way == "up"
    if scene.difficulty.named:
        write_names = write_beside if scene.look.legend == "beside" else write_legend
        area = write_names(page, area, scene, upright)
        area = write_numbers(page, area, scene, upright)
    draw_grid(page, area, upright)
    for index, (color, number) in enumerate(zip(scene.colors, scene.firsts.values(), strict=True)):
        slot = _slot(area, index, len(scene.rows), upright)
        page.fill(_grown(slot, number / scene.difficulty.step / TOP, scene.look.way), color)
    draw_axes(page, area)


def draw_line(page: Page, area: Box, scene: Scene) -> None:
    """A point for each name, which stands below it."""
    names, area = area.split_bottom(small_text(scene))
    if scene.difficulty.named:
        area = write_numbers(page, area, scene, True)
        names = names._replace(left=area.left, right=area.right)
    draw_grid(page, area, True)
    draw_axes(page, area)
    points = []
    for index, (name, number) in enumerate(scene.firsts.items()):
        slot = area.column(index, len(scene.rows))
        share = number / scene.difficulty.step / TOP
        points.append(((slot.left + slot.right) / 2, slot.bottom - share * slot.height))
        page.write(name, names.column(index, len(scene.rows)))
    page.pen.line(points, fill=scene.colors[0], width=2 * page.line)
    for x, y in points:
        _mark(page, x, y, scene)


def _mark(page: Page, x: float, y: float, scene: Scene) -> None:
    size = 2 * page.line
    ends = (round(x - size), round(y - size), round(x + size), round(y + size))
    if scene.look.marker == "circle":
        page.pen.ellipse(ends, fill=scene.colors[0])
    elif scene.look.marker == "square":
        page.pen.rectangle(ends, fill=scene.colors[0])


def _slot(area: Box, index: int, count: int, upright: bool) -> Box:
    slot = area.column(index, count) if upright else area.row(index, count)
    return slot.shrunk(GAP * slot.width, 0.0) if upright else slot.shrunk(0.0, GAP * slot.height)


def _grown(slot: Box, share: float, way: str) -> Box:
    if way == "up":
        return slot.split_bottom(share * slot.height)[0]
    split = slot.split_left if way == "right" else slot.split_right
    return split(share * slot.width)[0]
