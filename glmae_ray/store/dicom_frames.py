"""Read the frames of a DICOM file as they are stored, uncompressed or through a decoder.

Uncompressed pixels are read straight into an array. Compressed ones go through pydicom with GDCM
(JPEG, JPEG-LS, JPEG 2000), after their own header has been compared with the file's: GDCM writes
past its buffers where the two disagree. RLE is decoded here, for pydicom's decoder lets runs end
before their length.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
    UID_dictionary,
)

from glmae_ray.store.dicom_headers import guarded, truncated
from glmae_ray.store.dicom_pixels import Pixels
from glmae_ray.store.scan import ReadError

_JPEG_2000 = (JPEG2000Lossless, JPEG2000)
_GDCM = (
    *(JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1),
    *(JPEGLSLossless, JPEGLSNearLossless),
    *_JPEG_2000,
)
_HUFFMAN, _SCAN, _JPEG_LS = 0xC4, 0xDA, 0xF7  # JPEG segments: tables, pixels, shape of JPEG-LS
_NO_SHAPE = (_HUFFMAN, 0xC8, 0xCC)  # of the others that begin with C
_ITEM, _DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"


def read_frames(pixels: Pixels, wanted: Sequence[int]) -> Iterator[NDArray[Any]]:
    """Yield the wanted frames (rows, columns) of a file, integers in this machine's byte order.

    Raises:
        ReadError: truncated or unreadable.
    """
    if pixels.syntax.is_encapsulated:
        frames = _decoded(pixels, wanted)
    elif pixels.syntax == DeflatedExplicitVRLittleEndian:
        frames = _inflated(pixels, wanted)
    else:
        frames = _native(pixels, wanted)
    unused = pixels.allocated - pixels.stored
    for frame in frames:
        if unused:  # PS3.5 8.1.1: these bits may hold anything; the shifts also extend the sign
            frame <<= unused
            frame >>= unused
        yield frame


def _native(pixels: Pixels, wanted: Sequence[int]) -> Iterator[NDArray[Any]]:
    shape, native = (pixels.rows, pixels.columns), pixels.dtype.newbyteorder("=")
    with pixels.path.open("rb") as file:
        for index in wanted:
            file.seek(pixels.offset + index * pixels.frame_bytes)
            frame = np.empty(shape, pixels.dtype)
            if file.readinto(frame.reshape(-1).view(np.uint8).data) != pixels.frame_bytes:
                raise truncated(pixels.path)
            yield frame.astype(native, copy=False)


def _inflated(pixels: Pixels, wanted: Sequence[int]) -> Iterator[NDArray[Any]]:
    with guarded(pixels.path):
        data = dcmread(pixels.path, specific_tags=["PixelData"]).PixelData
        every = np.frombuffer(data, pixels.dtype, pixels.frames * pixels.rows * pixels.columns)
    for frame in every.reshape(pixels.frames, pixels.rows, pixels.columns)[wanted]:
        yield frame.copy()


def _decoded(pixels: Pixels, wanted: Sequence[int]) -> Iterator[NDArray[Any]]:
    path = pixels.path
    data = path.read_bytes()[pixels.offset :]
    _check_syntax(pixels)
    decode = _rle if pixels.syntax == RLELossless else _gdcm
    with guarded(path):
        frames = list(generate_frames(_whole(data, path), number_of_frames=pixels.frames))
        if len(frames) != pixels.frames:
            raise truncated(path)
    for index in wanted:
        with guarded(path):
            array = decode(frames[index], pixels)
        yield array


def _gdcm(frame: bytes, pixels: Pixels) -> NDArray[Any]:
    _check_codestream(frame, pixels)
    options: Any = {
        "rows": pixels.rows,
        "columns": pixels.columns,
        "number_of_frames": 1,
        "samples_per_pixel": 1,
        "bits_allocated": pixels.allocated,
        "bits_stored": pixels.stored,
        "pixel_representation": int(pixels.is_signed),
        "photometric_interpretation": "MONOCHROME2",
        "pixel_keyword": "PixelData",
    }
    source = encapsulate([frame], has_bot=False)
    decoder = get_decoder(pixels.syntax)
    with _stderr() as printed:
        array, _ = decoder.as_array(source, raw=True, index=0, decoding_plugin="gdcm", **options)
        printed.seek(0)
        if b"JPEG" in printed.read():  # "Corrupt JPEG data", "Premature end of JPEG file"
            raise _damaged(pixels.path)
    return array


def _rle(frame: bytes, pixels: Pixels) -> NDArray[Any]:
    """Decode one frame by PS3.5 annex G: a segment for each byte of a pixel, the highest first."""
    width, size = pixels.dtype.itemsize, pixels.rows * pixels.columns
    count, *starts = struct.unpack("<16L", frame[:64])
    if count != width:
        raise _damaged(pixels.path)
    ends = [*starts[1:width], len(frame)]
    planes = np.empty((size, width), np.uint8)
    for plane, start, end in zip(planes.T, starts, ends, strict=False):
        plane[:] = np.frombuffer(_unpacked(frame[start:end], size, pixels.path), np.uint8)
    big_endian = planes.view(pixels.dtype.newbyteorder(">")).reshape(pixels.rows, pixels.columns)
    return big_endian.astype(pixels.dtype)


def _unpacked(segment: bytes, size: int, path: Path) -> bytearray:
    unpacked, position = bytearray(), 0
    while len(unpacked) < size:
        length = segment[position] + 1
        if length <= 128:
            unpacked += segment[position + 1 : position + 1 + length]
            position += 1 + length
        elif length > 129:  # 129 is padding
            unpacked += segment[position + 1 : position + 2] * (258 - length)
            position += 2
        else:
            position += 1
    if len(unpacked) != size or position > len(segment):
        raise _damaged(path)
    return unpacked


@contextlib.contextmanager
def _stderr() -> Iterator[BinaryIO]:
    """A file that takes this process's stderr: GDCM's libjpeg tells of damage nowhere else."""
    with tempfile.TemporaryFile() as caught:
        own = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield caught
        finally:
            os.dup2(own, 2)
            os.close(own)


def _check_syntax(pixels: Pixels) -> None:
    syntax = pixels.syntax
    is_long = syntax == JPEGExtended12Bit and pixels.stored > 8  # GDCM decodes 8 bits of it only
    if is_long or syntax not in (*_GDCM, RLELossless):
        name = syntax.name if syntax in UID_dictionary else "an unknown transfer syntax"
        message = f"{pixels.path}: no decoder for {name}; save it in another transfer syntax"
        raise ReadError("unreadable", message)


def _whole(data: bytes, path: Path) -> bytes:
    """The items of compressed pixels up to their end mark, which a file cut short lacks."""
    position = 0
    while data[position : position + 4] == _ITEM:
        (length,) = struct.unpack("<L", data[position + 4 : position + 8])
        position += 8 + length
    if position + 8 > len(data):
        raise truncated(path)
    if data[position : position + 4] != _DELIMITER:
        raise _damaged(path)
    return data[: position + 8]


def _damaged(path: Path) -> ReadError:
    return ReadError("unreadable", f"{path}: damaged compressed pixels; copy it again")


def _check_codestream(frame: bytes, pixels: Pixels) -> None:
    """Compare the header of a compressed frame with the file's."""
    if b"\xff\xd9" not in frame[-10:]:  # end of image; padding may follow
        raise truncated(pixels.path)
    is_j2k = pixels.syntax in _JPEG_2000
    width, height, components, bits = (_jpeg2000 if is_j2k else _jpeg)(frame)
    is_same = (width, height, components) == (pixels.columns, pixels.rows, 1)
    if not is_same or bits > pixels.allocated:
        message = f"{pixels.path}: compressed pixels are not of the header's shape"
        raise ReadError("unreadable", message)


