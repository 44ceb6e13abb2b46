"""The projection head on the CLS token: what the consistency terms compare.

That one exists is verified (the paper's method figure); its form is our decision
(docs/method.md, grade D): DINO's, MLP to a bottleneck on the unit sphere, and prototypes that count
by direction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmae_ray import losses
from glmae_ray.config import ModelConfig
from glmae_ray.models.vit3d import initialise


class ProjectionHead(nn.Module):
    """MLP, L2-normalised bottleneck, weight-normalised prototypes (the form of DINO's head)."""

    def __init__(self, cfg: ModelConfig) -> None:
        """Build width -> hidden -> hidden -> bottleneck -> prototypes."""
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(cfg.width, cfg.head_hidden),
            nn.GELU(),
            nn.Linear(cfg.head_hidden, cfg.head_hidden),
            nn.GELU(),
            nn.Linear(cfg.head_hidden, cfg.head_bottleneck),
        )
        initialise(self)
        self.prototypes = Prototypes(cfg.head_bottleneck, cfg.prototypes, bias=False)

    def forward(self, cls: Tensor) -> Tensor:
        """Map CLS features (..., E) to logits (..., prototypes), each within [-1, 1]."""
        return self.prototypes(F.normalize(losses.at_least_float32(self.mlp(cls)), dim=-1))


class Prototypes(nn.Linear):
    """A linear layer whose rows count by their direction only."""

    def forward(self, x: Tensor) -> Tensor:
        """Cosine of the unit vectors x (..., bottleneck) to each prototype, in float32."""
        # A bfloat16 cosine is off by 0.004; a temperature of 0.04 would make that 0.1.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, F.normalize(self.weight, dim=-1))
