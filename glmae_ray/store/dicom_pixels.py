"""Where the pixels of a DICOM file lie, what they are, and whether they all can be there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydicom import Dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)

from glmae_ray.store.dicom_headers import check_is_image, guarded, parse, text, truncated
from glmae_ray.store.scan import ReadError

PIXEL_KEYWORDS = (
    "SOPClassUID",
    "Modality",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelData",
)
_PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)  # float, double and integer pixels
_LONG_VRS = ("OB", "OW", "OF", "OD", "OV", "UN", "UT")  # their elements have 12 bytes before them
_UNDEFINED = 0xFFFFFFFF


class Pixels(NamedTuple):
    """Where the pixels of one file lie, and what they are."""

    path: Path
    syntax: UID
    rows: int
    columns: int
    frames: int
    allocated: int  # bits of a pixel: 8, 16 or 32
    stored: int  # how many of them count
    is_signed: bool
    offset: int  # of the pixels in the file; 0 where all of it is deflated

    @property
    def dtype(self) -> np.dtype[Any]:
        """As the file holds them."""
        order = ">" if self.syntax == ExplicitVRBigEndian else "<"
        return np.dtype(f"{order}{'i' if self.is_signed else 'u'}{self.allocated // 8}")

    @property
    def frame_bytes(self) -> int:
        """Size of one uncompressed frame."""
        return self.rows * self.columns * self.allocated // 8


def open_pixels(path: Path, keywords: Iterable[str]) -> tuple[Dataset, Pixels]:
    """Read a header with some attributes more, and hold what it claims against the file.

    Raises:
        ReadError: not_an_image, truncated or unreadable.
    """
    end, found = 0, None

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        nonlocal end, found
        end = stream.tell() + (0 if length == _UNDEFINED else length)
        found = (tag, vr, length) if tag in _PIXEL_TAGS else None
        return found is not None

    with path.open("rb") as stream:
        header = parse(stream, path, (*PIXEL_KEYWORDS, *keywords), at_pixels)
        start = stream.tell()
    check_is_image(header, path)
    size = path.stat().st_size
    if found is None:
        if end > size:
            raise truncated(path)
        raise ReadError("not_an_image", f"{path}: a header without pixels; remove it")
    tag, vr, length = found
    with guarded(path):
        _check_kind(header, tag, path)
        pixels = _described(header, path, start + (12 if vr in _LONG_VRS else 8))
        _check_length(pixels, vr, length, size)
    return header, pixels


def are_equal(first: Pixels, second: Pixels) -> bool:
    """Whether two files hold the same pixels byte for byte."""
    if first._replace(path=second.path, offset=0) != second._replace(offset=0):
        return False
    return first.path.read_bytes()[first.offset :] == second.path.read_bytes()[second.offset :]


def _check_kind(header: Dataset, tag: int, path: Path) -> None:
    colour = text(header, "PhotometricInterpretation")
    if tag != _PIXEL_TAGS[-1] or int(header.get("BitsAllocated") or 0) == 1:
        message = f"{path}: pixels of floats or of one bit, not a scan; remove it"
        raise ReadError("not_an_image", message)
    if int(header.get("SamplesPerPixel") or 1) != 1 or colour not in ("MONOCHROME1", "MONOCHROME2"):
        message = f"{path}: not one intensity per pixel (colour or a palette); remove it"
        raise ReadError("not_an_image", message)


def _described(header: Dataset, path: Path, offset: int) -> Pixels:
    allocated, stored = int(header.BitsAllocated), int(header.BitsStored)
    high = int(header.get("HighBit", stored - 1))
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or high != stored - 1:
        bits = f"{allocated} bits allocated, {stored} stored, the highest is {high}"
        raise ReadError("unreadable", f"{path}: {bits}; repair the header")
    syntax = UID(header.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian))
    pixels = Pixels(
        path,
        syntax,
        int(header.Rows),
        int(header.Columns),
        int(header.get("NumberOfFrames") or 1),
        allocated,
        stored,
        bool(int(header.PixelRepresentation)),
        0 if syntax == DeflatedExplicitVRLittleEndian else offset,
    )
    if min(pixels.rows, pixels.columns, pixels.frames) < 1:
        raise ReadError("unreadable", f"{path}: no rows, columns or frames; repair the header")
    return pixels


def _check_length(pixels: Pixels, vr: str | None, length: int, size: int) -> None:
    """Refuse files that hold less than they claim, or whole frames that they do not claim."""
    path, syntax = pixels.path, pixels.syntax
    if syntax.is_encapsulated != (length == _UNDEFINED):
        raise ReadError("unreadable", f"{path}: pixels do not match the transfer syntax")
    if syntax.is_encapsulated:
        return
    if syntax == ExplicitVRBigEndian and pixels.allocated == 8 and vr == "OW":
        raise ReadError("unreadable", f"{path}: bytes in big-endian words; save it little-endian")
    needed = pixels.frames * pixels.frame_bytes
    is_short = syntax != DeflatedExplicitVRLittleEndian and pixels.offset + needed > size
    if needed > length or is_short:
        raise truncated(path)
    if length - needed >= pixels.frame_bytes:
        message = f"{path}: holds more pixels than its header says; repair the header"
        raise ReadError("unreadable", message)
