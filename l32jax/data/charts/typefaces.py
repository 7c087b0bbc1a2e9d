"""Typefaces that come with Python packages, and what can be done to them.

Training and `test` use what Pillow brings, its Aileron and its old bitmap of Courier, and our own
strokes. Held out, for `test-unseen`, are the families that Matplotlib brings: DejaVu Serif, DejaVu
Sans Mono, STIX and Computer Modern.
"""

import dataclasses
import functools
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from l32jax.data.charts.strokes import stroke_mask
from l32jax.errors import InputError

BASELINE = 0.78  # of the height of a line, from its top
EM = 0.88  # font size to the height of a line


@dataclasses.dataclass(frozen=True)
class Face:
    """A typeface: a family, and how it is changed.

    family: "aileron", "courier" (bitmap), "strokes", or the name of a file that Matplotlib brings.
    weight: thickness added to the strokes, or theirs, to the height of a line.
    slant: how far the top leans to the right, to the height.
    spacing: room added between letters, to the height of a line.
    """

    family: str
    weight: float = 0.0
    slant: float = 0.0
    spacing: float = 0.0
    capitals: bool = False


SEEN_FACES = (
    Face("aileron"),
    Face("aileron", weight=0.03),
    Face("aileron", slant=0.25),
    Face("aileron", spacing=0.08),
    Face("aileron", weight=0.02, capitals=True),
    Face("courier"),
    Face("courier", slant=0.2),
    Face("strokes", weight=0.08),
    Face("strokes", weight=0.14),
    Face("strokes", weight=0.1, slant=0.25),
)
UNSEEN_FACES = (
    Face("DejaVuSerif"),
    Face("DejaVuSerif-Bold"),
    Face("DejaVuSansMono"),
    Face("DejaVuSansMono-Bold", capitals=True),
    Face("STIXGeneral", weight=0.02),
    Face("STIXGeneralBol"),
    Face("cmtt10", weight=0.02),
    Face("cmb10"),
)


def text_mask(face: Face, text: str, height: int) -> Image.Image:
    """The text as a mask ("L") of `height` pixels, as wide as it needs.

    Raises:
      InputError: the face is one of Matplotlib's, and that is not installed.
    """
    height = max(height, 4)
    text = text.upper() if face.capitals else text
    if face.family == "strokes":
        mask = stroke_mask(text, height, face.weight)
    elif face.family == "courier":
        mask = _bitmap_mask(text, height)
    else:
        mask = _outline_mask(face, text, height)
    return _slanted(mask, face.slant) if face.slant else mask


def _bitmap_mask(text: str, height: int) -> Image.Image:
    font = _courier()
    left, top, right, bottom = (round(side) for side in font.getbbox(text))
    mask = Image.new("L", (max(right - left, 1), bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=font)
    return mask.resize((max(round(mask.width * height / mask.height), 1), height))


def _outline_mask(face: Face, text: str, height: int) -> Image.Image:
    font = _font(face.family, round(EM * height))
    spacing = face.spacing * height
    parts = list(text) if spacing else [text]
    lengths = [font.getlength(part) + spacing for part in parts]
    mask = Image.new("L", (max(round(sum(lengths)) + 2, 1), height))
    pen = ImageDraw.Draw(mask)
    x = 1.0
    for part, length in zip(parts, lengths, strict=True):
        weight = face.weight * height
        place = (x, BASELINE * height)
        pen.text(place, part, fill=255, font=font, anchor="ls", stroke_width=weight)
        x += length
    return mask


def _slanted(mask: Image.Image, slant: float) -> Image.Image:
    lean = round(slant * mask.height)
    size = (mask.width + lean, mask.height)
    shear = (1, slant, -lean, 0, 1, 0)
    return mask.transform(size, Image.Transform.AFFINE, shear, Image.Resampling.BILINEAR)


@functools.lru_cache(maxsize=64)
def _font(family: str, size: int) -> ImageFont.FreeTypeFont:
    if family == "aileron":
        font = ImageFont.load_default(size)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise InputError("font of the charts: this Pillow has no FreeType; install its wheel")
        return font
    path = _matplotlib_fonts() / f"{family}.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _courier() -> ImageFont.ImageFont:
    return ImageFont.load_default_imagefont()


@functools.cache
def _matplotlib_fonts() -> Path:
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            "fonts of charts/test-unseen: Matplotlib, which has them, is not installed; "
            "run pip install 'l32jax[quickstart]'"
        ) from None
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"
