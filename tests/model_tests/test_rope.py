import numpy as np
import pytest

from l32jax.config import RopeScaling
from l32jax.model.rope import frequencies

# Index of the pair: radians per position (llama-models' formula in float64).
PUBLISHED = {
    (64, 32): {14: 3.211445995e-3, 15: 1.290547928e-3, 16: 4.295567966e-4, 31: 9.418306725e-8},
    (128, 32): {29: 2.118406997e-3, 31: 7.625412034e-4, 35: 2.389053088e-5, 63: 7.672314972e-8},
    (128, 8): {29: 2.166570764e-3, 32: 5.24846161e-4, 34: 1.785078128e-4, 63: 3.068925989e-7},
}


@pytest.mark.parametrize("head_dim, factor", PUBLISHED)
def test_scaled_frequencies_are_the_published_ones(head_dim, factor):
    found = frequencies(head_dim, theta=500_000.0, scaling=RopeScaling(factor=float(factor)))
    for pair, expected in PUBLISHED[head_dim, factor].items():
        np.testing.assert_allclose(found[pair], expected, rtol=1e-6, err_msg=str(pair))


@pytest.mark.parametrize("head_dim, kept, blended", [(64, 15, 3), (128, 29, 6)])
def test_fast_pairs_are_kept_and_slow_ones_stretched(head_dim, kept, blended):
    plain = frequencies(head_dim, theta=500_000.0, scaling=None)
    scaled = frequencies(head_dim, theta=500_000.0, scaling=RopeScaling(factor=8.0))
    np.testing.assert_array_equal(scaled[:kept], plain[:kept])
    np.testing.assert_array_equal(scaled[kept + blended :], plain[kept + blended :] / 8)
