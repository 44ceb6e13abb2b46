"""Scans to predict on, out of files or a store, each with the way back to its own grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from glmae_ray.jobs.dicom_seg import References, read_references
from glmae_ray.store.fetching import local_files
from glmae_ray.store.items import SourceItem
from glmae_ray.store.nifti import read_header
from glmae_ray.store.readers import read_image
from glmae_ray.store.reshaping import foreground_of
from glmae_ray.store.scan import ImageFiles, Limits
from glmae_ray.store.statistics import intensities
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.volume import Volume, canonical_affine, to_source_axes

Row = Mapping[str, Any]

_LIMITS = Limits(min_voxels=1)  # a small scan is worth no training, and may be worth labels


@dataclass(frozen=True, eq=False)
class Input:
    """One scan in memory.

    Attributes:
        array: (C, Z, Y, X) as a store would hold it.
        row: What a network's input depends on: the index's columns of modality, spacing, affine,
            foreground box and intensities.
        affine: (4, 4), index (x, y, z, 1) of the input's own axes to RAS+ mm.
        header: Of a NIfTI file, whose words for its geometry label maps repeat.
        references: Of a DICOM series, what a DICOM-SEG has to say of it.
    """

    array: NDArray[Any]
    row: Row
    affine: NDArray[np.float64]
    header: Any = None
    references: References | None = None

    def to_own_axes(self, array: NDArray[Any]) -> NDArray[Any]:
        """An array (Z, Y, X) on canonical axes as (X, Y, Z) on the input's own."""
        return to_source_axes(array, self.affine)


@dataclass(frozen=True)
class FileCase:
    """A scan in files, not read yet.

    Attributes:
        item: The files.
        modality: As stated, else as the files say, else None.
        dicom_seg: Whether it is a DICOM series of which a DICOM-SEG is wanted.
    """

    item: SourceItem
    modality: str | None
    dicom_seg: bool

    @property
    def case_id(self) -> str:
        """Its name among the outputs."""
        return self.item.case_id

    @property
    def source(self) -> str:
        """Where it is."""
        return self.item.source

    @property
    def stamp(self) -> str:
        """Another one when a file of it changes."""
        return self.item.stamp

    @property
    def channels(self) -> int:
        """Images it consists of."""
        return len(self.item.channels)

    def open(self) -> Input:
        """Read it.

        Raises:
            ReadError: A file cannot be read, or is no scan.
        """
        places = [place for image in self.item.channels for place in image.locations]
        with local_files(places) as local:
            files = [
                ImageFiles(image.reader, tuple(local[p] for p in image.locations), image.volume)
                for image in self.item.channels
            ]
            image = read_image(files, case_id=self.case_id, modality=self.modality, limits=_LIMITS)
            header = read_header(files[0].paths[0]) if image.reader == "nifti" else None
            references = read_references(files[0], _LIMITS) if self.dicom_seg else None
        return Input(
            image.volume.array, _row_of(image.volume), image.source_affine, header, references
        )


@dataclass(frozen=True)
class StoreCase:
    """A case of a store, not read yet.

    Attributes:
        store: The store.
        row: Of its index.
    """

    store: str
    row: Row
    dicom_seg: ClassVar[bool] = False  # its series may be anywhere by now

    @property
    def case_id(self) -> str:
        """Its name among the outputs."""
        return self.row["case_id"]

    @property
    def source(self) -> str:
        """Where it is."""
        return f"{self.store}, case {self.case_id}"

    @property
    def stamp(self) -> str:
        """Another one when its voxels change."""
        return self.row["voxel_hash"]

    @property
    def modality(self) -> str:
        """That of the index."""
        return self.row["modality"]

    @property
    def channels(self) -> int:
        """Images it consists of."""
        return self.row["channels"]

    @cached_property
    def is_reshaped(self) -> bool:
        """Whether ingest has resampled or cropped it, so that its files' grid is not its own."""
        source = np.reshape(self.row["source_affine"], (4, 4))
        x, y, z = self.row["source_shape"]
        affine = canonical_affine(source, source_shape=(x, y, z))
        own = np.reshape(self.row["affine"], (4, 4))
        return sorted((x, y, z)) != sorted(self.row["shape"]) or not np.allclose(affine, own)

    def open(self) -> Input:
        """Read it; one that ingest has reshaped is its own file.

        Raises:
            OSError: The store fails.
            UserError: It refuses.
        """
        array = VolumeStore.open(self.store).read(self.case_id, level=0)
        own = np.reshape(self.row["affine"], (4, 4))[:, [2, 1, 0, 3]]
        source = np.reshape(self.row["source_affine"], (4, 4))
        return Input(array, self.row, own if self.is_reshaped else source)


Case = FileCase | StoreCase


def why_unfit(case: Case, facts: Mapping[str, Any]) -> str | None:
    """Why a run cannot be shown a scan, None where it can; nothing is read for it.

    Args:
        case: The scan.
        facts: Of the run; see `segmenter_facts`.
    """
    if case.channels != facts["channels"]:
        return f"has {case.channels} channels, and the run takes {facts['channels']}"
    known = facts["modality"]
    if case.modality is None:
        return f"does not say its modality, and the run knows {', '.join(known)}; state modality"
    if case.modality.upper() not in known:
        line = f"is {case.modality}, and the run was trained on {', '.join(known)}"
        return f"{line}; state modality={known[0]} if it is that"
    return None


def _row_of(volume: Volume) -> Row:
    """What ingest would say of a volume, as far as networks depend on it."""
    box = foreground_of(volume)
    return {
        "modality": volume.modality,
        "spacing": list(volume.spacing),
        "affine": volume.affine.ravel().tolist(),
        "box_start": list(box[0]),
        "box_stop": list(box[1]),
        **intensities(volume.array, box),
    }
