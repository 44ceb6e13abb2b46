"""Read a DICOM series: slices or frames in any order become one volume, nothing is resampled.

Gantry tilt stays as a shear of the affine. Padding values and MONOCHROME1 are left as stored.

Slices that lie at the same places n times are n volumes. Slices of one place are taken apart by
time (temporal position, then trigger time), echo time, b-value, image type, acquisition number
and instance number, in this order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glmae_ray.store.dicom_frames import read_frames
from glmae_ray.store.dicom_headers import code, guarded
from glmae_ray.store.dicom_pixels import Pixels, are_equal, open_pixels
from glmae_ray.store.dicom_slices import SLICE_KEYWORDS, Slice, read_facts, read_slices
from glmae_ray.store.scan import ImageFiles, Limits, ReadError, Scan, check_shape

# Of a voxel. Headers round positions, at worst to 0.1 mm, and pixels go down to 0.4 mm; a missing
# slice moves another one by a third of a step or more.
_UNEVEN = 0.25
_SAME_PLACE = 0.01  # of a pixel: repeats of one place differ in the last digits at most
_SAME_DIRECTION = 1e-3  # of unit vectors: half a pixel at the far end of 512 pixels
_INTEGRAL_LIMIT = 2**31  # slopes and intercepts below keep 32-bit pixels within int64


def read_dicom(files: ImageFiles, limits: Limits) -> Scan:
    """Read the files of one series, given in any order.

    Voxels are int16, int32 or int64 where every slope and intercept is an integer, the first
    that holds all values; else float32.

    Raises:
        ReadError: A file is damaged or no scan, or the slices do not make one 3-D image.
        OSError: The system cannot read a file.
    """
    series = open_series(files, limits)
    return Scan(
        _voxels(series.slices).transpose(2, 1, 0),
        _affine(series.slices),
        "dicom",
        series.modality,
        series.facts,
        series.volumes,
    )


class Series(NamedTuple):
    """What the headers of a series say."""

    slices: list[Slice]  # of the volume that is taken, in the order of its last axis
    volumes: int  # that the files hold
    modality: str | None
    facts: dict[str, str]  # of the technique, those that all files agree on


def open_series(files: ImageFiles, limits: Limits) -> Series:
    """Read the headers of a series and put its slices in order; raises as `read_dicom` does."""
    slices: list[Slice] = []
    facts, modality = [], None
    for path in files.paths:
        header, pixels = open_pixels(path, SLICE_KEYWORDS)
        with guarded(path):
            slices.extend(read_slices(header, pixels))
            facts.append(read_facts(header))
            modality = code(header, "Modality")
    _check_alike(slices)
    chosen, volumes = _stack(slices, limits, files.volume)
    shared = {
        name: value for name, value in facts[0].items() if all(f.get(name) == value for f in facts)
    }
    return Series(chosen, volumes, modality, shared)


def _check_alike(slices: Sequence[Slice]) -> None:
    """Refuse axes that are none, and slices of different grids."""
    first, where = slices[0], slices[0].pixels.path
    if (first.spacing <= 0).any():
        raise ReadError("bad_geometry", f"{where}: PixelSpacing {first.spacing.tolist()} mm")
    if not np.allclose(first.axes @ first.axes.T, np.eye(2), rtol=0, atol=2 * _SAME_DIRECTION):
        message = f"{where}: the axes in ImageOrientationPatient are not at right angles"
        raise ReadError("bad_geometry", f"{message}; repair the header")
    for other in slices:
        sides = other.pixels.rows, other.pixels.columns
        if not np.allclose(other.axes, first.axes, rtol=0, atol=_SAME_DIRECTION):
            fault = "another orientation"
        elif sides != (first.pixels.rows, first.pixels.columns):
            fault = "other rows and columns"
        elif not np.allclose(other.spacing, first.spacing, rtol=1e-3):
            fault = "another PixelSpacing"
        else:
            continue
        message = f"{other.pixels.path}: frame {other.frame} has {fault} than {where}; split them"
        raise ReadError("bad_geometry", message)


def _normal(one: Slice) -> NDArray[np.float64]:
    return np.cross(*one.axes)


def _stack(slices: Sequence[Slice], limits: Limits, volume: int | None) -> tuple[list[Slice], int]:
    """One slice per place for the wanted volume, in order of the places; and how many volumes."""
    first = slices[0]
    where, normal = first.pixels.path, _normal(first)
    places: list[list[Slice]] = []
    reached = -math.inf
    for one in sorted(slices, key=lambda s: float(s.position @ normal)):
        distance = float(one.position @ normal)
        if distance - reached > _SAME_PLACE * first.spacing.min():
            places.append([])
        places[-1].append(one)
        reached = distance
    places = [_without_copies(place) for place in places]
    counts = [len(place) for place in places]
    if min(counts) != max(counts):
        most = places[counts.index(max(counts))][0].pixels.path
        message = f"{where}: {min(counts)} to {max(counts)} slices per place, most at {most}"
        raise ReadError("bad_geometry", f"{message}; remove what is double, or restore the rest")
    shape = (first.pixels.columns, first.pixels.rows, len(places), counts[0])
    check_shape(shape, where=where, limits=limits, volume=volume)
    number = (volume or 0) if counts[0] > 1 else 0
    chosen = [sorted(place, key=lambda s: s.order)[number] for place in places]
    _check_even(chosen)
    return chosen, counts[0]


def _without_copies(place: Sequence[Slice]) -> list[Slice]:
    """Slices of one place without those that were copied together with their instance UID."""
    kept: dict[Any, Slice] = {}
    for one in place:
        name = (one.instance or one.pixels.path, one.frame)
        other = kept.setdefault(name, one)
        same = (one.slope, one.intercept) == (other.slope, other.intercept)
        if one is not other and not (same and are_equal(one.pixels, other.pixels)):
            message = f"{one.pixels.path}: same instance UID as {other.pixels.path}, other pixels"
            raise ReadError("bad_geometry", f"{message}; remove one of them")
    return list(kept.values())


def _check_even(chosen: Sequence[Slice]) -> None:
    """Refuse missing slices: an affine cannot say where the others lie."""
    if len(chosen) == 1:
        return
    first = chosen[0]
    positions = np.array([one.position for one in chosen])
    grid = np.linspace(positions[0], positions[-1], len(chosen))
    frame = np.array([*first.axes, _normal(first)])
    along = positions @ frame[2]
    sides = np.array([*first.spacing, (along[-1] - along[0]) / (len(chosen) - 1)])
    if (np.abs((positions - grid) @ frame.T) <= _UNEVEN * sides).all():
        return
    steps = np.diff(along)
    widest = int(steps.argmax())
    raise ReadError(
        "bad_geometry",
        f"{chosen[widest].pixels.path}: {steps[widest]:.2f} mm to the next slice"
        f" (number {widest + 1} of {len(chosen)}), elsewhere {np.median(steps):.2f} mm;"
        " restore what is missing",
    )


def _affine(chosen: Sequence[Slice]) -> NDArray[np.float64]:
    """(4, 4), index (x, y, z, 1) to RAS+ mm."""
    first, last = chosen[0], chosen[-1]
    if len(chosen) == 1 and not 0 < first.thickness < math.inf:
        message = f"{first.pixels.path}: one slice of unknown thickness; repair the header"
        raise ReadError("bad_geometry", message)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = first.axes * first.spacing[:, np.newaxis]
    affine[:3, 2] = (
        (last.position - first.position) / (len(chosen) - 1)
        if len(chosen) > 1
        else _normal(first) * first.thickness
    )
    affine[:3, 3] = first.position
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # LPS to RAS


def _voxels(chosen: Sequence[Slice]) -> NDArray[Any]:
    """Rescaled voxels (Z, Y, X), each file opened once."""
    by_file: dict[Pixels, list[int]] = {}
    for z, one in enumerate(chosen):
        by_file.setdefault(one.pixels, []).append(z)
    scales = [value for one in chosen for value in (one.slope, one.intercept)]
    is_integral = all(v.is_integer() and abs(v) < _INTEGRAL_LIMIT for v in scales)
    sides = (len(chosen), chosen[0].pixels.rows, chosen[0].pixels.columns)
    voxels = np.empty(sides, np.int16 if is_integral else np.float32)
    for pixels, layers in by_file.items():
        frames = read_frames(pixels, [chosen[z].frame for z in layers])
        for z, stored in zip(layers, frames, strict=True):
            values = _rescaled(stored, chosen[z].slope, chosen[z].intercept, is_integral)
            if not np.can_cast(values.dtype, voxels.dtype):
                voxels = voxels.astype(values.dtype)
            voxels[z] = values
    return voxels


def _rescaled(
    stored: NDArray[Any], slope: float, intercept: float, is_integral: bool
) -> NDArray[Any]:
    """Stored values by the header's line: integers as narrow as they go, else float32."""
    if not is_integral:
        with np.errstate(over="ignore"):  # infinity is found among the voxels
            return (stored * np.float64(slope) + intercept).astype(np.float32)
    step, start = int(slope), int(intercept)
    low, high = int(stored.min()), int(stored.max())
    ends = low * step + start, high * step + start
    if (step, start) != (1, 0):
        stored = stored.astype(_narrowest(low, high, step, low * step, high * step, start, *ends))
        stored *= stored.dtype.type(step)
        stored += stored.dtype.type(start)
    return stored.astype(_narrowest(*ends), copy=False)


def _narrowest(*values: int) -> type[np.signedinteger[Any]]:
    """The first of int16, int32 and int64 that holds all values."""
    bits = 1 + max((value if value >= 0 else ~value).bit_length() for value in values)
    return np.int16 if bits <= 16 else np.int32 if bits <= 32 else np.int64