def _jpeg2000(frame: bytes) -> tuple[int, int, int, int]:
    """Width, height, components and bits by the SIZ segment, which comes first."""
    right, bottom, left, top = struct.unpack(">4L", frame[8:24])
    (components,) = struct.unpack(">H", frame[40:42])
    is_plain = frame[:4] == b"\xff\x4f\xff\x51" and frame[43:45] == b"\1\1"  # no subsampling
    return right - left, bottom - top, components if is_plain else 0, (frame[42] & 0x7F) + 1


def _jpeg(frame: bytes) -> tuple[int, int, int, int]:
    """Width, height, components and bits, where every segment up to the pixels is in place."""
    position, shape, is_decodable = 2, (0, 0, 0, 0), False
    while frame[position] == 0xFF:
        marker = frame[position + 1]
        (length,) = struct.unpack(">H", frame[position + 2 : position + 4])
        if marker == _SCAN:
            return shape if is_decodable else (0, 0, 0, 0)
        if marker in (_HUFFMAN, _JPEG_LS):  # JPEG-LS has no tables; without its own GDCM crashes
            is_decodable = True
        if marker == _JPEG_LS or (marker & 0xF0 == 0xC0 and marker not in _NO_SHAPE):
            bits, height, width, components = struct.unpack(">BHHB", frame[position + 4 :][:6])
            shape = (width, height, components, bits)
        position += 2 + length
    return 0, 0, 0, 0
