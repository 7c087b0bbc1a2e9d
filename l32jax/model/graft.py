"""From a text model to a vision model that still is that text model."""

import dataclasses

import jax

from l32jax.config import LlamaConfig
from l32jax.errors import InputError
from l32jax.model.parameters import Params


def graft(
    text_config: LlamaConfig, text_params: Params, vision_config: LlamaConfig, fresh_params: Params
) -> Params:
    """The text model's weights inside the vision model; image encoder and adapter stay fresh.

    Self-attention layer i goes to group i // 4, and in it to the (i % 4)-th self-attention slot.
    While the gates are zero, as `init_params` makes them, text scores what it scored before.

    Args:
      vision_config: `presets.with_vision(text_config, …)`.
      fresh_params: of the vision model, as from `init_params`. Arrays are shared, not copied,
        where they need not be stacked anew.
    Raises:
      InputError: the decoders differ in more than the cross-attention blocks.
    """
    pattern = vision_config.decoder.group_pattern
    slots = [slot for slot, kind in enumerate(pattern) if kind == "self"]
    trunk = dataclasses.replace(
        vision_config.decoder,
        group_pattern=("self",),
        num_groups=vision_config.decoder.count("self"),
    )
    if trunk != text_config.decoder:
        raise InputError(
            f"vision_config of a graft: without its cross-attention blocks it is {trunk}, and the "
            f"text model is {text_config.decoder}; make it with presets.with_vision"
        )
    layers = text_params["decoder"]["groups"]["blocks"][0]
    blocks = dict(fresh_params["decoder"]["groups"]["blocks"])
    for place, slot in enumerate(slots):
        blocks[slot] = jax.tree.map(lambda leaf, at=place: leaf[at :: len(slots)], layers)
    decoder = fresh_params["decoder"] | text_params["decoder"] | {"groups": {"blocks": blocks}}
    return fresh_params | {"decoder": decoder}
