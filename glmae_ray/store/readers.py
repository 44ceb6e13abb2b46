"""Files in, canonical volumes and label maps out; READERS by suffix, ReadError with a reason.

Values are kept: integers bit for bit, slope and intercept applied as the format says. What is
stored is int16 where every value is an integer that fits, else float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glmae_ray.store.nifti import read_nifti
from glmae_ray.store.scan import ReadError, Scan
from glmae_ray.volume import Shape, Volume, canonical_affine, spacing_of, to_canonical

READERS: dict[str, Callable[[Path], Scan]] = {".nii.gz": read_nifti, ".nii": read_nifti}

_INT16 = np.iinfo(np.int16)
_EXACT_IN_FLOAT32 = 2**24


class Image(NamedTuple):
    """A volume, and what is needed to go back to the file's own axes."""

    volume: Volume
    source_affine: NDArray[np.float64]  # (4, 4), file index (x, y, z, 1) to RAS+ mm
    source_shape: Shape  # (X, Y, Z)
    reader: str


def read_image(paths: Sequence[str | Path], *, case_id: str, modality: str) -> Image:
    """Read the file of each channel into one volume of int16 or float32.

    Raises:
        ReadError: A file cannot be read or is not fit to learn from; `reason` says which.
    """
    placed = [_read(Path(path)) for path in paths]
    first = placed[0]
    for path, other in zip(paths, placed, strict=True):
        if not _same_grid(other, first.array.shape, first.affine):
            message = f"{path}: not on the grid of {paths[0]}; resample the channels to one grid"
            raise ReadError("bad_geometry", message)
        if other.array.min() == other.array.max():
            message = f"{path}: every voxel is {other.array.flat[0]}; remove it"
            raise ReadError("constant", message)
    # A single channel needs no copy.
    array = np.stack([p.array for p in placed]) if len(placed) > 1 else first.array[np.newaxis]
    volume = Volume(array, first.affine, modality, case_id)
    return Image(volume, first.source_affine, first.source_shape, first.reader)


def read_label(path: str | Path, *, like: Volume) -> NDArray[Any]:
    """Read a label map as uint8, or int16 where that is too narrow: (Z, Y, X) on `like`'s grid.

    Raises:
        ReadError: It cannot be read, lies on another grid, or holds values that are no labels.
    """
    placed = _read(Path(path))
    if not _same_grid(placed, like.shape, like.affine):
        message = f"{path}: not on the image's grid; resample it there, or remove it"
        raise ReadError("label_mismatch", message)
    if placed.array.dtype != np.int16:
        message = f"{path}: values that are not integers from -32768 to 32767; round or remove it"
        raise ReadError("label_not_integer", message)
    low, high = placed.array.min(), placed.array.max()
    kind = np.uint8 if low >= 0 and high <= 255 else np.int16
    return placed.array.astype(kind, copy=False)


def suffix_of(path: str | Path) -> str | None:
    """The key of `READERS` that a file name ends with, None if there is none."""
    name = Path(path).name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


class _Placed(NamedTuple):
    """One file on canonical axes."""

    array: NDArray[Any]  # (Z, Y, X), int16 or float32
    affine: NDArray[np.float64]  # (4, 4), index (z, y, x, 1) to RAS+ mm
    source_affine: NDArray[np.float64]
    source_shape: Shape
    reader: str


def _read(path: Path) -> _Placed:
    suffix = suffix_of(path)
    if suffix is None:
        known = ", ".join(READERS)
        raise ReadError("unreadable", f"{path}: no reader for this kind of file (known: {known})")
    try:
        scan = READERS[suffix](path)
    except OSError as error:
        reason = error.strerror or error
        raise ReadError("unreadable", f"{path}: {reason}; restore it") from error
    _check_geometry(scan, path)
    array = to_canonical(_compact(scan.voxels, path), scan.affine)
    affine = canonical_affine(scan.affine, source_shape=scan.shape)
    return _Placed(array, affine, scan.affine, scan.shape, scan.reader)


def _check_geometry(scan: Scan, path: Path) -> None:
    affine = scan.affine
    if not np.isfinite(affine).all() or min(spacing_of(affine)) <= 0:
        raise ReadError("bad_geometry", f"{path}: affine {affine.tolist()}; repair the header")
    axes = affine[:3, :3] / np.asarray(spacing_of(affine))
    # The volume of the unit cell: 1 for right angles, 0 for axes that fall together. Gantry tilt
    # is 30 degrees at most, which leaves 0.87.
    if abs(np.linalg.det(axes)) < 0.1:
        raise ReadError("bad_geometry", f"{path}: axes in one plane; repair the header's affine")


def _compact(voxels: NDArray[Any], path: Path) -> NDArray[Any]:
    """The same values as int16 where they all are integers in its range, else as float32."""
    low, high = voxels.min(), voxels.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ReadError("non_finite", f"{path}: NaN or infinity; fill them or remove the file")
    fits = low >= _INT16.min and high <= _INT16.max
    if fits and (voxels.dtype.kind in "iu" or _is_integral(voxels)):
        return voxels.astype(np.int16, copy=False)
    peak = max(abs(float(low)), abs(float(high)))
    exact = _EXACT_IN_FLOAT32 if voxels.dtype.kind in "iu" else float(np.finfo(np.float32).max)
    if peak > exact:
        message = f"{path}: values up to {peak:g} do not fit float32; rescale them"
        raise ReadError("out_of_range", message)
    return voxels.astype(np.float32, copy=False)


def _is_integral(voxels: NDArray[Any]) -> bool:
    # Slice by slice: no second volume in memory, and most floats are settled by the first.
    return all(bool((part == np.rint(part)).all()) for part in voxels.T)


def _same_grid(placed: _Placed, shape: Sequence[int], affine: NDArray[np.float64]) -> bool:
    """Whether all corners agree to a tenth of a voxel: converters round affines."""
    if placed.array.shape != tuple(shape):
        return False
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n) for n in shape))])
    apart_mm = np.abs(corners @ (placed.affine - affine).T).max()
    return bool(apart_mm <= 0.1 * min(spacing_of(affine)))
