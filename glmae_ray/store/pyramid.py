"""The pyramid of a volume: each level out of the sums of the one before, slab by slab; pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmae_ray.store.layout import pyramid_factors
from glmae_ray.volume import Shape, Volume

_EXACT_IN_FLOAT32 = 2**9  # as many int16 values sum up to 24 bits at most


def make_pyramid(volume: Volume, levels: int) -> list[NDArray[Any]]:
    """All levels of a volume, each (C, Z, Y, X) of its dtype: means, with odd sides rounded up.

    The last cell of an odd side averages the voxels that are there. Integers are rounded to the
    nearest, halves to even.
    """
    factors = pyramid_factors(volume.shape, volume.spacing, levels)
    sides = [[-(-side // n) for side, n in zip(volume.shape, f, strict=True)] for f in factors]
    array = volume.array
    pyramid = [array, *(np.empty((len(array), *shape), array.dtype) for shape in sides[1:])]
    for channel, *targets in zip(*pyramid, strict=True):
        _average(channel, targets, factors)
    return pyramid


def _average(
    channel: NDArray[Any], targets: Sequence[NDArray[Any]], factors: Sequence[Shape]
) -> None:
    """Fill the coarser levels (Z, Y, X), a plane of the coarsest at a time: sums stay in cache."""
    is_integer = channel.dtype.kind == "i"
    is_exact = is_integer and math.prod(factors[-1]) <= _EXACT_IN_FLOAT32
    dtype = np.float32 if is_exact else np.float64
    depth = factors[-1][0]
    counts = [_counts(channel.shape, factor, dtype) for factor in factors[1:]]
    for start in range(0, len(channel), depth):
        sums = channel[start : start + depth].astype(dtype)
        for (before, factor), target, (in_z, in_yx) in zip(
            pairwise(factors), targets, counts, strict=True
        ):
            for axis in range(3):
                sums = _halved(sums, axis) if factor[axis] > before[axis] else sums
            planes = slice(start // factor[0], start // factor[0] + len(sums))
            means = sums / (in_z[planes] * in_yx)
            target[planes] = np.rint(means, out=means) if is_integer else means


def _halved(sums: NDArray[Any], axis: int) -> NDArray[Any]:
    """Sums of neighbouring pairs; the last of an odd number stays alone."""
    ahead = (slice(None),) * axis
    even, odd = sums[*ahead, 0::2], sums[*ahead, 1::2]
    if even.shape == odd.shape:
        return even + odd
    pairs = even.copy()
    pairs[*ahead, : odd.shape[axis]] += odd
    return pairs


def _counts(
    shape: Sequence[int], factor: Shape, dtype: type[np.floating]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Level-0 voxels that each cell covers: planes (z, 1, 1), and within a plane (y, x)."""
    z, y, x = (
        np.diff(np.arange(0, side + n, n).clip(max=side)).astype(dtype)
        for side, n in zip(shape, factor, strict=True)
    )
    inside = y[:, None] * x
    # One number divides faster than a plane of equal ones.
    return z[:, None, None], inside[:1, :1] if (inside == inside[0, 0]).all() else inside
