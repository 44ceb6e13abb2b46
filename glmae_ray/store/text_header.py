"""Headers of lines of text, which NRRD and MetaImage have: bounded, strict, and never trusted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from glmae_ray.store.scan import ImageFiles, ReadError

if TYPE_CHECKING:
    from glmae_ray.paths import Place

LPS_TO_RAS = (-1.0, -1.0, 1.0)  # factors of patient x, y, z

_MOST_BYTES = 2**20  # of a header; those with a whole DICOM header as comments have some 20 kB


def header_lines(file: BinaryIO, where: Place) -> Iterator[str]:
    """Lines of a header, printable; afterwards the file stands behind the last one taken.

    Raises:
        ReadError: unreadable, for a header without an end or with line ends of two kinds.
    """
    size = 0
    while line := file.readline(_MOST_BYTES):
        size += len(line)
        if size >= _MOST_BYTES:
            raise broken(where, f"a header of more than {_MOST_BYTES} bytes")
        text = line.decode(errors="replace").replace("\t", " ").rstrip(" \r\n")
        if "\r" in text:
            raise broken(where, f"a line end within {text[:60]!r}")
        yield "".join(c if c.isprintable() else "\ufffd" for c in text)


def sibling(name: str, where: Place) -> str:
    """A data file's name as its header gives it: relative to the header's folder, and inside it.

    Raises:
        ReadError: unreadable, for a name that leads elsewhere: a header from a stranger must not
            make other files of this machine part of a store.
    """
    parts = re.split(r"[/\\]", name)
    if "\ufffd" in name or ".." in parts or not parts[0] or ":" in name:
        raise broken(where, f"data file {name!r} is not below the header's folder")
    return PurePosixPath(name).as_posix()


def data_path(files: ImageFiles) -> Path:
    """The file that holds the voxels of a header that names one.

    Raises:
        ReadError: unreadable, for a header that came alone.
    """
    if len(files.paths) != 2:
        raise broken(files.paths[0], f"{len(files.paths)} files; a header and its data are needed")
    return files.paths[1]


def numbers(text: str, count: int, field: str, where: Place) -> list[float]:
    """Exactly `count` numbers with spaces between them; NaN and infinity are numbers here.

    Raises:
        ReadError: unreadable.
    """
    try:
        values = [float(word) for word in text.split()]
    except ValueError:
        values = []
    if len(values) != count or "_" in text or not text.isascii():
        raise broken(where, f"{field} {text!r} is not {count} numbers")
    return values


def integers(text: str, count: int, field: str, where: Place) -> list[int]:
    """As `numbers`, for counts and sizes."""
    if not re.fullmatch(r"\s*[-+]?[0-9]{1,18}(\s+[-+]?[0-9]{1,18})*\s*", text):
        raise broken(where, f"{field} {text!r} is not {count} integers")
    return [int(value) for value in numbers(text, count, field, where)]


def ras_affine(
    steps: NDArray[np.float64], origin: NDArray[np.float64], *, factors: Sequence[float]
) -> NDArray[np.float64]:
    """Affine (4, 4) to RAS+ mm from another patient space.

    Args:
        steps: (3, 3) mm; column i is the way from a voxel to the next along file axis i.
        origin: Centre of the first voxel in mm.
        factors: Of x, y and z, to get from that space to RAS+.
    """
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = steps, origin
    affine[:3] *= np.asarray(factors)[:, None]
    return affine + 0.0  # no -0


def broken(where: Place, what: str) -> ReadError:
    """The error of a header that says something impossible."""
    return ReadError("unreadable", f"{where}: {what}; repair the header")


def bad_geometry(where: Place, what: str) -> ReadError:
    """The error of a header that does not say where the voxels lie."""
    return ReadError("bad_geometry", f"{where}: {what}; repair the header")


def something_else(where: Place, expected: str) -> ReadError:
    """The error of a file that is not of its suffix's kind."""
    return ReadError(
        "not_an_image",
        f"{where}: empty, or something else than {expected}; look where it came from, or remove it",
    )
