"""What is known of chips fits together."""

import pytest

from l32jax.errors import InputError
from l32jax.plan.chips import CHIPS, chip_of
from l32jax.train.flops import peak


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_a_chip_is_the_device_that_reports_know(chip):
    assert peak(chip.kind) == chip.peak


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_figures_are_of_one_order(chip):
    """A device computes some hundred operations in the time of a byte from its memory."""
    assert 100 < chip.peak / chip.hbm < 600
    assert chip.network < chip.link < chip.hbm
    assert bool(chip.clock) == bool(chip.torus) == (chip.platform == "tpu")


def test_a_topology_names_its_chip():
    assert chip_of("v5p:4x4x4") is chip_of("v5p") is CHIPS["v5p"]


def test_a_chip_that_is_not_known_is_refused():
    with pytest.raises(InputError, match="no chip is called 'v5l'.*did you mean 'v5"):
        chip_of("v5l:2x2")
