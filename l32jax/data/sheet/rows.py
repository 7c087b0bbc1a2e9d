"""What the arrays of a row say, for people: its documents, its pictures, and what sees what.

Nothing else is looked at, not even the samples that the row was made of: so mistakes in making rows
are seen.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from l32jax.config import VisionConfig
from l32jax.data.images import Grid
from l32jax.data.rows import Batch
from l32jax.data.sheet.segments import Segment, segments
from l32jax.data.tokenizer import Tokenizer

Kind = Literal["text", "special", "image", "stray"]


class Piece(NamedTuple):
    """Tokens [begin, end) of a row that are alike; `weight` is that of each as a target.

    Text has one weight; a special token is alone. An image token has the number of the last image
    that it sees, and None if there is none. A "stray" is a target that is learned at the last of
    the tokens without being the next token of the document.
    """

    kind: Kind
    text: str
    weight: float
    begin: int
    end: int
    image: int | None = None

    @property
    def tip(self) -> str:
        last = self.end - 1
        where = f"token {last}" if self.begin == last else f"tokens {self.begin}-{last}"
        return f"{where}, weight {self.weight:g}"


@dataclasses.dataclass(frozen=True)
class Passage:
    """Tokens that see keys from the same one on: a document, if all is well.

    positions: of its first and its last token. images: that any token of it sees.
    """

    begin: int
    end: int
    positions: tuple[int, int]
    pieces: tuple[Piece, ...]
    images: tuple[int, ...]
    is_padding: bool

    @property
    def learned(self) -> int:
        """Tokens that are targets."""
        return sum(piece.end - piece.begin for piece in self.pieces if piece.weight)

    def heading(self, number: int) -> str:
        """`number` among the passages of the row."""
        name = "padding that is learned" if self.is_padding else f"document {number + 1}"
        sees = f", sees image {', '.join(str(i + 1) for i in self.images)}" if self.images else ""
        first, last = self.positions
        return (
            f"{name}: tokens {self.begin}-{self.end - 1} at positions {first}-{last}, "
            f"{self.learned} learned{sees}"
        )


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image as the encoder gets it; `slots` are its tiles' places on the vision axis, if any."""

    number: int
    canvas: UInt8[np.ndarray, "y x 3"]
    grid: Grid
    slots: tuple[int | None, ...]

    @property
    def caption(self) -> str:
        (rows, columns), places = self.grid, ("none" if s is None else str(s) for s in self.slots)
        tiles = "1 tile" if rows * columns == 1 else f"{rows} x {columns} tiles"
        return f"image {self.number + 1}: {tiles}, on the vision axis at {', '.join(places)}"


