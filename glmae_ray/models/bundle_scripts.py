"""What a MONAI bundle runs: a UNETR along X, Y, Z, and the loop over its scans.

An export copies this file with `unetr` and `vit3d` into the bundle, which runs without glmae-ray:
it takes nothing but torch, MONAI and those two. Letters: B windows, C channels, K outputs, XYZ
voxels in the order of MONAI's pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from glmae_ray.models.unetr import UNETR
from glmae_ray.models.vit3d import Encoder, Grid


class Segmenter(nn.Module):
    """A UNETR whose images have the axes X, Y, Z, pointing to Right, Anterior, Superior."""

    def __init__(
        self,
        *,
        encoder: dict[str, Any],
        size: Grid,
        outputs: int,
        feature_size: int,
        position_grid: Grid | None = None,
    ) -> None:
        """Build it without weights.

        Args:
            encoder: Channels, patch, width, depth and heads; the patch along Z, Y, X.
            size: Voxels of a window along Z, Y, X.
            outputs: K, the background included.
            feature_size: Channels at full resolution.
            position_grid: Patches along Z, Y, X of the positions among the weights; None: the
                formula is used, and there are none.
        """
        super().__init__()
        body = Encoder(**encoder | {"patch": tuple(encoder["patch"])})
        if position_grid is not None:
            z, y, x = position_grid
            width = encoder["width"]
            body.adopt_positions(torch.zeros(1 + z * y * x, width), grid=(z, y, x))
        self.network = UNETR(body, size=size, outputs=outputs, feature_size=feature_size)

    def forward(self, image_BCXYZ: Tensor) -> Tensor:
        """Logits (B, K, X, Y, Z) of windows whose intensities are mapped already."""
        return self.network(image_BCXYZ.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)


class Evaluator:
    """Segments scan by scan, where a bundle's config usually has an engine of ignite."""

    def __init__(
        self,
        dataset: Iterable[dict[str, Any]],
        *,
        network: nn.Module,
        inferer: Callable[..., Any],
        postprocessing: Callable[[dict[str, Any]], Any],
    ) -> None:
        """Keep the parts.

        Args:
            dataset: Dictionaries with a preprocessed `image` (C, X, Y, Z).
            network: From windows to logits, with its weights.
            inferer: MONAI's sliding window.
            postprocessing: Takes a dictionary that has `pred` too, probabilities (K, X, Y, Z).
        """
        self.dataset, self.network = dataset, network
        self.inferer, self.postprocessing = inferer, postprocessing

    @torch.no_grad()
    def run(self) -> None:
        """Segment every scan."""
        self.network.eval()
        for scan in self.dataset:
            image = scan["image"]
            pred = self.inferer(image.unsqueeze(0), self._probabilities)[0]
            self.postprocessing({**scan, "pred": MetaTensor(pred, meta=image.meta)})

    def _probabilities(self, windows_BCXYZ: Tensor) -> Tensor:
        """What overlapping windows have the mean of."""
        return self.network(windows_BCXYZ).softmax(dim=1)
