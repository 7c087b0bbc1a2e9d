"""A typeface of our own: capitals and figures as pen strokes between 3 x 5 points.

Points are named a to o, three to a row from the top; strokes are separated by blanks.
"""

from PIL import Image, ImageDraw

ROWS, COLUMNS = 5, 3
FINER = 4  # drawn so much larger, then reduced: lines of Pillow have no soft edges

GLYPHS = {
    "a": "mdbfo gi",
    "b": "amnlhg hfba",
    "c": "cbdjno",
    "d": "amnlfba",
    "e": "camo gh",
    "f": "cam gh",
    "g": "cbdjnoih",
    "h": "am co gi",
    "i": "bn ac mo",
    "j": "clnj",
    "k": "am cgo",
    "l": "amo",
    "m": "mahco",
    "n": "maoc",
    "o": "bdjnlfb",
    "p": "mabfhg",
    "q": "bdjnlfb ko",
    "r": "mabfhg ho",
    "s": "cbdlnm",
    "t": "ac bn",
    "u": "ajnlc",
    "v": "anc",
    "w": "amhoc",
    "x": "ao cm",
    "y": "ahc hn",
    "z": "acmo",
    "0": "acoma",
    "1": "dbn mo",
    "2": "dbfmo",
    "3": "achlnm",
    "4": "nbjl",
    "5": "caghlnm",
    "6": "cbdjnlhg",
    "7": "acn",
    "8": "hdbfhjnlh",
    "9": "fbdhflnm",
    " ": "",
}


def stroke_mask(text: str, height: int, weight: float) -> Image.Image:
    """The text as a mask ("L") on a line of `height` pixels; `weight` is that of the pen to it."""
    tall = height * FINER
    step = 0.17 * tall  # between points, both ways
    advance = step * (COLUMNS - 1) + 0.18 * tall
    mask = Image.new("L", (max(round(advance * len(text)), FINER), tall))
    pen = ImageDraw.Draw(mask)
    width = max(round(weight * tall), FINER)
    for position, letter in enumerate(text.lower()):
        left = advance * position + 0.09 * tall
        for stroke in GLYPHS[letter].split():
            points = [_place(point, left, 0.12 * tall, step) for point in stroke]
            pen.line(points, fill=255, width=width, joint="curve")
    return mask.reduce(FINER)


def _place(point: str, left: float, top: float, step: float) -> tuple[float, float]:
    row, column = divmod(ord(point) - ord("a"), COLUMNS)
    return left + column * step, top + row * step
