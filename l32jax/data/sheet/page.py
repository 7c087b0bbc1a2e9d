"""The sheet as a page: one file that needs no other, runs nothing, and is read by day and night."""

import base64
import html
import io
from collections.abc import Iterator

from l32jax.data.sheet.drawing import COLOURS, FONT_SIZE, image_colour, svg
from l32jax.data.sheet.figures import fill_bars, intervals, shown, tile_grid
from l32jax.data.sheet.letters import letters, plainly
from l32jax.data.sheet.rows import Picture, Piece, SeenRow, Sheet

WIDTH = 1100  # pixels of a drawing

STYLE = """
body { margin: 0 auto; max-width: 1140px; padding: 1rem; background: var(--paper);
  color: var(--ink); font: 15px/1.6 system-ui, sans-serif; }
h1 { font-size: 1.4rem } h2 { font-size: 1.15rem; margin-top: 2.5rem }
h3 { font-size: .85rem; font-weight: normal; color: var(--faint); margin: 1rem 0 .2rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem }
dt { color: var(--faint) } dd { margin: 0 }
svg { display: block; width: 100%; margin: .6rem 0 }
svg text { dominant-baseline: central; font: FONTpx system-ui, sans-serif }
.pictures { display: flex; flex-wrap: wrap; gap: 1.2rem }
figure { margin: 0 } figcaption { font-size: .8rem; color: var(--faint) }
.canvas { position: relative } .canvas img { display: block }
.canvas svg { position: absolute; inset: 0; height: 100%; margin: 0 }
.words { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; overflow: clip }
.words > * { unicode-bidi: isolate; border-radius: 3px; box-decoration-break: clone }
.w0 { color: var(--faint) }
.w1, .part { background:
  color-mix(in srgb, var(--learned) calc(var(--weight) * 100%), transparent) }
.special, .mark, .stray, i { font-size: .78em; border: 1px solid var(--faint); padding: 0 .3em;
  margin: 0 .1em; white-space: nowrap }
i { font-style: normal; border-style: dotted; padding: 0 .1em }
.mark { color: #16181b; text-decoration: none }
.stray, .wrong-mark { border-color: var(--wrong); color: var(--wrong) }
""".replace("FONT", str(FONT_SIZE))


def page(sheet: Sheet) -> str:
    """HTML; text of records stands in it as text."""
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "img-src data:; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width">',
            f"<title>{_escaped(sheet.title)}</title><style>{_colours()}{STYLE}</style></head><body>",
            f"<h1>{_escaped(sheet.title)}</h1>",
            *_about(sheet),
            *(
                part
                for number, (name, row) in enumerate(sheet.rows)
                for part in _row(number, name, row)
            ),
            "</body></html>\n",
        )
    )


def _colours() -> str:
    def named(time: int) -> str:
        return "".join(f"--{name}: {values[time]};" for name, values in COLOURS.items())

    fills = "".join(f"svg .{name} {{ fill: var(--{name}) }}" for name in COLOURS)
    marks = "".join(
        f".mark.{name} {{ background: var(--{name}) }}" for name in COLOURS if "image" in name
    )
    night = f"@media (prefers-color-scheme: dark) {{ :root {{ {named(1)} }} }}"
    return f":root {{ color-scheme: light dark; {named(0)} }} {night} {fills} {marks}"


def _about(sheet: Sheet) -> Iterator[str]:
    yield "<dl>"
    for name, value in sheet.facts:
        yield f"<dt>{_escaped(name)}</dt><dd>{_escaped(value)}</dd>"
    yield (
        '<dt>colours</dt><dd class="words"><span class="w0">not learned</span>  '
        '<span class="part" style="--weight:.3">learned with weight 0.3</span>  '
        '<span class="w1" style="--weight:1">with weight 1</span>  '
        '<b class="special">special token</b> <b class="mark image-0">image</b> '
        "<i>\\n</i> what would not be seen</dd></dl>"
    )
    if sheet.messages:
        yield f"<details><summary>{len(sheet.messages)} messages</summary><ul>"
        yield from (f"<li>{_escaped(message)}</li>" for message in sheet.messages)
        yield "</ul></details>"


def _row(number: int, name: str, row: SeenRow) -> Iterator[str]:
    yield f"<section><h2>{_escaped(name)}</h2>"
    yield svg(fill_bars(row, WIDTH), "how full the row is")
    yield '<div class="pictures">'
    yield from (_picture(number, picture) for picture in row.pictures)
    yield "</div>"
    for place, passage in enumerate(row.passages):
        yield f'<article><h3>{_escaped(passage.heading(place))}</h3><p class="words" dir="ltr">'
        yield from (_piece(number, piece) for piece in passage.pieces)
        yield "</p></article>"
    yield svg(intervals(row, WIDTH), "what each token sees")
    yield "</section>"


def _picture(number: int, picture: Picture) -> str:
    image = shown(picture)
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure id="{_anchor(number, picture.number)}">'
        f'<div class="canvas" style="width:{image.width}px">'
        f'<img alt="" src="data:image/png;base64,{data}">'
        f"{svg(tile_grid(picture, *image.size), 'its tiles')}</div>"
        f"<figcaption>{_escaped(picture.caption)}</figcaption></figure>"
    )


def _piece(number: int, piece: Piece) -> str:
    text, tip = _words(piece.text), html.escape(piece.tip)
    if piece.kind == "stray":
        return f'<b class="stray" title="{tip}">learned, but not next: {text}</b>'
    look = (
        f'class="{{}} {_weight_class(piece.weight)}" style="--weight:{_share(piece)}" title="{tip}"'
    )
    if piece.kind == "image" and piece.image is not None:
        link = f'href="#{_anchor(number, piece.image)}"'
        kind = f"mark {image_colour(piece.image)}"
        return f"<a {link} {look.format(kind)}>image {piece.image + 1}</a>"
    if piece.kind == "image":
        return f"<b {look.format('special wrong-mark')}>image, none seen</b>"
    if piece.kind == "special":
        return f"<b {look.format('special')}>{text}</b>"
    return f"<bdi {look.format('text')}>{text}</bdi>"


def _weight_class(weight: float) -> str:
    return "w0" if weight == 0 else "w1" if weight == 1 else "part"


def _share(piece: Piece) -> str:
    return f"{min(max(piece.weight, 0.0), 1.0):.3g}"


def _words(text: str) -> str:
    """Escaped, with signs for what would not be seen; lines break where they did."""
    return "".join(
        f"<i>{html.escape(stretch)}</i>" + "\n" * (stretch == r"\n")
        if is_sign
        else html.escape(stretch)
        for stretch, is_sign in letters(text)
    )


def _escaped(text: str) -> str:
    return html.escape(plainly(text))


def _anchor(row: int, image: int) -> str:
    return f"row-{row + 1}-image-{image + 1}"
