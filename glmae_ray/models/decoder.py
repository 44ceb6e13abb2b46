"""The decoder: from the encoder's tokens to the standardised voxels of the hidden patches.

Letters: B views, K kept and M masked tokens, P voxel values of a patch, E embedding. Its form is
our decision (docs/method.md, grade D): width 576, so that sin-cos of three axes divides it, depth
8, 12 heads of 48, which the fused attention kernels take.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmae_ray.config import ModelConfig
from glmae_ray.models.masking import Masks
from glmae_ray.models.vit3d import (
    Block,
    Grid,
    initialise,
    run_blocks,
    sincos_positions,
)


class Decoder(nn.Module):
    """Rebuilds the hidden patches of a view; one decoder serves global and local views."""

    def __init__(self, cfg: ModelConfig, *, values: int) -> None:
        """Build from the encoder's width down to `values` numbers a patch."""
        super().__init__()
        width, self.recompute = cfg.decoder_width, cfg.activation_checkpointing
        self.embed = nn.Linear(cfg.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            Block(width, heads=cfg.decoder_heads) for _ in range(cfg.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = nn.Linear(width, values)
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, z_BKE: Tensor, *, masks: Masks, grid: Grid) -> Tensor:
        """Predict the standardised voxels of the hidden patches, (B, M, P).

        Args:
            z_BKE: The encoder's output, CLS first, then the kept patches.
            masks: Which patches these are, and which to predict.
            grid: Patches along Z, Y, X.
        """
        x = self.embed(z_BKE)
        b, _, d = x.shape
        # 0 is CLS, so patch n sits at n + 1.
        where = F.pad(masks.kept_BK + 1, (1, 0)).unsqueeze(-1).expand(-1, -1, d)
        full = self.mask_token.to(x.dtype).expand(b, 1 + math.prod(grid), d).scatter(1, where, x)
        full = full + sincos_positions(grid, d, x.device)
        hidden = masks.hidden_BM + 1
        rebuilt = run_blocks(self.blocks, full, recompute=self.recompute, index_BK=hidden)
        return self.predict(self.norm(rebuilt))
