"""Volume: one image in canonical axes; and the way from a file's own axes to them and back.

Canonical arrays are (Z, Y, X) with axes that point to Superior, Anterior and Right, so that index
order reads RAS+ backwards. Patient space is RAS+ in mm: x to the right, y anterior, z superior.
Files are met as nibabel gives them: voxels (X, Y, Z) in file axes and an affine to RAS+ mm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel import orientations
from numpy.typing import DTypeLike, NDArray

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]

_RAS = np.array([[0, 1], [1, 1], [2, 1]])  # nibabel's orientation rows of axes x, y, z as they are


@dataclass(frozen=True, eq=False)
class Volume:
    """One acquired image with one or more channels.

    Attributes:
        array: Voxels (C, Z, Y, X), canonical axes.
        affine: (4, 4) float64, array index (z, y, x, 1) to RAS+ mm (x, y, z, 1).
        modality: "CT" (HU) or any other word ("MR", "T1"), which means arbitrary units.
        case_id: Name of the case, safe as a folder name.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    modality: str
    case_id: str

    @property
    def shape(self) -> Shape:
        """Sides (Z, Y, X) in voxels."""
        z, y, x = self.array.shape[1:]
        return z, y, x

    @property
    def spacing(self) -> Spacing:
        """Distance (Z, Y, X) of neighbouring voxels in mm."""
        return spacing_of(self.affine)

    @property
    def origin(self) -> NDArray[np.float64]:
        """RAS+ mm (x, y, z) of the centre of voxel (0, 0, 0)."""
        return self.affine[:3, 3]

    @property
    def direction(self) -> NDArray[np.float64]:
        """(3, 3): column i is the unit vector (x, y, z) along array axis i of Z, Y, X."""
        return self.affine[:3, :3] / np.asarray(self.spacing)


def spacing_of(affine: NDArray[np.float64]) -> Spacing:
    """Step along each index axis of a (4, 4) affine, in mm and in the order of its columns."""
    first, second, third = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return first, second, third


def to_canonical(
    voxels: NDArray[Any], source_affine: NDArray[np.float64], *, dtype: DTypeLike | None = None
) -> NDArray[Any]:
    """Turn voxels (X, Y, Z) in file axes into a contiguous canonical (Z, Y, X) array.

    Axes are swapped and flipped, never resampled: an oblique scan stays oblique, and its axes
    take the names of the patient directions that they are closest to.

    Args:
        voxels: In file axes.
        source_affine: (4, 4), file index (x, y, z, 1) to RAS+ mm.
        dtype: Of the result; None: that of the voxels.
    """
    moves = orientations.io_orientation(source_affine)
    turned = orientations.apply_orientation(voxels, moves).transpose(2, 1, 0)
    wanted = turned.dtype if dtype is None else np.dtype(dtype)
    if turned.flags.c_contiguous and turned.dtype == wanted:
        return turned
    array = np.empty(turned.shape, wanted)
    # Slab by slab along the file's slowest axis: up to half the time of one strided copy.
    slowest = int(np.argmax(np.abs(turned.strides)))
    for slab, part in zip(
        np.moveaxis(array, slowest, 0), np.moveaxis(turned, slowest, 0), strict=True
    ):
        slab[...] = part
    return array


def canonical_affine(
    source_affine: NDArray[np.float64], *, source_shape: Shape
) -> NDArray[np.float64]:
    """Affine of the array that `to_canonical` makes from a file of `source_shape` (X, Y, Z)."""
    moves = orientations.io_orientation(source_affine)
    ras_affine = source_affine @ orientations.inv_ornt_aff(moves, source_shape)
    return ras_affine[:, [2, 1, 0, 3]]


def to_source_axes(array: NDArray[Any], source_affine: NDArray[np.float64]) -> NDArray[Any]:
    """Turn a canonical (Z, Y, X) array into voxels (X, Y, Z) of the file with `source_affine`.

    The exact inverse of `to_canonical`: what it returns can be written with the file's own
    affine and header.
    """
    moves = orientations.ornt_transform(_RAS, orientations.io_orientation(source_affine))
    return orientations.apply_orientation(array.transpose(2, 1, 0), moves)
