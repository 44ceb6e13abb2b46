"""Read NRRD (.nrrd, .nhdr): pynrrd parses the fields that matter, and nothing it says is trusted.

Space is LPS, RAS or LAS in mm. A file that names no space gets the axes of LPS, as in ITK, which
writes most of these files; one without an origin starts at (0, 0, 0).
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import nrrd
import numpy as np
from numpy.typing import NDArray

from glmae_ray.store.raw import Block, read_block, truncated
from glmae_ray.store.scan import ImageFiles, Limits, ReadError, Scan, check_shape
from glmae_ray.store.text_header import (
    LPS_TO_RAS,
    bad_geometry,
    broken,
    data_path,
    header_lines,
    integers,
    ras_affine,
    sibling,
    something_else,
)

if TYPE_CHECKING:
    from glmae_ray.paths import Place

_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_DTYPES = {name: kind for kind, names in _TYPES.items() for name in names}
_PACKINGS = {"raw": "raw", "gzip": "deflate", "gz": "deflate", "bzip2": "bzip2", "bz2": "bzip2"}
_PACKINGS |= dict.fromkeys(("ascii", "text", "txt"), "text")
_FACTORS = {  # of x, y and z, to get to RAS+
    "": LPS_TO_RAS,
    **dict.fromkeys(("left-posterior-superior", "lps"), LPS_TO_RAS),
    **dict.fromkeys(("right-anterior-superior", "ras"), (1.0, 1.0, 1.0)),
    **dict.fromkeys(("left-anterior-superior", "las"), (-1.0, 1.0, 1.0)),
}
_REQUIRED = ("dimension", "sizes", "type", "encoding")
_USED = {
    *(*_REQUIRED, "endian", "kinds", "spacings", "line skip", "byte skip", "data file"),
    *("space", "space dimension", "space directions", "space origin"),
}
_UNUSED = {
    *("content", "number", "block size", "thicknesses", "axis mins", "axis maxs", "centerings"),
    *("labels", "units", "min", "max", "old min", "old max", "space units", "sample units"),
    *("measurement frame", "centers"),
}
_ALIASES = {name.replace(" ", ""): name for name in (*_USED, *_UNUSED) if name.count(" ") == 1}
_OF_SPACE, _UNKNOWN, _SEPARATE = {"domain", "space"}, {"???", "none"}, {"list", "time"}

Fields = dict[str, Any]


def read_nrrd(files: ImageFiles, limits: Limits) -> Scan:
    """Read one image.

    Raises:
        ReadError: It is no NRRD file, damaged, or not one 3-D image of plain numbers.
        OSError: The system cannot read it.
    """
    path = files.paths[0]
    with path.open("rb") as file:
        fields = _fields(file, path)
        header_bytes = file.tell()
    sizes = fields["sizes"].tolist()
    outer = _outer_axis(fields, sizes, path)
    if outer is not None:
        sizes.append(sizes.pop(outer))
    check_shape(sizes, where=path, limits=limits, volume=files.volume)
    affine = _affine(fields, outer, path)
    block = Block(
        dtype=_dtype(fields, path),
        shape=tuple(sizes),
        volume=files.volume,
        interleaved=outer == 0,
        sealed=True,
        **_place(fields, files, header_bytes),
    )
    return Scan(read_block(block), affine, "nrrd", volumes=block.volumes)


def nrrd_data_files(path: Place) -> list[str]:
    """Files that a header names, relative to its folder; none where it holds the voxels itself.

    Raises:
        ReadError: It is no header, or names files elsewhere.
        OSError: The system cannot read it.
    """
    with path.open("rb") as file:
        name = _data_file(_fields(file, path), path)
    return [] if name is None else [name]


def _fields(file: BinaryIO, where: Place) -> Fields:
    """The fields that matter, parsed; an unknown one is damage, as the format says."""
    lines = header_lines(file, where)
    kept = [next(lines, "")]
    if not kept[0].startswith("NRRD"):
        raise something_else(where, "NRRD")
    for line in itertools.takewhile(bool, lines):
        word, _, value = f"{line} ".partition(": ")
        name = _ALIASES.get(word.lower(), word.lower())
        if name in _USED:
            kept.append(f"{name}: {_for_pynrrd(name, value, where)}")
        elif name not in _UNUSED and not line.startswith("#") and ":=" not in line:
            raise broken(where, f"unknown field {line[:60]!r}")
    try:
        with np.errstate(all="ignore"):
            fields = dict(nrrd.read_header(kept))
    except Exception as error:  # pynrrd raises whatever the damage leads to
        raise broken(where, f"{type(error).__name__}: {error}") from error
    return _checked(fields, where)


def _for_pynrrd(name: str, value: str, where: Place) -> str:
    """A value that pynrrd neither takes for another nor stumbles over."""
    if name in ("type", "data file"):
        return value
    # Python reads 1_0 and other scripts' digits as numbers, and pynrrd cuts a size of 9.7 down.
    if "_" in value or not value.isascii():
        raise broken(where, f"{name} {value!r}")
    if name == "sizes":
        integers(value, len(value.split()), name, where)
    # Spaces inside a vector are allowed, but not by pynrrd.
    return re.sub(r"\([^)]*\)", lambda found: re.sub(r" *([(,)]) *", r"\1", found[0]), value)


def _checked(fields: Fields, where: Place) -> Fields:
    """Fields of which each that counts axes counts as many."""
    for name in _REQUIRED:
        if name not in fields:
            raise broken(where, f"no field {name!r}")
    for name in ("sizes", "kinds", "spacings", "space directions"):
        if name in fields and len(fields[name]) != fields["dimension"]:
            raise broken(where, f"{name} is not of {fields['dimension']} axes")
    for name in ("type", "encoding", "endian", "space"):
        fields[name] = fields.get(name, "").lower()
    fields["kinds"] = [kind.lower() for kind in fields.get("kinds", [])]
    return fields


def _outer_axis(fields: Fields, sizes: list[int], where: Path) -> int | None:
    """The axis that counts volumes: the first (fastest) or the last; None for three axes."""
    kinds = fields["kinds"] or ["???"] * len(sizes)
    others = {i for i, kind in enumerate(kinds) if kind not in _OF_SPACE | _UNKNOWN}
    if any(kinds[i] not in _SEPARATE and sizes[i] > 1 for i in others):
        raise ReadError(
            "not_an_image",
            f"{where}: kinds {' '.join(kinds)}; convert colours or vectors to one intensity",
        )
    if len(sizes) > 3:
        steps = fields.get("space directions", fields.get("spacings"))
        if steps is not None:  # pynrrd gives NaN for the word none
            others |= {i for i, step in enumerate(steps) if np.isnan(step).all()}
        others = others or {len(sizes) - 1}
    if len(sizes) - len(others) != 3 or not others <= {0, len(sizes) - 1} or len(others) > 1:
        message = f"{where}: axes of {sizes}, kinds {' '.join(kinds)}; one 3-D volume is needed"
        raise ReadError("not_3d", message)
    return others.pop() if others else None


def _affine(fields: Fields, outer: int | None, where: Path) -> NDArray[np.float64]:
    """Affine (4, 4) to RAS+ mm."""
    space, steps = fields["space"], fields.get("space directions")
    if space not in _FACTORS:
        raise bad_geometry(where, f"space {space!r} is none of LPS, RAS and LAS")
    # Directions in a space that has neither a name nor a dimension: its line was damaged.
    if steps is not None and not space and "space dimension" not in fields:
        raise bad_geometry(where, "space directions without a space")
    if steps is None:
        spacings = fields.get("spacings")
        if spacings is None or space:
            raise bad_geometry(where, "no space directions")
        steps = np.diag(spacings) if outer is None else np.diag(np.delete(spacings, outer))
        if not (np.diag(steps) > 0).all():
            raise bad_geometry(where, f"spacings {spacings.tolist()} mm")
    elif outer is not None:
        steps = np.delete(steps, outer, axis=0)
    origin = fields.get("space origin", np.zeros(3))
    if steps.shape != (3, 3) or origin.shape != (3,) or fields.get("space dimension", 3) != 3:
        raise bad_geometry(where, "space directions or space origin are not of three dimensions")
    return ras_affine(steps.T, origin, factors=_FACTORS[space])


def _dtype(fields: Fields, where: Path) -> np.dtype[np.generic]:
    kind, endian = _DTYPES.get(fields["type"]), fields["endian"]
    if kind is None:
        message = f"{where}: type {fields['type']!r}; convert it to one intensity a voxel"
        raise ReadError("not_an_image", message)
    dtype = np.dtype(kind)
    if dtype.itemsize == 1 or _PACKINGS.get(fields["encoding"]) == "text":
        return dtype
    if endian not in ("little", "big"):
        raise broken(where, f"endian {endian!r} is neither little nor big")
    return dtype.newbyteorder(endian)


def _data_file(fields: Fields, where: Place) -> str | None:
    name = fields.get("data file")
    if name is None:
        return None
    if name.upper().startswith("LIST") or "%" in name:
        message = f"{where}: data file {name!r} is not one file; write the image as one .nrrd"
        raise ReadError("unreadable", message)
    return sibling(name, where)


def _place(fields: Fields, files: ImageFiles, header_bytes: int) -> dict[str, Any]:
    """Path, start, packing and skip of the block."""
    where = files.paths[0]
    attached = _data_file(fields, where) is None
    path = where if attached else data_path(files)
    packing = _PACKINGS.get(fields["encoding"])
    lines, skip = fields.get("line skip", 0), fields.get("byte skip", 0)
    if packing is None or lines < 0 or skip < -1 or (skip == -1 and packing != "raw"):
        message = f"encoding {fields['encoding']!r} with line skip {lines} and byte skip {skip}"
        raise ReadError("unreadable", f"{where}: {message}; write it with encoding gzip")
    if skip == -1:
        return {"path": path, "start": None, "packing": packing}
    start = _after_lines(path, header_bytes if attached else 0, lines)
    if packing in ("raw", "text"):  # elsewhere the bytes to skip are packed, too
        return {"path": path, "start": start + skip, "packing": packing}
    return {"path": path, "start": start, "packing": packing, "skip": skip}


def _after_lines(path: Path, start: int, lines: int) -> int:
    if lines == 0:
        return start
    with path.open("rb") as file:
        file.seek(start)
        for _ in range(lines):
            if not file.readline():
                raise truncated(path)
        return file.tell()
