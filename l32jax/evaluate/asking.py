"""Asking a model many questions, in batches of one shape."""

from collections.abc import Sequence

from rich.progress import track

from l32jax.data.images import ImageSource
from l32jax.generate.model import Model

ROWS = 128  # questions at a time


def replies(
    model: Model, asked: Sequence[tuple[str, ImageSource | None]], *, max_new_tokens: int
) -> list[str]:
    """The greedy reply to each question about its picture, or about none."""
    told: list[str] = []
    for first in track(range(0, len(asked), ROWS), "asking"):
        part = list(asked[first : first + ROWS])
        filled = part + part[-1:] * (ROWS - len(part))  # one shape, one compilation
        told += model.generate(
            [text for text, _ in filled],
            images=[[] if image is None else [image] for _, image in filled],
            max_new_tokens=max_new_tokens,
        )[: len(part)]
    return told
