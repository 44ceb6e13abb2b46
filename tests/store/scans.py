"""Small scans written to disk with nibabel, for the tests of reading and storing."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import orientations

SHAPE = (17, 22, 13)  # of a file, (X, Y, Z); unequal, odd and even
SPACING = (0.9, 1.1, 3.0)


def affine(axes: str = "LPS", *, spacing=SPACING, degrees: float = 0.0) -> np.ndarray:
    """Affine of file axes that point to `axes`, turned about the patient's long axis."""
    turn = np.eye(4)
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn[:2, :2] = [[cos, -sin], [sin, cos]]
    moves = orientations.axcodes2ornt(tuple(axes))
    matrix = np.zeros((4, 4))
    for axis, (world, sign) in enumerate(moves):
        matrix[int(world), axis] = sign * spacing[axis]
    matrix[:, 3] = (-31.0, 12.5, 140.0, 1.0)
    return turn @ matrix


def voxels(shape=SHAPE, *, dtype=np.int16, seed: int = 0) -> np.ndarray:
    """Air, and in its middle noise that every value of a byte occurs in."""
    values = np.zeros(shape, dtype)
    middle = tuple(slice(side // 5, side - side // 5) for side in shape)
    noise = np.random.default_rng(seed).integers(1, 255, values[middle].shape)
    values[middle] = noise
    return values


def write_nifti(path: Path, data: np.ndarray | None = None, *, axes: str = "LPS", **change) -> Path:
    """Write a file, by default small and sound; `change` sets header fields as they lie on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels() if data is None else data, affine(axes)), path)
    if change:
        is_gzip = path.suffix == ".gz"
        raw = gzip.decompress(path.read_bytes()) if is_gzip else path.read_bytes()
        header = nib.Nifti1Header(raw[:348], check=False)
        for name, value in change.items():
            header[name] = value
        raw = header.binaryblock + raw[348:]
        path.write_bytes(gzip.compress(raw) if is_gzip else raw)
    return path
