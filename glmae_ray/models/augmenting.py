"""Flips and intensity jitter of views: pure functions of the view's seed, on the views' device.

Letters: B samples, V views of a kind, C channels, ZYX voxels, 2 the values that become 0 and 1.
Nothing here waits for the device, and what is off costs nothing. Each effect has a draw of its
own, so turning one on changes no other, and none changes a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glmae_ray.config_data import ViewsConfig
from glmae_ray.models.noise import happens, uniform

_FLIP_ALONG_ZYX = (2**31, 2**31 + 1, 2**31 + 2)
_SCALE, _SHIFT = 2**31 + 3, 2**31 + 4


def augment(
    views_BVCZYX: Tensor, windows_BVC2: Tensor, *, seeds_BV: Tensor, cfg: ViewsConfig
) -> tuple[Tensor, Tensor]:
    """Flip views and jitter their windows as the config says; both as they were where it is off.

    Args:
        views_BVCZYX: Raw intensities, any dtype.
        windows_BVC2: The values that become 0 and 1; V may be 1 for views that share them.
        seeds_BV: The int64 seed of each view, that of its mask.
        cfg: Probabilities and ranges.
    """
    views = flip(views_BVCZYX, seeds_BV, chances=cfg.flips)
    if cfg.jitter_scale or cfg.jitter_shift:
        scale, shift = cfg.jitter_scale, cfg.jitter_shift
        return views, jitter(windows_BVC2, seeds_BV, scale=scale, shift=shift)
    return views, windows_BVC2


def flip(views_BVCZYX: Tensor, seeds_BV: Tensor, *, chances: tuple[float, float, float]) -> Tensor:
    """Mirror each view along Z, Y and X with the given probabilities, all channels alike."""
    views = views_BVCZYX
    for axis, number, chance in zip((-3, -2, -1), _FLIP_ALONG_ZYX, chances, strict=True):
        if chance > 0:
            flipped_BV1111 = happens(seeds_BV, number, chance=chance)[..., None, None, None, None]
            views = torch.where(flipped_BV1111, views.flip(axis), views)
    return views


def jitter(windows_BVC2: Tensor, seeds_BV: Tensor, *, scale: float, shift: float) -> Tensor:
    """Give each view a window of its own, (B, V, C, 2), the same change for all channels.

    A voxel that was x in units of the window becomes 0.5 + a (x - 0.5) + b, with a uniform in
    1 +- `scale` and b in +- `shift`. Changing the window before the cut to [0, 1] costs no pass
    over the voxels, and shows what lay beyond the window where a plateau would move otherwise.
    """
    low, high = windows_BVC2.unbind(-1)
    a_BV1 = (1 + scale * uniform(seeds_BV, _SCALE)).unsqueeze(-1)
    b_BV1 = (shift * uniform(seeds_BV, _SHIFT)).unsqueeze(-1)
    width = (high - low) / a_BV1
    start = (low + high) / 2 - (0.5 + b_BV1) * width
    return torch.stack([start, start + width], dim=-1)