@dataclasses.dataclass(frozen=True)
class SeenRow:
    """A row of a batch.

    used: its tokens that see something; others are padding.
    owners: of each place on the vision axis, the image whose tile it is; None for an unused tile.
    keys, tiles: what tokens see of the text, and of each place on the vision axis.
    """

    length: int
    used: int
    passages: tuple[Passage, ...]
    pictures: tuple[Picture, ...]
    owners: tuple[int | None, ...]
    keys: tuple[Segment, ...]
    tiles: tuple[tuple[Segment, ...], ...]


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Rows with their names, what is to be known about all of them, and what was said meanwhile."""

    title: str
    facts: tuple[tuple[str, str], ...]
    messages: tuple[str, ...]
    rows: tuple[tuple[str, SeenRow], ...]


def see_row(row: Batch, tokenizer: Tokenizer, vision: VisionConfig | None) -> SeenRow:
    """Reads one row of a batch: its arrays without the dimension `b`."""
    if vision is None or "tiles" not in row:
        vision, owners, pictures, bounds = None, (), (), None
    else:
        owners, pictures = _owners(row), _pictures(row)
        bounds = np.stack([row["vision_start"], row["vision_stop"]]) / vision.tokens_per_tile
    return SeenRow(
        length=len(row["tokens"]),
        used=int((row["stop"] > row["start"]).sum()),
        passages=tuple(_passages(row, tokenizer, owners, bounds)),
        pictures=pictures,
        owners=owners,
        keys=tuple(segments(row["start"], row["stop"])),
        tiles=tuple(
            tuple(segments(*np.clip(bounds, slot, slot + 1)))
            for slot in range(len(owners))
            if bounds is not None
        ),
    )


def canvas(tiles: UInt8[np.ndarray, "c 3 h w"], grid: Grid) -> UInt8[np.ndarray, "y x 3"]:
    """The picture that was cut into tiles, in row-major order; those left over are unused."""
    (rows, columns), (_, channels, height, width) = grid, tiles.shape
    cut = tiles[: rows * columns].reshape(rows, columns, channels, height, width)
    return cut.transpose(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)


def _owners(row: Batch) -> tuple[int | None, ...]:
    image, tile = np.divmod(row["tile_index"], row["tiles"].shape[1])
    is_used = tile < row["aspect"].prod(axis=1)[image]
    return tuple(int(i) if used else None for i, used in zip(image, is_used, strict=True))


def _pictures(row: Batch) -> tuple[Picture, ...]:
    max_tiles = row["tiles"].shape[1]
    slot_of = {int(tile): slot for slot, tile in enumerate(row["tile_index"])}
    found = []
    for number, (rows, columns) in enumerate(row["aspect"].tolist()):
        if rows * columns:
            first = number * max_tiles
            slots = tuple(slot_of.get(first + tile) for tile in range(rows * columns))
            pixels = canvas(row["tiles"][number], (rows, columns))
            found.append(Picture(number, pixels, (rows, columns), slots))
    return tuple(found)


def _passages(
    row: Batch, tokenizer: Tokenizer, owners: Sequence[int | None], bounds: np.ndarray | None
) -> Iterator[Passage]:
    sees, learns = row["stop"] > row["start"], row["weights"] != 0
    # Padding is no document, but may be learned by mistake.
    belongs = np.where(sees, row["start"], np.where(learns, -1, -2))
    changes = np.flatnonzero(np.diff(belongs)) + 1
    for begin, end in pairwise([0, *changes.tolist(), len(belongs)]):
        if belongs[begin] == -2:
            continue
        seen = _seen_images(owners, bounds, begin, end)
        yield Passage(
            begin,
            end,
            positions=(int(row["positions"][begin]), int(row["positions"][end - 1])),
            pieces=tuple(_pieces(row, begin, end, tokenizer, seen)),
            images=tuple(sorted({image for images in seen for image in images})),
            is_padding=bool(belongs[begin] == -1),
        )


def _seen_images(
    owners: Sequence[int | None], bounds: np.ndarray | None, begin: int, end: int
) -> list[tuple[int, ...]]:
    """The images that each token sees a tile of, in the order of the vision axis."""
    if bounds is None:
        return [()] * (end - begin)
    known: dict[tuple[float, float], tuple[int, ...]] = {}
    found = []
    for start, stop in bounds[:, begin:end].T.tolist():
        if (start, stop) not in known:
            slots = owners[int(start) : int(np.ceil(stop))] if stop > start else ()
            known[start, stop] = tuple(dict.fromkeys(i for i in slots if i is not None))
        found.append(known[start, stop])
    return found


def _pieces(
    row: Batch, begin: int, end: int, tokenizer: Tokenizer, seen: Sequence[tuple[int, ...]]
) -> Iterator[Piece]:
    tokens = row["tokens"][begin:end].tolist()
    targets = row["targets"][begin:end].tolist()
    given = row["weights"][begin:end].tolist()
    follows = [target == token for target, token in zip(targets, tokens[1:], strict=False)]
    weights = [0.0, *(w if ok else 0.0 for w, ok in zip(given, follows, strict=False))]
    is_stray = [bool(w) and not ok for w, ok in zip(given, [*follows, False], strict=True)]
    strays_before = np.cumsum([False, *is_stray]).tolist()
    kinds = _kinds(tokens, tokenizer)

    def alike(i: int) -> tuple[Kind, float, int]:
        return kinds[i], weights[i], strays_before[i] if kinds[i] == "text" else i

    for (kind, weight, _), places in groupby(range(end - begin), key=alike):
        span = list(places)
        first, last = span[0], span[-1]
        image = seen[first][-1] if kind == "image" and seen[first] else None
        text = _text(tokens[first : last + 1], tokenizer)
        yield Piece(kind, text, weight, begin + first, begin + last + 1, image)
        if is_stray[last]:
            text, after = _text([targets[last]], tokenizer), begin + last + 1
            yield Piece("stray", text, given[last], after - 1, after)


def _kinds(tokens: Sequence[int], tokenizer: Tokenizer) -> list[Kind]:
    special = set(tokenizer.specials.values())
    return [
        "image"
        if token == tokenizer.image_id
        else "special"
        if token in special or token >= tokenizer.num_tokens
        else "text"
        for token in tokens
    ]


def _text(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    if max(tokens) > (tokenizer.image_id or tokenizer.num_tokens - 1):
        return f"token {tokens[0]}"  # special, so alone: no token of the model's
    return tokenizer.decode(tokens)
