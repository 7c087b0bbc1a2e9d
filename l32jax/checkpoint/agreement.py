"""What all processes of a run do alike, though only one of them has looked."""

import logging

import jax
import numpy as np
from jax.experimental import multihost_utils

from l32jax.checkpoint.steps import Steps

logger = logging.getLogger(__name__)


def undamaged_step(steps: Steps) -> int:
    """The newest step whose files are as written: process 0 reads them, and all follow it.

    InputError if there is none.
    """
    step, complaints = None, {}
    if jax.process_index() == 0:
        step, complaints = steps.newest_undamaged()
    chosen = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    if chosen < 0:
        raise steps.nothing_usable(complaints)
    for bad, complaint in complaints.items():
        path = steps.path(bad)
        logger.warning("checkpoint in %s: %s; using step %d instead", path, complaint, chosen)
    return chosen
