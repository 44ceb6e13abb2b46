"""Heads: an encoder into a network from images to logits, by the name that a config gives.

Letters: B crops, C channels, ZYX voxels, N patches, E embedding, K outputs.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from glmae_ray.config_finetune import HeadConfig
from glmae_ray.errors import UserError
from glmae_ray.models.unetr import UNETR, why_not
from glmae_ray.models.vit3d import Encoder, Grid, initialise, patch_grid, patchify


class Head(Protocol):
    """Builds a network that owns the encoder as `encoder` and maps (B, C, Z, Y, X) to logits."""

    def __call__(self, encoder: Encoder, *, cfg: HeadConfig, size: Grid, outputs: int) -> nn.Module:
        """Build for crops of `size` voxels along Z, Y, X and K `outputs`.

        Raises:
            UserError: It cannot do these crops with the encoder's patch.
        """


class Pooled(nn.Module):
    """The mean of the encoder's normed patch tokens, CLS left out, and layers on it."""

    def __init__(self, encoder: Encoder, layers: nn.Module) -> None:
        """Join an encoder and layers from its width to K."""
        super().__init__()
        self.encoder, self.layers = encoder, layers
        initialise(layers)

    def forward(self, image_BCZYX: Tensor) -> Tensor:
        """Logits (B, K) of crops."""
        patch = self.encoder.patch
        grid = patch_grid(list(image_BCZYX.shape[2:]), patch)
        tokens_BNE = self.encoder(patchify(image_BCZYX, patch), grid=grid)
        return self.layers(tokens_BNE[:, 1:].mean(dim=1))


def _unetr(encoder: Encoder, *, cfg: HeadConfig, size: Grid, outputs: int) -> UNETR:
    if reason := why_not(size=size, patch=encoder.patch):
        raise UserError(f"head.kind: unetr does not fit: {reason}")
    return UNETR(encoder, size=size, outputs=outputs, feature_size=cfg.feature_size)


def _linear(encoder: Encoder, *, outputs: int, **_: Any) -> Pooled:
    return Pooled(encoder, nn.Linear(_width(encoder), outputs))


def _mlp(encoder: Encoder, *, cfg: HeadConfig, outputs: int, **_: Any) -> Pooled:
    layers = nn.Linear(_width(encoder), cfg.hidden), nn.GELU(), nn.Linear(cfg.hidden, outputs)
    return Pooled(encoder, nn.Sequential(*layers))


HEADS: dict[str, Head] = {"unetr": _unetr, "linear": _linear, "mlp": _mlp}


def _width(encoder: Encoder) -> int:
    return encoder.cls_token.shape[-1]
