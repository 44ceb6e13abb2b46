"""The pyramid, against plain means of blocks and tensorstore's downsampling."""

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from glmae_ray.store.layout import pyramid_factors
from glmae_ray.store.pyramid import make_pyramid
from glmae_ray.volume import Volume


def volume(array, spacing=(3.0, 1.0, 1.5)):
    z_mm, y_mm, x_mm = spacing
    affine = np.array([[0, 0, x_mm, 0], [0, y_mm, 0, 0], [z_mm, 0, 0, 0], [0, 0, 0, 1.0]])
    return Volume(array, affine, "CT", "case")


def block_means(channel, factor):
    """Mean of the voxels that each cell covers, one cell after the other."""
    sides = [-(-side // n) for side, n in zip(channel.shape, factor, strict=True)]
    means = np.empty(sides)
    for cell in np.ndindex(*sides):
        box = (slice(c * n, (c + 1) * n) for c, n in zip(cell, factor, strict=True))
        means[cell] = channel[*box].astype(np.float64).mean()
    return means


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("levels", [1, 3, 5])
def test_each_level_is_the_rounded_mean_of_the_voxels_that_its_cells_cover(dtype, levels):
    array = np.random.default_rng(1).integers(-32768, 32768, (2, 19, 37, 50)).astype(dtype)
    scan = volume(array)
    pyramid = make_pyramid(scan, levels)

    factors = pyramid_factors(scan.shape, scan.spacing, levels)
    assert len(pyramid) == levels
    assert pyramid[0] is array
    for level, factor in zip(pyramid, factors, strict=True):
        means = np.stack([block_means(channel, factor) for channel in array])
        assert level.dtype == dtype
        if dtype == np.int16:
            np.testing.assert_array_equal(level, np.rint(means))
        else:
            np.testing.assert_allclose(level, means, rtol=1e-6, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    sides=st.tuples(*[st.integers(4, 70)] * 3),
    spacing=st.tuples(*[st.sampled_from([0.7, 1.0, 2.5, 5.0])] * 3),
    levels=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_integers_come_out_as_from_tensorstore(sides, spacing, levels, seed):
    array = np.random.default_rng(seed).integers(-32768, 32768, (1, *sides)).astype(np.int16)
    scan = volume(array, spacing)
    factors = pyramid_factors(scan.shape, scan.spacing, levels)
    for level, factor in zip(make_pyramid(scan, levels), factors, strict=True):
        expected = ts.downsample(ts.array(array), [1, *factor], "mean").read().result()
        np.testing.assert_array_equal(level, expected)


def test_sums_of_the_largest_values_do_not_overflow():
    array = np.full((1, 64, 64, 64), -32768, np.int16)
    for level in make_pyramid(volume(array, (1.0, 1.0, 1.0)), 4):
        assert (level == -32768).all()


def test_floats_near_the_largest_stay_finite():
    array = np.full((1, 33, 20, 18), 3e38, np.float32)
    for level in make_pyramid(volume(array), 3):
        np.testing.assert_allclose(level, 3e38, rtol=1e-6)
