"""Our own config in a checkpoint: JSON from anywhere, of which no size is believed."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from l32jax.checkpoint.fields import MAX_LAYERS, MAX_SIZE
from l32jax.config import LlamaConfig
from l32jax.config_text import decode
from l32jax.errors import InputError

LAYERS = ("num_groups", "num_local_layers", "num_global_layers")


def parsed(text: str, where: str) -> Any:
    """InputError unless it is JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"config in {where}: not JSON ({error}); download it again") from None


def read(values: Any, where: str) -> LlamaConfig:
    """What `dataclasses.asdict` made of a config. InputError, with `where`, if it is none."""
    with located(where):
        config = decode(LlamaConfig, values, "config")
        for part in (config.decoder, config.vision, *config.loras):
            for name, value in (asdict(part) if part else {}).items():
                most = MAX_LAYERS if name in LAYERS else MAX_SIZE
                if type(value) is int and value > most:
                    raise InputError(f"{name} is larger than {most}")
        return config


@contextmanager
def located(where: str) -> Iterator[None]:
    """Puts the place before the text of an InputError that does not name it."""
    try:
        yield
    except InputError as error:
        if where in str(error):
            raise
        raise InputError(f"config in {where}: {error}") from None
