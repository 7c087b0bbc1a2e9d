"""What charts and documents show, and what is asked about it: made up from a seed.

Picture i of a split depends on (seed, split, i) alone: any can be made first, and none is stored.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from l32jax.data.charts.looks import RGB, Look, choose_look, shaded

Split = Literal["train", "test", "test-unseen"]
SIZES: dict[Split, int] = {"train": 1_000_000, "test": 1_000, "test-unseen": 1_000}
PICTURES = ("bars", "line", "table", "receipt", "sign")

COLORS: dict[str, RGB] = {
    "red": (215, 35, 35),
    "green": (40, 165, 60),
    "blue": (45, 90, 220),
    "yellow": (235, 200, 40),
    "purple": (140, 60, 190),
    "orange": (245, 130, 30),
}
# The first eight are the words of small pictures.
WORDS = (
    "tea", "milk", "soup", "rice", "lamp", "bus", "open", "sale", "exit", "zoo", "jazz", "fork",
    "apple", "bread", "candle", "door", "eagle", "field", "garden", "hotel", "island", "jacket",
    "kettle", "lemon", "market", "night", "ocean", "paper", "queen", "river", "silver", "table",
    "uncle", "violin", "window", "zebra", "anchor", "bridge", "copper", "dinner", "engine",
    "forest", "ginger", "hammer",
)  # fmt: skip
LETTERS = "abcdef"
LEAST_MARGIN = 0.02


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """How large pictures are, and how much is on them.

    width, height: of the picture in pixels, from and to.
    items: bars, points, rows or goods, from and to.
    columns: of numbers in tables.
    jitter: the widest margin at left, top and right, in parts of the size. What stands elsewhere
      in every picture is learned late.
    words: how many of WORDS are used.
    step: numbers are 1 to 9 times this.
    named: bars have words as names, in labels or a legend, and axes numbers; else bars are known
      by their color.
    """

    width: tuple[int, int]
    height: tuple[int, int]
    items: tuple[int, int]
    columns: int
    jitter: float
    words: int
    step: int
    named: bool


TINY = Difficulty(
    width=(64, 64),
    height=(64, 64),
    items=(2, 3),
    columns=1,
    jitter=0.05,
    words=8,
    step=1,
    named=False,
)
LARGE = Difficulty(
    width=(400, 1000),
    height=(300, 1000),
    items=(3, 6),
    columns=2,
    jitter=0.1,
    words=len(WORDS),
    step=10,
    named=True,
)


class Question(NamedTuple):
    """`kind` is of picture and question, "bars value"; `because` are the rows that decide."""

    kind: str
    text: str
    answer: str
    because: str = ""


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture before it is drawn.

    rows: names and their numbers: one each, in tables one for each column, on signs none.
    colors: of each row's bar; of a sign the one of its plate, whose name is `plate`.
    margin: how far from the edges it begins, in parts of the size.
    """

    picture: str
    title: str
    rows: tuple[tuple[str, tuple[int, ...]], ...]
    colors: tuple[RGB, ...]
    plate: str
    size: tuple[int, int]
    margin: tuple[float, float, float, float]
    look: Look
    difficulty: Difficulty

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.rows)

    @property
    def firsts(self) -> dict[str, int]:
        """The first number of each row by its name."""
        return {name: numbers[0] for name, numbers in self.rows}


@dataclasses.dataclass(frozen=True)
class Charts(Sequence[Scene]):
    """The pictures of a split as a random-access source of scenes."""

    split: Split
    difficulty: Difficulty = TINY
    seed: int = 0

    def __len__(self) -> int:
        return SIZES[self.split]

    def __getitem__(self, index):
        number = range(len(self))[index]
        rng = random.Random(f"{self.seed} {self.split} {number}")
        return make_scene(rng, self.difficulty, unseen=self.split == "test-unseen")


def make_scene(rng: random.Random, difficulty: Difficulty, *, unseen: bool) -> Scene:
    look = choose_look(rng, unseen=unseen)
    picture = rng.choice(PICTURES)
    words = WORDS[: difficulty.words]
    count = rng.randint(*difficulty.items)
    if picture == "sign":
        count = rng.randint(1, 2)
    color_names = rng.sample(list(COLORS), count)
    names = {"line": LETTERS[:count]}.get(picture) or rng.sample(words, count)
    if picture == "bars" and not difficulty.named:
        names = color_names
    titled = picture in ("bars", "line") and rng.random() < 0.5
    return Scene(
        picture=picture,
        title=rng.choice(words) if titled else "",
        rows=tuple(zip(names, _numbers(rng, picture, count, difficulty), strict=True)),
        colors=tuple(shaded(COLORS[name], look, rng) for name in color_names),
        plate=color_names[0] if picture == "sign" else "",
        size=(rng.randint(*difficulty.width), rng.randint(*difficulty.height)),
        margin=_margin(rng, difficulty),
        look=look,
        difficulty=difficulty,
    )


def _margin(rng: random.Random, difficulty: Difficulty) -> tuple[float, float, float, float]:
    left, top, right = (rng.uniform(LEAST_MARGIN, difficulty.jitter) for _ in range(3))
    return left, top, right, 0.03


def _numbers(
    rng: random.Random, picture: str, count: int, difficulty: Difficulty
) -> Iterator[tuple[int, ...]]:
    """The numbers of each row; no two of a column are the same."""
    columns = {"table": difficulty.columns, "sign": 0}.get(picture, 1)
    drawn = [rng.sample(range(1, 10), count) for _ in range(columns)]
    for row in range(count):
        yield tuple(column[row] * difficulty.step for column in drawn)


def description(scene: Scene) -> str:
    """Everything that is on the picture, "bars: red3, blue7"; every answer follows from it."""
    if scene.picture == "sign":
        return f"{scene.plate} sign: {' '.join(scene.names)}"
    begin = f"{scene.picture} {scene.title}" if scene.title else scene.picture
    rows = [row_text(name, *numbers) for name, numbers in scene.rows]
    if scene.picture == "receipt":
        rows.append(row_text("total", total(scene)))
    return f"{begin}: {', '.join(rows)}"


def row_text(name: str, *numbers: int) -> str:
    """A name and its numbers, "red3", "tea30 50".

    The first joins the name without a space, which in Llama's tokenizer is a token of its own where
    digits follow: what comes after a name should be its number, for a small model to look up.
    """
    return name + " ".join(map(str, numbers))


def total(scene: Scene) -> int:
    return sum(scene.firsts.values())
