"""Numbers that depend on seed and sample alone; orders are tested with the stream."""

import numpy as np
import pytest
from scipy import stats
from tokar.data.randoms import gaussian


def test_noise_is_of_the_sample_alone():
    noise = gaussian(7, [3, 1000], (5, 3))
    assert np.array_equal(noise[1:], gaussian(7, [1000], (5, 3)))
    assert not np.array_equal(noise, gaussian(8, [3, 1000], (5, 3)))
    assert noise.dtype == np.float32
    assert noise[0, 0].tolist() == pytest.approx([-0.9020237, 1.4971825, -1.2281495], abs=1e-6)


def test_noise_is_normal_and_without_correlation():
    many = gaussian(0, range(2000), (5, 3)).reshape(2000, 15)
    assert stats.kstest(many.flatten(), "norm").pvalue > 0.01
    assert np.abs(np.corrcoef(many.T) - np.eye(15)).max() < 0.1
