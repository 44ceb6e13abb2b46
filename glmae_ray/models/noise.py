"""Random numbers that belong to a seed: a hash in integers, the same bits on CPU and CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF


def noise(seeds: Tensor, numbers: Tensor | int) -> Tensor:
    """Hash (seed, number) to 32 bits; torch's own generators differ between devices.

    Args:
        seeds: int64 (...).
        numbers: Which draw of a seed, 32 bits; broadcasts against the seeds. Whoever draws has
            numbers of its own: masks count from 0, augmentations from 2^31.

    Returns:
        int64 (...) in [0, 2^32).
    """
    low, high = seeds & _LOW_32, (seeds >> 32) & _LOW_32
    return _mix(_mix(_mix(low) ^ numbers) ^ high)


def uniform(seeds: Tensor, number: int) -> Tensor:
    """Draw float32 (...) from [-1, 1), in exact steps of 2^-23."""
    return (noise(seeds, number) >> 8).to(torch.float32) * 2.0**-23 - 1


def happens(seeds: Tensor, number: int, *, chance: float) -> Tensor:
    """Draw bool (...), true with probability `chance`."""
    return noise(seeds, number) < round(chance * 2**32)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers with good avalanche (Wellons' `lowbias32` constants)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW_32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW_32
    return x ^ (x >> 16)
