"""What a prediction leaves in the OUT folder: label maps, probabilities, and a record of each case.

A case has finished when its record `ID.json` is there, which is written last and says what made
the files beside it.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from glmae_ray.jobs.predict_inputs import Input
from glmae_ray.paths import UNFINISHED, Place, plain_errors, publish, read_file, to_place
from glmae_ray.store.items import safe_name

_GEOMETRY = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
_PACKED = 4  # of gzip: label maps come out 1/500 of their size at any level


class Outputs:
    """The OUT folder of one prediction."""

    def __init__(self, out: str | Place) -> None:
        """Name it."""
        self.folder = to_place(out)

    def label_map(self, case_id: str) -> Place:
        """Where the label map of a case is."""
        return self.folder / f"{case_id}.nii.gz"

    def segmentation(self, case_id: str) -> Place:
        """Where its DICOM-SEG is."""
        return self.folder / f"{case_id}.seg.dcm"

    def probability(self, case_id: str, number: int, structure: str) -> Place:
        """Where the probabilities of one of its structures are."""
        return self.folder / "probabilities" / case_id / f"{number}_{safe_name(structure)}.nii.gz"

    def record(self, case_id: str) -> dict[str, Any] | None:
        """What is known of a case that has finished, None of one that has not."""
        raw = read_file(self.folder / f"{case_id}.json")
        try:
            record = None if raw is None else json.loads(raw)
        except ValueError:
            return None
        return record if isinstance(record, dict) and "made_by" in record else None

    def write_record(self, case_id: str, record: Mapping[str, Any]) -> None:
        """Write it, last of all that a case leaves."""
        publish(self.folder / f"{case_id}.json", json.dumps(record, indent=2) + "\n")

    @contextmanager
    def room_for(self, shape: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """A float32 array on a disk, beside the outputs where these are on one."""
        beside = self.folder if isinstance(self.folder, Path) else None
        if beside is not None:
            beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=beside) as folder:
            yield np.memmap(Path(folder, "scores"), np.float32, "w+", shape=tuple(shape))


def write_nifti(place: Place, array: NDArray[Any], source: Input) -> None:
    """Write an array (Z, Y, X) on the grid of an input, in the input's own axes.

    A NIfTI input's words for its geometry (both forms, units) are repeated bit for bit. The file
    is written plane by plane and is there whole or not at all.

    Raises:
        UserError: The object store refuses.
        OSError: It cannot be written.
    """
    voxels = source.to_own_axes(array)
    header = nib.Nifti1Header()
    header.set_data_dtype(array.dtype)
    header.set_xyzt_units("mm")
    if source.header is not None:
        for name in _GEOMETRY:
            header[name] = source.header[name]
    image = nib.Nifti1Image(voxels, source.affine, header)
    with _whole(place) as path, path.open("wb") as file:
        # Without name and time in its head, equal label maps are equal files.
        with gzip.GzipFile("", "wb", _PACKED, file, mtime=0) as packed:
            image.to_stream(packed)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _whole(place: Place) -> Iterator[Path]:
    """A path to write a file at that is `place` once the block has ended."""
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_name(place.name + UNFINISHED)
        yield unfinished
        unfinished.replace(place)
        return
    with tempfile.TemporaryDirectory(prefix="glmae-") as folder:
        path = Path(folder, place.name)
        yield path
        with plain_errors(place):
            place.fs.put_file(str(path), place.path)
