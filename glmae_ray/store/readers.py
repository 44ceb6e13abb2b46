"""Files in, canonical volumes and label maps out; READERS by suffix, ReadError with a reason.

Values are kept: integers bit for bit, slope and intercept applied as the format says. What is
stored is int16 where every value is an integer that fits, else float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glmae_ray.store.dicom import read_dicom
from glmae_ray.store.metaimage import metaimage_data_files, read_metaimage
from glmae_ray.store.nifti import read_nifti
from glmae_ray.store.nrrd_file import nrrd_data_files, read_nrrd
from glmae_ray.store.scan import LIMITS, ImageFiles, Limits, ReadError, Scan
from glmae_ray.volume import Shape, Volume, canonical_affine, spacing_of, to_canonical

if TYPE_CHECKING:
    from glmae_ray.paths import Place

Reader = Callable[[ImageFiles, Limits], Scan]
READERS: dict[str, Reader] = {
    ".nii.gz": read_nifti,
    ".nii": read_nifti,
    ".nrrd": read_nrrd,
    ".nhdr": read_nrrd,
    ".mha": read_metaimage,
    ".mhd": read_metaimage,
    ".dcm": read_dicom,
}
# Names of the data files beside a header, by suffix of the header.
DETACHED: dict[str, Callable[[Place], list[str]]] = {
    ".nhdr": nrrd_data_files,
    ".mhd": metaimage_data_files,
}

_INT16 = np.iinfo(np.int16)
_EXACT_IN_FLOAT32 = 2**24


class Image(NamedTuple):
    """A volume, what is needed to go back to the file's own axes, and facts about the reading."""

    volume: Volume
    source_affine: NDArray[np.float64]  # (4, 4), file index (x, y, z, 1) to RAS+ mm
    source_shape: Shape  # (X, Y, Z)
    reader: str
    acquisition: Mapping[str, str]  # technical facts of the first channel
    filled: int  # voxels of all channels that were not finite and got a value
    volumes: int  # that the first channel's files hold, of which one was taken


def read_image(
    channels: Sequence[ImageFiles],
    *,
    case_id: str,
    modality: str | None = None,
    limits: Limits = LIMITS,
    fill: bool = False,
) -> Image:
    """Read every channel into one volume of int16 or float32.

    Args:
        channels: The files of each channel.
        case_id: Name of the volume.
        modality: Its modality; None: what the file says, else CT.
        limits: What is too small or too large.
        fill: Put the smallest finite value in place of NaN and -infinity, the largest in place
            of +infinity; without it such an image is refused.

    Raises:
        ReadError: A file cannot be read or is not fit to learn from; `reason` says which.
    """
    placed = [_read(files, limits, fill=fill) for files in channels]
    first = placed[0]
    for files, other in zip(channels, placed, strict=True):
        where = files.paths[0]
        if not _same_grid(other, first.array.shape, first.affine):
            message = f"{where}: not on the grid of {channels[0].paths[0]}; resample to one grid"
            raise ReadError("bad_geometry", message)
        if other.array.min() == other.array.max():
            message = f"{where}: every voxel is {other.array.flat[0]}; remove it"
            raise ReadError("constant", message)
    # A single channel needs no copy.
    array = np.stack([p.array for p in placed]) if len(placed) > 1 else first.array[np.newaxis]
    word = (modality or first.modality or "CT").upper()
    volume = Volume(array, first.affine, word, case_id)
    filled = sum(p.filled for p in placed)
    return Image(
        volume,
        first.source_affine,
        first.source_shape,
        first.reader,
        first.acquisition,
        filled,
        first.volumes,
    )


def read_label(files: ImageFiles, *, like: Volume, limits: Limits = LIMITS) -> NDArray[Any]:
    """Read a label map as uint8, or int16 where that is too narrow: (Z, Y, X) on `like`'s grid.

    Raises:
        ReadError: It cannot be read, lies on another grid, or holds values that are no labels.
    """
    placed, path = _read(files, limits), files.paths[0]
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
    """One image on canonical axes."""

    array: NDArray[Any]  # (Z, Y, X), int16 or float32
    affine: NDArray[np.float64]  # (4, 4), index (z, y, x, 1) to RAS+ mm
    source_affine: NDArray[np.float64]
    source_shape: Shape
    reader: str
    modality: str | None
    acquisition: Mapping[str, str]
    volumes: int
    filled: int


def _read(files: ImageFiles, limits: Limits, *, fill: bool = False) -> _Placed:
    path = files.paths[0]
    reader = READERS.get(files.reader)
    if reader is None:
        known = ", ".join(READERS)
        raise ReadError("unreadable", f"{path}: no reader for this kind of file (known: {known})")
    try:
        scan = reader(files, limits)
    except OSError as error:
        where, reason = error.filename or path, error.strerror or error
        raise ReadError("unreadable", f"{where}: {reason}; restore it") from error
    _check_geometry(scan, path)
    voxels, filled = _filled(scan.voxels) if fill else (scan.voxels, 0)
    array = to_canonical(voxels, scan.affine, dtype=_stored_as(voxels, path))
    affine = canonical_affine(scan.affine, source_shape=scan.shape)
    return _Placed(array, affine, scan.affine, scan.shape, *scan[2:], filled)


def _check_geometry(scan: Scan, path: Path) -> None:
    affine = scan.affine
    with np.errstate(all="ignore"):  # numbers whose squares overflow are no lengths in mm
        spacing = np.asarray(spacing_of(affine))
    if not np.isfinite([*affine.flat, *spacing]).all() or spacing.min() <= 0:
        raise ReadError("bad_geometry", f"{path}: affine {affine.tolist()}; repair the header")
    axes = affine[:3, :3] / spacing
    # The volume of the unit cell: 1 for right angles, 0 for axes that fall together. Gantry tilt
    # is 30 degrees at most, which leaves 0.87.
    if abs(np.linalg.det(axes)) < 0.1:
        raise ReadError("bad_geometry", f"{path}: axes in one plane; repair the header's affine")


def _filled(voxels: NDArray[Any]) -> tuple[NDArray[Any], int]:
    """The voxels with finite values only, and how many were not."""
    wrong = ~np.isfinite(voxels) if voxels.dtype.kind == "f" else np.zeros(1, bool)
    count = int(wrong.sum())
    if count == 0 or count == wrong.size:  # nothing to do, or nothing to do it with
        return voxels, 0
    low, high = voxels[~wrong].min(), voxels[~wrong].max()
    return np.nan_to_num(voxels, nan=low, neginf=low, posinf=high), count


def _stored_as(voxels: NDArray[Any], path: Path) -> type[np.generic]:
    """int16 where all values are integers in its range, else float32."""
    low, high = voxels.min(), voxels.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        message = f"{path}: NaN or infinity; mend it, or take it in with non_finite=fill"
        raise ReadError("non_finite", message)
    fits = low >= _INT16.min and high <= _INT16.max
    if fits and (voxels.dtype.kind in "iu" or _is_integral(voxels)):
        return np.int16
    peak = max(abs(float(low)), abs(float(high)))
    exact = _EXACT_IN_FLOAT32 if voxels.dtype.kind in "iu" else float(np.finfo(np.float32).max)
    if peak > exact:
        message = f"{path}: values up to {peak:g} do not fit float32; rescale them"
        raise ReadError("out_of_range", message)
    return np.float32


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
