"""Volumes for the benchmark of ingest: real ones or phantoms, CT as large as in hospitals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from glmae_ray.phantoms import ORIENTATIONS, make_person, write_cohort

_NOISE_HU = 12.0  # standard deviation; 10-20 in the body of a real CT
_AIR_HU = -1024
_PHANTOMS = 16  # where there are no real volumes
_IN_PLANE, _IN_PLANE_MM, _BODY_MM = 512, 0.75, 288.0  # of a large CT: X and Y, and how tall
_LARGE_SLICES = 96


class VolumeSet(NamedTuple):
    """Volumes of one kind, a source for `glmae ingest`."""

    name: str
    folder: Path


def small_volumes(scratch: Path) -> VolumeSet:
    """Head-and-neck CT of `GLMAE_TEST_DATA` (203 of 128^3 with labels), else phantoms."""
    data = os.environ.get("GLMAE_TEST_DATA")
    if data:
        return VolumeSet("headneck_ct", Path(data) / "headneck_ct")
    return VolumeSet("phantoms", write_cohort(scratch / "phantoms", people=_PHANTOMS))


def large_volumes(scratch: Path, *, count: int) -> VolumeSet:
    """Write CT of 512 x 512 x 96 voxels: phantoms enlarged, with the noise of a scanner."""
    folder = scratch / "large"
    folder.mkdir()
    for number in range(count):
        write_large(folder / f"large_{number:03d}.nii.gz", number, slices=_LARGE_SLICES)
    return VolumeSet("large_ct", folder)


def write_large(path: Path, number: int, *, slices: int) -> None:
    """Write CT of 512 x 512 x `slices` voxels.

    Args:
        path: The NIfTI file.
        number: Which person.
        slices: How many; together they are as tall as any other number of them.
    """
    # Every len(ORIENTATIONS)-th person lies like the first: x, y and z are the axes.
    person, *_ = make_person(number * len(ORIENTATIONS), seed=1)
    voxels = _enlarged(person, (_IN_PLANE, _IN_PLANE, slices), seed=number)
    _save(path, voxels, (_IN_PLANE_MM, _IN_PLANE_MM, _BODY_MM / slices))


def huge_volume(scratch: Path) -> VolumeSet:
    """Write one volume of 512^3 voxels, all of it noise about water: the worst for memory."""
    folder = scratch / "huge"
    folder.mkdir()
    block = np.rint(_noise((128, 128, 128), seed=0)).astype(np.int16)
    _save(folder / "huge.nii.gz", np.tile(block, (4, 4, 4)), (0.7, 0.7, 0.7))
    return VolumeSet("huge", folder)


def _save(path: Path, voxels: NDArray[np.int16], spacing_mm: tuple[float, float, float]) -> None:
    """Write voxels (X, Y, Z), axes to Left, Posterior and Superior as in most CT."""
    x_mm, y_mm, z_mm = spacing_mm
    nib.save(nib.Nifti1Image(voxels, np.diag([-x_mm, -y_mm, z_mm, 1.0])), path)


def _enlarged(
    person: NDArray[np.int16], shape: tuple[int, int, int], *, seed: int
) -> NDArray[np.int16]:
    import torch  # not in the processes that time ways

    tensor = torch.from_numpy(person.astype(np.float32))[None, None]
    hu = torch.nn.functional.interpolate(tensor, shape, mode="trilinear")[0, 0].numpy()
    hu = np.rint(hu + _noise(shape, seed))
    x, y = (np.arange(side) - (side - 1) / 2 for side in shape[:2])
    hu[np.hypot(x[:, None], y) > shape[0] / 2] = _AIR_HU  # outside the field of view
    return hu.clip(_AIR_HU, 3071).astype(np.int16)


def _noise(shape: tuple[int, int, int], seed: int) -> NDArray[np.float32]:
    """Noise in HU, smooth within a slice (X, Y) as reconstruction kernels leave it."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    for axis in (0, 1):
        values += 0.5 * (np.roll(values, 1, axis) + np.roll(values, -1, axis))
    return values * np.float32(_NOISE_HU / values.std())
