"""Block sizes fit the lists of their pairs into scalar memory."""

import pytest

from l32jax.kernels.tpu.chips import MOST_WORDS, fit_scalar_memory
from l32jax.kernels.tpu.schedule import Blocks

BLOCKS = Blocks(rows=256, keys=1024, step=256)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_long_rows_get_larger_blocks_of_keys(batch):
    blocks = fit_scalar_memory(BLOCKS, batch=batch, queries=131_072, keys=131_072)
    assert 2 * batch * (131_072 // 256) * (131_072 // blocks.keys) <= MOST_WORDS
    assert fit_scalar_memory(BLOCKS, batch=8, queries=8192, keys=8192) == BLOCKS


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="64 rows of 131072 queries .* use fewer rows, or more"):
        fit_scalar_memory(BLOCKS, batch=64, queries=131_072, keys=131_072)
