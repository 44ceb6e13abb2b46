"""Small scans on disk, written with nibabel, pynrrd and SimpleITK, for tests of the store."""

import gzip
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import nrrd
import numpy as np
import SimpleITK as sitk
from nibabel import orientations

from glmae_ray.store.readers import DETACHED, suffix_of
from glmae_ray.store.scan import ImageFiles

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
        change_nifti(path, **change)
    return path


def write_people(folder: Path, *, count: int) -> None:
    """Write a scan each, grids of unequal sides."""
    for seed in range(count):
        data = voxels((34 + seed, 30, 26 + seed % 3), seed=seed)
        write_nifti(folder / f"p{seed:02d}.nii.gz", data, axes="RAS")


def change_nifti(path: Path, **change) -> None:
    """Set header fields of a NIfTI-1 file as they lie on disk, sound or not."""
    is_gzip = path.suffix == ".gz"
    raw = gzip.decompress(path.read_bytes()) if is_gzip else path.read_bytes()
    header = nib.Nifti1Header(raw[:348], check=False)
    for name, value in change.items():
        header[name] = value
    raw = header.binaryblock + raw[348:]
    path.write_bytes(gzip.compress(raw) if is_gzip else raw)


class Kind(NamedTuple):
    """One way to write an image that a reader must take."""

    suffix: str
    write: Callable[[Path, np.ndarray, np.ndarray], None]  # path, voxels (X, Y, Z), affine RAS+
    packing: str = "raw"


def files_of(path: Path, *, volume: int | None = None) -> ImageFiles:
    """What discovery makes of a path: the file, and the data files that its header names."""
    suffix = suffix_of(path) or path.suffix
    names = DETACHED[suffix](path) if suffix in DETACHED else []
    return ImageFiles(suffix, (path, *(path.parent / name for name in names)), volume)


def trusted(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z) and affine to RAS+ mm as nibabel or SimpleITK read them."""
    if path.name.endswith((".nii", ".nii.gz")):
        image = nib.load(path)
        return np.asanyarray(image.dataobj), image.affine
    if b"encoding: bzip2" in path.read_bytes():  # which SimpleITK is built without
        data, header = nrrd.read(str(path))
        path = path.with_name("unpacked.nrrd")
        nrrd.write(str(path), data, {**header, "encoding": "raw"})
    image = sitk.ReadImage(path)
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    matrix[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, _LPS @ matrix


def write_itk(path: Path, data: np.ndarray, matrix: np.ndarray, *, packed: bool = False) -> None:
    """Write (X, Y, Z) or (X, Y, Z, T) with SimpleITK, in either byte order."""
    image = sitk.GetImageFromArray(data.astype(data.dtype.newbyteorder("=")).T, isVector=False)
    lps = _LPS @ matrix
    spacing = np.ones(data.ndim)
    spacing[:3] = np.linalg.norm(lps[:3, :3], axis=0)
    direction = np.eye(data.ndim)
    direction[:3, :3] = lps[:3, :3] / spacing[:3]
    image.SetSpacing(spacing.tolist())
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin([*lps[:3, 3], *([0.0] * (data.ndim - 3))])
    sitk.WriteImage(image, path, useCompression=packed)
    if data.dtype.newbyteorder("=") != data.dtype:
        _turn_bytes(path, data, packed=packed)


def _turn_bytes(path: Path, data: np.ndarray, *, packed: bool) -> None:
    """Make a MetaImage big-endian, which SimpleITK reads but does not write."""
    raw = data.tobytes(order="F")
    voxels = zlib.compress(raw) if packed else raw
    head, mark, name = path.read_bytes().partition(b"ElementDataFile = ")
    head = head.replace(b"MSB = False", b"MSB = True")
    lines = [line for line in head.splitlines() if not line.startswith(b"CompressedDataSize")]
    if packed:
        lines.append(b"CompressedDataSize = %d" % len(voxels))
    name = name.splitlines()[0]
    (path if name == b"LOCAL" else path.with_name(name.decode())).write_bytes(voxels)
    header = b"\n".join([*lines, mark + name, b""])
    path.write_bytes(header + voxels if name == b"LOCAL" else header)


def write_nrrd(path: Path, data: np.ndarray, matrix: np.ndarray, *, encoding: str = "raw") -> None:
    """Write (X, Y, Z) or (X, Y, Z, T) with pynrrd."""
    lps = _LPS @ matrix
    rows = np.full((data.ndim, 3), np.nan)  # which pynrrd writes as none
    rows[:3] = lps[:3, :3].T
    header = {
        "space": "left-posterior-superior",
        "space directions": rows,
        "space origin": lps[:3, 3],
        "kinds": ["domain"] * 3 + ["list"] * (data.ndim - 3),
        "encoding": encoding,
    }
    nrrd.write(str(path), data, header, compression_level=6)


def write_nib(
    path: Path, data: np.ndarray, matrix: np.ndarray, *, kind: type = nib.Nifti1Image
) -> None:
    """Write with nibabel, in the byte order of the data."""
    endianness = "<" if data.dtype.newbyteorder("<") == data.dtype else ">"
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(data.dtype)
    header.set_xyzt_units("mm")
    image = kind(data, matrix, header, dtype=data.dtype)
    image.header.set_slope_inter(1, 0)
    nib.save(image, path)


_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

# A new reader adds a line here, and the conformance suite and the fuzzing run on it.
KINDS = {
    "nifti1": Kind(".nii", write_nib),
    "nifti1-gzip": Kind(".nii.gz", write_nib, "deflate"),
    "nifti2": Kind(".nii", partial(write_nib, kind=nib.Nifti2Image)),
    "nrrd": Kind(".nrrd", write_nrrd),
    "nrrd-gzip": Kind(".nrrd", partial(write_nrrd, encoding="gzip"), "deflate"),
    "nrrd-bzip2": Kind(".nrrd", partial(write_nrrd, encoding="bzip2"), "bzip2"),
    "nrrd-text": Kind(".nrrd", partial(write_nrrd, encoding="ascii"), "text"),
    "nhdr": Kind(".nhdr", write_nrrd),
    "nhdr-gzip": Kind(".nhdr", partial(write_nrrd, encoding="gzip"), "deflate"),
    "mha": Kind(".mha", write_itk),
    "mha-zlib": Kind(".mha", partial(write_itk, packed=True), "deflate"),
    "mhd": Kind(".mhd", write_itk),
    "mhd-zlib": Kind(".mhd", partial(write_itk, packed=True), "deflate"),
}
