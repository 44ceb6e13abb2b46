"""Views as the network reads them: raw in the batch, cast and windowed patch by patch.

Letters: B views, C channels, ZYX voxels, K patches that are asked for, P voxel values of a patch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from glmae_ray.models.vit3d import Grid, patch_grid, patchify


class ViewPatches(NamedTuple):
    """The views of one kind, those of all samples in one row; nothing is copied until asked for.

    Attributes:
        voxels_BCZYX: Raw intensities, int16 or any other dtype.
        windows_BC2: Floating point; the values that become 0 and 1.
        patch: Voxels of a patch along Z, Y, X.
        samples: How many samples the views belong to.
    """

    voxels_BCZYX: Tensor
    windows_BC2: Tensor
    patch: Grid
    samples: int

    @property
    def grid(self) -> Grid:
        """Patches along Z, Y, X."""
        return patch_grid(list(self.voxels_BCZYX.shape[2:]), self.patch)

    def all(self) -> Tensor:
        """Every patch in order, (B, N, P) in [0, 1]."""
        raw = patchify(self.voxels_BCZYX, self.patch)
        return self._unit(raw.unflatten(2, (self.windows_BC2.shape[1], -1))).flatten(2)

    def at(self, index_BK: Tensor) -> Tensor:
        """The patches of these numbers, (B, K, P) in [0, 1]; no other voxel is touched."""
        (z, y, x), (pz, py, px) = self.grid, self.patch
        b, c = self.voxels_BCZYX.shape[:2]
        cut = self.voxels_BCZYX.reshape(b, c, z, pz, y, py, x, px).permute(0, 2, 4, 6, 1, 3, 5, 7)
        rows = torch.arange(b, device=index_BK.device).unsqueeze(1)
        raw = cut[rows, index_BK // (y * x), index_BK // x % y, index_BK % x]
        return self._unit(raw.flatten(3)).flatten(2)

    def _unit(self, raw_BKCV: Tensor) -> Tensor:
        """Map the window linearly to [0, 1] and cut what lies beyond (docs/method.md, grade L)."""
        low, high = self.windows_BC2[:, None, :, None, :].unbind(-1)
        return (raw_BKCV - low).div_(high - low).clamp_(0, 1)
