"""What a reader is given, what it makes of it, and the reasons for which an image can fail."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
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
    "unlisted",  # an image inside a data set that does not name it
    "duplicate",  # voxels that another case of the store has
)


class Limits(NamedTuple):
    """What is too small or too large to become a case."""

    min_side: int = 4  # voxels along the shortest axis; below lie scouts and single slices
    min_voxels: int = 4096  # one patch of the default model
    max_voxels: int = 2**31  # 4 GiB of int16; eight times a CT of 1024 slices of 512x512


LIMITS = Limits()


class ImageFiles(NamedTuple):
    """The files of one 3-D image (one channel), on this machine."""

    reader: str  # key of READERS
    paths: tuple[Path, ...]  # the file; a header and its data file; the slices of a series
    volume: int | None = None  # which one to take, from 0, where a file holds several


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
    """One 3-D image in its own axes."""

    voxels: NDArray[Any]  # (X, Y, Z)
    affine: NDArray[np.float64]  # (4, 4), index (x, y, z, 1) to RAS+ mm
    reader: str
    modality: str | None = None  # where the file says it
    acquisition: Mapping[str, str] = {}  # technical facts on an allow-list, from DICOM
    volumes: int = 1  # how many the files hold, of which this is one

    @property
    def shape(self) -> Shape:
        """Sides (X, Y, Z) in voxels."""
        x, y, z = self.voxels.shape
        return x, y, z


def check_shape(
    shape: Sequence[int], *, where: Path, limits: Limits, volume: int | None = None
) -> None:
    """Refuse what cannot become a case, by the claim of its header, before memory is taken.

    Args:
        shape: All axes of the image, the first three (X, Y, Z), then any others.
        where: For the message.
        limits: See there.
        volume: Which one of several volumes is wanted.

    Raises:
        ReadError: not_3d, too_small or too_large.
    """
    shape = tuple(int(side) for side in shape)
    several = math.prod(shape[3:])
    if len(shape) < 3 or several < 1:
        raise ReadError("not_3d", f"{where}: shape {shape}; a 3-D volume is needed")
    if several > 1 and volume is None:
        message = f"{where}: shape {shape} holds {several} volumes; volume=K takes in number K"
        raise ReadError("not_3d", message)
    if several > 1 and volume is not None and not 0 <= volume < several:
        message = f"{where}: shape {shape} has no volume {volume}; choose from 0 to {several - 1}"
        raise ReadError("not_3d", message)
    sides = shape[:3]
    if min(sides) < limits.min_side:
        message = f"{where}: shape {sides}, a side is below limits.min_side={limits.min_side}"
        raise ReadError("too_small", message)
    if math.prod(sides) < limits.min_voxels:
        message = f"{where}: shape {sides}, fewer voxels than limits.min_voxels={limits.min_voxels}"
        raise ReadError("too_small", message)
    if math.prod(sides) > limits.max_voxels:
        message = f"{where}: shape {sides}, more voxels than limits.max_voxels={limits.max_voxels}"
        raise ReadError("too_large", f"{message}; crop or resample it")
