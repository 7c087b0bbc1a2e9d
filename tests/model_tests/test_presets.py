"""The members of the family have the sizes that were published, and one body in each scan."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l32jax.config import VisionConfig
from l32jax.errors import InputError
from l32jax.model.llama import abstract_params, bind, forward
from l32jax.model.attention import Interval
from l32jax.model.parameters import combine, count, flatten, part_of, partition, trains
from l32jax.presets import PRESETS, TINY_TEXT, TINY_VISION, VISION_PATTERN, preset, with_vision
from l32jax.sharding import single_device_mesh

COUNTS = {
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
}
