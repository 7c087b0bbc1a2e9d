"""From a text model to a vision model that still is that text model."""

import dataclasses
from typing import Any

from l32jax.checkpoint.engine.slices import Home, Slices
from l32jax.config import DecoderConfig, LlamaConfig
from l32jax.errors import InputError
from l32jax.model.llama import shapes_of
from l32jax.model.parameters import part_of

BLOCKS = "decoder/groups/blocks/"


def graft(trunk: Slices, text: LlamaConfig, vision: LlamaConfig) -> Slices:
    """A text model's parameters as those of the language model inside of a vision model.

    Nothing is read, so nothing is copied: who loads the result reads each layer into its new place.
    With n self-attention blocks in a group, layer i goes to group i // n, into slot i % n of those.
    While the gates of the cross-attention blocks are zero, as `init_params` makes them, and
    wherever no image is seen, text scores what it scored before.

    Args:
      text: what `trunk` holds.
      vision: `presets.with_vision(text, ...)`.
    Raises:
      InputError: the decoders differ in more than the cross-attention blocks.
    """
    _require_trunk(text, vision)
    shapes = {
        path: shape
        for path, shape in shapes_of(vision).items()
        if part_of(path, vision) == "language_model"
    }
    dtypes = {path: trunk.dtypes[_origin(Home(path, 0), vision).path] for path in shapes}
    return dataclasses.replace(
        trunk,
        shapes=shapes,
        dtypes=dtypes,
        read=lambda home, rows: trunk.read(_origin(home, vision), rows),
    )


def is_trunk(text: LlamaConfig, vision: LlamaConfig) -> bool:
    """Whether it is the text model that the vision model was built on, LoRA or not."""
    return text.vision is None and text.decoder == _without_cross_blocks(vision)


def overlaid(slices: Slices, others: Slices) -> Slices:
    """With what the others have in place of what has the same path."""

    def read(home: Home, rows: slice) -> Any:
        return (others if home.path in others.shapes else slices).read(home, rows)

    def release() -> None:
        slices.release()
        others.release()

    return Slices(
        slices.where,
        {**slices.shapes, **others.shapes},
        {**slices.dtypes, **others.dtypes},
        read,
        release,
    )


def _require_trunk(text: LlamaConfig, vision: LlamaConfig) -> None:
    if not is_trunk(text, vision):
        raise InputError(
            f"vision model of a graft: without its cross-attention blocks it is "
            f"{_without_cross_blocks(vision)}, and the text model is {text.decoder}; make it with "
            "presets.with_vision"
        )


def _without_cross_blocks(vision: LlamaConfig) -> DecoderConfig:
    decoder, layers = vision.without_lora().decoder, vision.decoder.count("self")
    return dataclasses.replace(decoder, group_pattern=("self",), num_groups=layers)


def _origin(home: Home, vision: LlamaConfig) -> Home:
    """Where the text model has what the vision model has at `home`."""
    if not home.path.startswith(BLOCKS):
        return home
    slot, _, rest = home.path.removeprefix(BLOCKS).partition("/")
    pattern = vision.decoder.group_pattern
    nth = pattern[: int(slot)].count("self")
    assert home.layer is not None
    return Home(f"{BLOCKS}0/{rest}", home.layer * pattern.count("self") + nth)
