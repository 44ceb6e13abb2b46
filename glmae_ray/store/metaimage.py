"""Read MetaImage (.mha, .mhd): a strict parser, since ITK's believes a file that was cut short.

Patient space of the format is LPS in mm. Each row of TransformMatrix is the direction of one file
axis, as ITK writes and reads it; without a matrix the axes are those of LPS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glmae_ray.store.raw import Block, read_block
from glmae_ray.store.scan import ImageFiles, Limits, ReadError, Scan, check_shape
from glmae_ray.store.text_header import (
    LPS_TO_RAS,
    bad_geometry,
    broken,
    data_path,
    header_lines,
    integers,
    numbers,
    ras_affine,
    sibling,
    something_else,
)

if TYPE_CHECKING:
    from glmae_ray.paths import Place

_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",  # four bytes on every machine
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_MODALITIES = {"MET_MOD_CT": "CT", "MET_MOD_MR": "MR"}
_TRUTH = {"true": True, "1": True, "false": False, "0": False}
# Names of one thing, from several ages of the format.
_SPACING = ("ElementSpacing", "ElementSize")
_ORIGIN = ("Offset", "Origin", "Position")
_DIRECTIONS = ("TransformMatrix", "Rotation", "Orientation")
_BIG_ENDIAN = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")


def read_metaimage(files: ImageFiles, limits: Limits) -> Scan:
    """Read one image.

    Raises:
        ReadError: It is no MetaImage, damaged, or not one 3-D image of plain numbers.
        OSError: The system cannot read it.
    """
    path = files.paths[0]
    with path.open("rb") as file:
        header = _header(file, path)
        header_bytes = file.tell()
    shape = header.integers("DimSize", header.integer("NDims"))
    check_shape(shape, where=path, limits=limits, volume=files.volume)
    block = _block(header, files, header_bytes)._replace(shape=tuple(shape))
    affine = _affine(header, len(shape))
    modality = _MODALITIES.get(header.fields.get("Modality", ""))
    return Scan(read_block(block), affine, "metaimage", modality, volumes=block.volumes)


def metaimage_data_files(path: Place) -> list[str]:
    """Files that a header names, relative to its folder; none where it holds the voxels itself.

    Raises:
        ReadError: It is no header, or names files elsewhere.
        OSError: The system cannot read it.
    """
    with path.open("rb") as file:
        name = _data_file(_header(file, path))
    return [] if name is None else [name]


class _Header(NamedTuple):
    """Fields as they are written, and how to take one."""

    fields: dict[str, str]
    where: Place

    def text(self, *names: str) -> str | None:
        """The value of the field that goes by one of these names."""
        found = {self.fields[name] for name in names if name in self.fields}
        if len(found) > 1:
            raise broken(self.where, f"{' and '.join(names)} disagree")
        return found.pop() if found else None

    def integers(self, name: str, count: int) -> list[int]:
        text = self.text(name)
        if text is None:
            raise broken(self.where, f"no {name}")
        return integers(text, count, name, self.where)

    def integer(self, name: str, default: int | None = None) -> int:
        if default is not None and name not in self.fields:
            return default
        return self.integers(name, 1)[0]

    def floats(self, names: tuple[str, ...], count: int) -> NDArray[np.float64] | None:
        text = self.text(*names)
        return None if text is None else np.array(numbers(text, count, names[0], self.where))

    def truth(self, *names: str, default: bool) -> bool:
        text = self.text(*names)
        if text is not None and text.lower() not in _TRUTH:
            raise broken(self.where, f"{names[0]} {text!r} is neither True nor False")
        return default if text is None else _TRUTH[text.lower()]


def _header(file: BinaryIO, where: Place) -> _Header:
    """The header, of which ElementDataFile is the last line."""
    fields: dict[str, str] = {}
    for line in header_lines(file, where):
        name, equals, value = (part.strip() for part in line.partition("="))
        if not fields and name not in ("ObjectType", "NDims", "Comment"):
            raise something_else(where, "MetaImage")
        if name in fields or not equals or not name.isascii():
            raise broken(where, f"line {line[:60]!r} is no field, or the second of its name")
        fields[name] = value
        if name == "ElementDataFile":
            break
    else:
        if not fields:
            raise something_else(where, "MetaImage")
        raise ReadError("truncated", f"{where}: the header has no ElementDataFile; copy it again")
    kind = fields.get("ObjectType", "Image")
    if kind != "Image":
        raise ReadError("not_an_image", f"{where}: ObjectType {kind}; an Image is needed")
    return _Header(fields, where)


def _data_file(header: _Header) -> str | None:
    name = header.fields["ElementDataFile"]
    if name in ("LOCAL", "Local", "local"):
        return None
    if name.upper().startswith("LIST") or "%" in name or len(name.split()) != 1:
        message = f"ElementDataFile {name!r} is not one file; write the image as one .mha"
        raise ReadError("unreadable", f"{header.where}: {message}")
    return sibling(name, header.where)


def _block(header: _Header, files: ImageFiles, header_bytes: int) -> Block:
    """Where the voxels lie; the shape is still to come."""
    local = _data_file(header) is None
    packed = header.truth("CompressedData", default=False)
    skip = header.integer("HeaderSize", 0)
    packed_bytes = header.integer("CompressedDataSize", 0) if packed else 0  # 0: not said
    if skip < -1 or (packed and skip) or (local and skip > 0) or packed_bytes < 0:
        raise broken(header.where, f"HeaderSize {skip}, CompressedDataSize {packed_bytes}")
    return Block(
        path=files.paths[0] if local else data_path(files),
        dtype=_dtype(header),
        shape=(),
        start=None if skip == -1 else header_bytes if local else skip,
        packing="deflate" if packed else "raw",
        packed_bytes=packed_bytes or None,
        volume=files.volume,
        sealed=True,
    )


def _dtype(header: _Header) -> np.dtype[np.generic]:
    name, channels = header.text("ElementType"), header.integer("ElementNumberOfChannels", 1)
    if name is None:
        raise broken(header.where, "no ElementType")
    if name not in _TYPES or channels != 1:
        message = f"{channels} x {name} a voxel; convert them to one intensity"
        raise ReadError("not_an_image", f"{header.where}: {message}")
    if not header.truth("BinaryData", default=True):
        message = "voxels written as text; write the image with BinaryData = True"
        raise ReadError("unreadable", f"{header.where}: {message}")
    # Where nothing is said, ITK takes the order of its machine, which is little today.
    is_big = header.truth(*_BIG_ENDIAN, default=False)
    return np.dtype(_TYPES[name]).newbyteorder(">" if is_big else "<")


def _affine(header: _Header, dimensions: int) -> NDArray[np.float64]:
    """Affine (4, 4) to RAS+ mm; of more than three axes the later ones must not be of space."""
    spacing = header.floats(_SPACING, dimensions)
    origin = header.floats(_ORIGIN, dimensions)
    matrix = header.floats(_DIRECTIONS, dimensions**2)
    if spacing is None or not (spacing[:3] > 0).all():
        raise bad_geometry(header.where, f"ElementSpacing {spacing}")
    origin = np.zeros(dimensions) if origin is None else origin
    rows = np.eye(dimensions) if matrix is None else matrix.reshape(dimensions, dimensions)
    if rows[:3, 3:].any() or rows[3:, :3].any():
        raise bad_geometry(header.where, f"TransformMatrix {rows.tolist()} mixes space and time")
    with np.errstate(all="ignore"):  # what is not finite is found in the affine
        steps = rows[:3, :3].T * spacing[:3]
    return ras_affine(steps, origin[:3], factors=LPS_TO_RAS)
