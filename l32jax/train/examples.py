"""A few documents of a batch as people read them: the picture, the question, the model's answer.

The answer is the likeliest token at every place, given the true ones before it: what the model in
training says to what it is trained on, and cheap. It flatters where an answer has several tokens.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from l32jax.config import CLIP_MEAN, CLIP_STD, VisionConfig
from l32jax.data.sheet.rows import canvas
from l32jax.data.tokenizer import Tokenizer

MAX_EXAMPLES = 4
MAX_SIDE = 448  # pixels of a picture that is shown
QUESTION_TOKENS = 200  # the last ones


class Example(NamedTuple):
    """A document of row `row`: `places` are where its answer is predicted; `image` may be none."""

    row: int
    begin: int
    places: np.ndarray
    image: int | None


class Told(NamedTuple):
    """An example in words."""

    question: str
    answer: str
    truth: str


def choose(
    batch: Mapping[str, np.ndarray], vision: VisionConfig | None, *, max_places: int
) -> list[Example]:
    """One document of each of the first rows that have something to predict, with images first."""
    found = []
    for row in range(len(batch["tokens"])):
        if example := _choose_of_row(batch, vision, row, max_places):
            found.append(example)
        if len(found) == MAX_EXAMPLES:
            break
    return found


def _choose_of_row(
    batch: Mapping[str, np.ndarray], vision: VisionConfig | None, row: int, max_places: int
) -> Example | None:
    predicting = np.flatnonzero(batch["weights"][row])
    if not len(predicting):
        return None
    looking = predicting[:0]
    if vision is not None and "vision_stop" in batch:
        looking = predicting[(batch["vision_stop"] > batch["vision_start"])[row, predicting]]
    first = int((looking if len(looking) else predicting)[0])
    begin = int(batch["start"][row, first])
    places = predicting[batch["start"][row, predicting] == begin][:max_places]
    image = None
    if len(looking) and vision is not None:
        slot = int(batch["vision_start"][row, first]) // vision.tokens_per_tile
        image = int(batch["tile_index"][row, slot]) // vision.max_tiles
    return Example(row, begin, places, image)


def asked_places(examples: Iterable[Example], shape: tuple[int, int]) -> np.ndarray:
    """int32 [b q]: the examples' places in their rows, -1 elsewhere."""
    places = np.full(shape, -1, np.int32)
    for example in examples:
        places[example.row, : len(example.places)] = example.places
    return places


def looking_places(batch: Mapping[str, np.ndarray], num_places: int) -> np.ndarray:
    """int32 [b q]: tokens of each row that see an image, evenly spread; -1 where fewer do."""
    rows = len(batch["tokens"])
    places = np.full((rows, num_places), -1, np.int32)
    if "vision_stop" not in batch:
        return places
    for row, sees in enumerate(batch["vision_stop"] > batch["vision_start"]):
        seeing = np.flatnonzero(sees)
        count = min(len(seeing), num_places)
        places[row, :count] = seeing[np.linspace(0, len(seeing) - 1, count).astype(int)]
    return places


def tell(
    example: Example, batch: Mapping[str, np.ndarray], answers: np.ndarray, tokenizer: Tokenizer
) -> Told:
    """`answers` [b q] are the likeliest tokens after the asked places."""
    tokens, targets = batch["tokens"][example.row], batch["targets"][example.row]
    end = int(example.places[0]) + 1
    begin = max(example.begin, end - QUESTION_TOKENS)
    answer = answers[example.row, : len(example.places)]
    return Told(
        *(_text(ids, tokenizer) for ids in (tokens[begin:end], answer, targets[example.places]))
    )


def _text(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """Without image tokens, which have no text."""
    return tokenizer.decode([token for token in ids.tolist() if token < tokenizer.num_tokens])


def picture(example: Example, batch: Mapping[str, np.ndarray]) -> Image.Image | None:
    """What the encoder sees of the example's image: its canvas, made smaller; not of features."""
    if example.image is None or "tiles" not in batch:
        return None
    rows, columns = batch["aspect"][example.row, example.image].tolist()
    tiles = _pixels(batch["tiles"][example.row, example.image])
    image = Image.fromarray(canvas(tiles, (rows, columns)))
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def _pixels(tiles: np.ndarray) -> np.ndarray:
    if tiles.dtype == np.uint8:
        return tiles
    mean, std = (np.array(each)[:, None, None] for each in (CLIP_MEAN, CLIP_STD))
    return (np.clip(tiles * std + mean, 0, 1) * 255).round().astype(np.uint8)


def as_markdown(told: Told) -> str:
    """As TensorBoard shows texts; in code blocks, where nothing of them is markup."""
    blocks = ((name, text.replace("\n", "\n    ")) for name, text in told._asdict().items())
    return "\n\n".join(f"**{name}**\n\n    {text}" for name, text in blocks)


def captioned(image: Image.Image, told: Told) -> np.ndarray:
    """uint8 [y x 3]: the picture over what was asked, what was answered, and the truth."""
    text = "\n".join(_wrapped(f"{name}: {each}") for name, each in told._asdict().items())
    text = text.encode("latin-1", "replace").decode("latin-1")  # what the built-in font has
    width = max(image.width, 320)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    height = int(ruler.multiline_textbbox((0, 0), text)[3]) + 8
    canvas = Image.new("RGB", (width, image.height + height), "white")
    canvas.paste(image)
    ImageDraw.Draw(canvas).multiline_text((4, image.height + 4), text, fill="black")
    return np.asarray(canvas)


def _wrapped(text: str, width: int = 52, most: int = 6) -> str:
    lines = [line[i : i + width] for line in text.splitlines() for i in range(0, len(line), width)]
    return "\n".join([*lines[:most], "..."] if len(lines) > most else lines)
