"""Read NIfTI-1 and NIfTI-2, gzipped or not, whatever the name says: as nibabel does, but safely."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import NDArray

from glmae_ray.store.raw import Block, damage_named, is_gzip, read_block
from glmae_ray.store.scan import ImageFiles, Limits, ReadError, Scan, check_shape
from glmae_ray.store.text_header import bad_geometry, broken, something_else

_HEADER_BYTES = 540  # of NIfTI-2; NIfTI-1 has 348
_VECTOR_INTENTS = {1004, 1005, 1006, 1007, 1008, 1009, 1010, 2003, 2004}  # matrix, vector, colour

_quiet = logging.Logger("nifti headers")  # nibabel prints every header that it repairs


def read_nifti(files: ImageFiles, limits: Limits) -> Scan:
    """Read one file.

    Raises:
        ReadError: It is no NIfTI file, damaged, or not one 3-D image of plain numbers.
        OSError: The system cannot read it.
    """
    (path,) = files.paths
    is_packed = is_gzip(path)
    with np.errstate(all="ignore"):  # a header of damaged numbers is judged, not warned of
        header = read_header(path)
        shape = header.get_data_shape()
        check_shape(shape, where=path, limits=limits, volume=files.volume)
        try:
            slope, inter = header.get_slope_inter()
            affine = np.asarray(header.get_best_affine(), np.float64)
        except (HeaderDataError, ValueError, OverflowError) as error:
            raise bad_geometry(path, str(error)) from error
    offset = header.get_data_offset()
    place = {"packing": "deflate", "skip": offset} if is_packed else {"start": offset}
    block = Block(path, header.get_data_dtype(), shape, volume=files.volume, **place)
    voxels = read_block(block)
    if slope is not None and (slope, inter) != (1, 0):
        voxels = _scaled(voxels, slope, inter)
    return Scan(voxels, affine, reader="nifti", volumes=block.volumes)


def read_header(path: Path) -> Any:
    """The header, in the byte order of this machine and repaired where nibabel repairs it.

    Raises:
        ReadError: It is none, or damaged.
        OSError: The system cannot read it.
    """
    with damage_named(path), gzip.open(path) if is_gzip(path) else path.open("rb") as stream:
        block = stream.read(_HEADER_BYTES)
    kinds = [kind for kind in (Nifti1Header, Nifti2Header) if kind.may_contain_header(block)]
    if not kinds:
        raise something_else(path, "NIfTI")
    header = kinds[0](block[: kinds[0].sizeof_hdr], check=False)
    if header["sform_code"] == 0 and not (header["pixdim"][1:4] > 0).all():
        raise bad_geometry(path, f"spacing {header['pixdim'][1:4].tolist()} mm")
    if not 0 <= header["vox_offset"] < 2**62:  # NaN is not either
        raise broken(path, f"vox_offset {header['vox_offset']}")
    try:
        header.check_fix(logger=_quiet)
        kind = header.get_data_dtype().kind
    except (HeaderDataError, ValueError) as error:
        raise broken(path, str(error)) from error
    is_vector = int(header["intent_code"]) in _VECTOR_INTENTS and header["dim"][5] > 1
    if kind not in "iuf" or is_vector:
        what = "vector" if is_vector else header.get_value_label("datatype")
        raise ReadError("not_an_image", f"{path}: {what} voxels; convert them to one intensity")
    return header


def _scaled(stored: NDArray[Any], slope: float, inter: float) -> NDArray[Any]:
    """Voxels times slope plus intercept, computed in float64 as nibabel does.

    Integers are scaled slice by slice into the smallest type that the values fit, so that no
    volume of float64 is made.
    """
    with np.errstate(all="ignore"):  # what overflows is found among the voxels
        if stored.dtype.kind == "f":
            return apply_read_scaling(stored, slope, inter)
        ends = np.array([stored.min(), stored.max()], np.float64) * slope + inter
        scaled: NDArray[Any] = np.empty(stored.shape, _kind_for(ends, slope, inter), order="F")
        for part, target in zip(stored.T, scaled.T, strict=True):
            target[...] = apply_read_scaling(part, slope, inter)
    return scaled


def _kind_for(ends: NDArray[np.float64], slope: float, inter: float) -> type:
    if float(slope).is_integer() and float(inter).is_integer():
        for kind in (np.int16, np.int32):
            if np.iinfo(kind).min <= ends.min() and ends.max() <= np.iinfo(kind).max:
                return kind
    return np.float32 if np.abs(ends).max() <= np.finfo(np.float32).max else np.float64
