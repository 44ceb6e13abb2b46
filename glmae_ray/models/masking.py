"""Which tokens of a view are hidden: a pure function of the view's seed, the same on any device."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF


def draw_masks(seeds_B: Tensor, *, tokens: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Choose uniformly which tokens stay.

    Args:
        seeds_B: One int64 seed a view.
        tokens: N, the number of patches of a view.
        ratio: Share of the patches that is hidden.

    Returns:
        kept (B, floor(N (1 - ratio))) and hidden (B, the rest), token numbers in rising order.
    """
    # 1e-9 keeps 1000 * (1 - 0.6) = 399.99999999999994 from losing a token.
    keep = max(1, int(tokens * (1 - ratio) + 1e-9))
    order = _noise(seeds_B, tokens).argsort(dim=1, stable=True)
    return order[:, :keep].sort(dim=1).values, order[:, keep:].sort(dim=1).values


def _noise(seeds_B: Tensor, tokens: int) -> Tensor:
    """A 32-bit hash of (seed, token number), (B, N) int64.

    Integer arithmetic gives the same bits on CPU and CUDA; torch's generators do not.
    """
    number_N = torch.arange(tokens, device=seeds_B.device, dtype=torch.int64)
    low, high = seeds_B & _LOW_32, (seeds_B >> 32) & _LOW_32
    return _mix(_mix(_mix(low)[:, None] ^ number_N) ^ high[:, None])


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers with good avalanche (Wellons' `lowbias32` constants)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW_32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW_32
    return x ^ (x >> 16)
