"""Scan: what a reader makes of one file; and ReadError, with the reasons that a file can fail."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glmae_ray.volume import Shape

REASONS = (
    "unreadable",  # damaged, or of a kind that no reader takes
    "truncated",  # shorter than its header says
    "not_an_image",  # empty, something else under an image's name, colour or complex voxels
    "not_3d",
    "non_finite",  # NaN or infinity among the voxels
    "out_of_range",  # values that float32 cannot hold
    "constant",
    "too_small",
    "too_large",
    "bad_geometry",  # no usable affine, or channels on different grids
    "label_mismatch",  # label map and image on different grids
    "label_not_integer",
    "duplicate",  # voxels that another case of the store has
)
MAX_VOXELS = 2**31  # 4 GiB of int16; eight times a CT of 1024 slices of 512x512
MIN_SIDE = 8  # voxels; half a patch of the default model


class ReadError(Exception):
    """A source that cannot become a case."""

    def __init__(self, reason: str, message: str) -> None:
        """Keep why.

        Args:
            reason: One of `REASONS`.
            message: One line: what was found, and what to do about it.
        """
        super().__init__(reason, message)
        self.reason, self.message = reason, message


class Scan(NamedTuple):
    """What one file holds, in its own axes."""

    voxels: NDArray[Any]  # (X, Y, Z)
    affine: NDArray[np.float64]  # (4, 4), index (x, y, z, 1) to RAS+ mm
    reader: str

    @property
    def shape(self) -> Shape:
        """Sides (X, Y, Z) in voxels."""
        x, y, z = self.voxels.shape
        return x, y, z
