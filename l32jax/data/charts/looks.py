"""How a picture is laid out, and which of it is held out.

              training, `test`                   `test-unseen` only
way           bars grow up, or to the right      to the left; up from an axis at the right
grid          none, lines                        dashes
title         above                              below
legend        names beside bars, list at right   list at left
ruling        none, lines                        bands (of tables)
alignment     left and right                     centred (of receipts)
plate         rectangle, rounded                 ellipse (of signs)
marker        none, circle                       square (of lines)
paper         white, gray, black                 cream, pale blue, dark green
shade         full                               darker, paler
face          typefaces.SEEN_FACES               typefaces.UNSEEN_FACES

A picture of `test-unseen` is new in all of these at once.
"""

import dataclasses
import random

from l32jax.data.charts.typefaces import SEEN_FACES, UNSEEN_FACES, Face

RGB = tuple[int, int, int]
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Look:
    """One choice of everything in the table; `axis_right` is true wherever it is held out."""

    way: str
    axis_right: bool
    grid: str
    title_below: bool
    legend: str
    ruling: str
    alignment: str
    plate: str
    marker: str
    paper: RGB
    shade: tuple[RGB, float]
    face: Face

    @property
    def ink(self) -> RGB:
        return BLACK if sum(self.paper) > 3 * 127 else WHITE


SEEN = {
    "way": ("up", "right"),
    "axis_right": (False,),
    "grid": ("none", "lines"),
    "title_below": (False,),
    "legend": ("beside", "right"),
    "ruling": ("none", "lines"),
    "alignment": ("justified",),
    "plate": ("rectangle", "rounded"),
    "marker": ("none", "circle"),
    "paper": (WHITE, WHITE, (225, 225, 225), (20, 20, 20)),
    "shade": ((WHITE, 0.0),),
    "face": SEEN_FACES,
}
UNSEEN = {
    "way": ("up", "left"),
    "axis_right": (True,),
    "grid": ("dashes",),
    "title_below": (True,),
    "legend": ("left",),
    "ruling": ("bands",),
    "alignment": ("centred",),
    "plate": ("ellipse",),
    "marker": ("square",),
    "paper": ((255, 245, 215), (215, 235, 255), (15, 55, 35)),
    "shade": ((BLACK, 0.2), (WHITE, 0.25)),
    "face": UNSEEN_FACES,
}


def choose_look(rng: random.Random, *, unseen: bool) -> Look:
    choices = UNSEEN if unseen else SEEN
    return Look(**{field: rng.choice(values) for field, values in choices.items()})


def mixed(color: RGB, other: RGB, share: float) -> RGB:
    """The color with that share of another."""
    red, green, blue = (
        round((1 - share) * a + share * b) for a, b in zip(color, other, strict=True)
    )
    return red, green, blue


def shaded(color: RGB, look: Look, rng: random.Random) -> RGB:
    """The color as this picture has it: in the look's shade, and a little off."""
    levels = (level + rng.randint(-12, 12) for level in mixed(color, *look.shade))
    red, green, blue = (min(max(level, 0), 255) for level in levels)
    return red, green, blue
