"""Read NIfTI-1 and NIfTI-2, gzipped or not: as nibabel does, but nothing is taken on trust.

The header's claims are held against the file's size before memory is taken, a short file is an
error, and a gzip file is read to its end, where its checksum is.
"""

from __future__ import annotations

import gzip
import io
import logging
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import NDArray

from glmae_ray.store.scan import ImageFiles, Limits, ReadError, Scan, check_shape

_DEFLATE_LIMIT = 1032  # a deflate stream never unpacks to more than this many times its size
_HEADER_BYTES = 540  # of NIfTI-2; NIfTI-1 has 348
_READ_BYTES = 2**22

_quiet = logging.Logger("nifti headers")  # nibabel prints every header that it repairs


def read_nifti(files: ImageFiles, limits: Limits) -> Scan:
    """Read one file.

    Raises:
        ReadError: It is no NIfTI file, damaged, or not one 3-D image of plain numbers.
        OSError: The system cannot read it.
    """
    (path,) = files.paths
    with _opened(path) as stream:
        try:
            header = _header(stream, path)
            _check_claim(header, path, limits, files.volume)
            stored = _voxels(header, stream, path)
            while stream.read(_READ_BYTES):
                pass
        except EOFError as error:
            raise _truncated(path) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ReadError("unreadable", f"{path}: damaged ({error}); copy it again") from error
    try:
        slope, inter = header.get_slope_inter()
        affine = np.asarray(header.get_best_affine(), np.float64)
    except (HeaderDataError, ValueError) as error:
        raise ReadError("bad_geometry", f"{path}: {error}; repair the header") from error
    with np.errstate(all="ignore"):  # what overflows is found among the voxels
        return Scan(apply_read_scaling(stored, slope, inter), affine, reader="nifti")


def _is_gzip(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _opened(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if _is_gzip(path) else path.open("rb")


def _header(stream: io.BufferedIOBase, path: Path) -> Any:
    block = stream.read(_HEADER_BYTES)
    kinds = [kind for kind in (Nifti1Header, Nifti2Header) if kind.may_contain_header(block)]
    if not kinds:
        what = "is empty" if not block else "holds something else than NIfTI"
        raise ReadError("not_an_image", f"{path}: {what}; look where it came from, or remove it")
    header = kinds[0](block[: kinds[0].sizeof_hdr], check=False)
    if header["sform_code"] == 0 and not (header["pixdim"][1:4] > 0).all():
        spacing = header["pixdim"][1:4].tolist()
        raise ReadError("bad_geometry", f"{path}: spacing {spacing} mm; repair the header")
    try:
        header.check_fix(logger=_quiet)
        colour_or_complex = header.get_data_dtype().kind not in "iuf"
    except (HeaderDataError, ValueError) as error:
        raise ReadError("unreadable", f"{path}: {error}; repair the header") from error
    if colour_or_complex:
        kind = header.get_value_label("datatype")
        raise ReadError("not_an_image", f"{path}: {kind} voxels; convert them to one intensity")
    return header


def _check_claim(header: Any, path: Path, limits: Limits, volume: int | None) -> None:
    """Refuse what cannot be before memory is taken for it."""
    shape = header.get_data_shape()
    check_shape(shape, where=path, limits=limits, volume=volume)
    most = path.stat().st_size * (_DEFLATE_LIMIT if _is_gzip(path) else 1)
    if header.get_data_offset() + math.prod(shape) * header.get_data_dtype().itemsize > most:
        raise _truncated(path)


def _voxels(header: Any, stream: io.BufferedIOBase, path: Path) -> NDArray[Any]:
    shape = header.get_data_shape()[:3]
    voxels = np.empty(shape, header.get_data_dtype(), order="F")
    space = voxels.reshape(-1, order="F").view(np.uint8).data
    stream.seek(header.get_data_offset())
    filled = 0
    while filled < len(space):
        part = stream.read(min(_READ_BYTES, len(space) - filled))
        if not part:
            raise _truncated(path)
        space[filled : filled + len(part)] = part
        filled += len(part)
    return voxels


def _truncated(path: Path) -> ReadError:
    return ReadError("truncated", f"{path}: shorter than its header says; copy it again")
