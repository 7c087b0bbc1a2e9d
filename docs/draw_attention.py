"""Draws the pictures of attention.md from the project's own intervals, schedules and chunks.

python docs/draw_attention.py
"""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

from l32jax.data.rows import vision_intervals
from l32jax.kernels.context import balanced_order
from l32jax.kernels.intervals import active, hulls, whole
from l32jax.kernels.tpu.schedule import (
    CLOSES,
    OPENS,
    PARTLY,
    WHOLE,
    Blocks,
    key_block,
    row_block,
    schedule,
)

HERE = Path(__file__).parent / "pictures"
IMAGE = 9  # a token that stands for an image
# One packed row: a text, a document with two images, a question about one image, and padding.
DOCUMENTS = ([1] * 9, [1, IMAGE, 1, 1, 1, IMAGE, 1, 1, 1, 1], [IMAGE, 1, 1, 1, 1, 1])
TILES, TOKENS_PER_TILE, LENGTH = ([], [1, 2], [1]), 4, 28
SKIPPED, MASKED, FREE = "#f2efe9", "#f0a35e", "#3d6b8e"


def packed_row():
    """What each token of the row sees of the text, and of the images: two intervals."""
    text, images = np.zeros((2, LENGTH), np.int32), np.zeros((2, LENGTH), np.int32)
    offset = tiles_before = 0
    for tokens, tiles in zip(DOCUMENTS, TILES, strict=True):
        span = slice(offset, offset + len(tokens))
        text[0, span], text[1, span] = offset, np.arange(offset, span.stop) + 1
        start, stop = vision_intervals(tokens, IMAGE, tiles)
        sees = stop > start
        images[:, span] = (np.stack([start, stop]) + tiles_before) * TOKENS_PER_TILE * sees
        offset, tiles_before = span.stop, tiles_before + sum(tiles)
    return text, images


def visible(start, stop, num_keys: int) -> np.ndarray:
    key = np.arange(num_keys)
    return (key >= start[:, None]) & (key < stop[:, None])


def grid(axes, colours, values, *, title: str, x: str, y: str = "query") -> None:
    axes.imshow(values, cmap=ListedColormap(colours), vmin=0, vmax=len(colours) - 1, aspect="equal")
    axes.set_xticks(np.arange(-0.5, values.shape[1]), minor=True)
    axes.set_yticks(np.arange(-0.5, values.shape[0]), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0, labelsize=7)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)


def draw_intervals() -> None:
    text, images = packed_row()
    num_vision = sum(map(sum, TILES)) * TOKENS_PER_TILE
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.4), width_ratios=(LENGTH, num_vision))
    colours = [SKIPPED, FREE]
    grid(left, colours, visible(*text, LENGTH), title="text sees text", x="key: token of the row")
    title = "text sees images"
    grid(right, colours, visible(*images, num_vision), title=title, x="key: token of a tile")
    save(figure, "intervals")


def draw_blocks() -> None:
    """The pairs of blocks of both masks, numbered in the order of the forward list."""
    text, images = packed_row()
    num_vision = sum(map(sum, TILES)) * TOKENS_PER_TILE
    figure, axes = plt.subplots(1, 2, figsize=(8, 4.4), width_ratios=(LENGTH, num_vision))
    blocks = Blocks(rows=4, keys=4, step=4)
    for panel, bounds, num_keys in zip(axes, (text, images), (LENGTH, num_vision), strict=True):
        start, stop = (bound[None] for bound in bounds)
        seen = hulls(start, stop, block=blocks.rows, num_keys=num_keys)
        kinds = active(seen, block=blocks.keys, num_keys=num_keys).astype(int)[0]
        kinds = kinds + whole(seen, block=blocks.keys, num_keys=num_keys)[0]
        title = f"{int((kinds > 0).sum())} of {kinds.size} pairs of blocks"
        names = dict(title=title, x="block of keys", y="block of queries")
        grid(panel, [SKIPPED, MASKED, FREE], kinds, **names)
        plan = schedule(start, stop, num_keys=num_keys, blocks=blocks, parts=1)
        for place, word in enumerate(np.asarray(plan.by_rows)[0, : int(plan.num_by_rows[0, 0])]):
            if word & (WHOLE | PARTLY):
                at = (int(key_block(word)), int(row_block(word)))
                weight = "bold" if word & (OPENS | CLOSES) else "normal"
                style = dict(ha="center", va="center", fontsize=7, color="white", weight=weight)
                panel.text(*at, str(place), **style)
    save(figure, "blocks")


def draw_shards() -> None:
    """Which device holds which part of a row, and what each has to do in a causal one."""
    length, num_shards = 32, 4
    device = np.empty(length, int)
    device[balanced_order(length, num_shards)] = np.repeat(np.arange(num_shards), length // 4)
    causal = np.tril(np.ones((length, length), bool))
    colours = ["#3d6b8e", "#f0a35e", "#7a9e5f", "#a5566d", SKIPPED]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.2), width_ratios=(1.2, 1))
    values = np.where(causal, device[:, None], num_shards)
    grid(left, colours, values, title="balanced: colour = device of the query", x="key")
    plain = np.repeat(np.arange(num_shards), length // num_shards)
    for shift, (name, owner) in enumerate((("plain order", plain), ("balanced", device))):
        work = [causal[owner == each].sum() for each in range(num_shards)]
        place = np.arange(num_shards) + 0.4 * shift
        right.bar(place, work, 0.38, label=name, color=(MASKED, FREE)[shift])
    right.set_xticks(np.arange(num_shards) + 0.2, [f"device {i}" for i in range(num_shards)])
    right.tick_params(labelsize=7)
    right.set_title("pairs of query and key to compute", fontsize=9)
    right.legend(fontsize=7, frameon=False)
    save(figure, "shards")


def save(figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "l32jax"
    HERE.mkdir(exist_ok=True)
    draw_intervals()
    draw_blocks()
    draw_shards()
