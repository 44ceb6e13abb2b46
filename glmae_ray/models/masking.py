"""Which tokens of a view are hidden: a pure function of the view's seed, the same on any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from glmae_ray.config_data import kept_tokens
from glmae_ray.models.noise import noise


class Masks(NamedTuple):
    """Numbers of the patches of each view that stay and that are hidden, in rising order."""

    kept_BK: Tensor
    hidden_BM: Tensor


def draw_masks(seeds_B: Tensor, *, tokens: int, ratio: float) -> Masks:
    """Choose uniformly which tokens stay (verified: at random; the ratio is lineage).

    Args:
        seeds_B: One int64 seed a view.
        tokens: N, the number of patches of a view.
        ratio: Share of the patches that is hidden.

    Returns:
        kept (B, floor(N (1 - ratio))) and hidden (B, the rest), token numbers in rising order.
    """
    keep = kept_tokens(tokens, ratio)
    number_N = torch.arange(tokens, device=seeds_B.device)
    order = noise(seeds_B[:, None], number_N).argsort(dim=1, stable=True)
    kept, hidden = order[:, :keep], order[:, keep:]
    return Masks(kept.sort(dim=1).values, hidden.sort(dim=1).values)
