"""Labelled cases for the benchmark of finetuning's loader: an nnU-Net data set, and its store."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks._stores import ingest_for_training
from glmae_ray.phantoms import LABELS, ORIENTATIONS, make_person, write_cohort

_SHAPE = (512, 512, 200)  # (X, Y, Z) of a CT of clinical size
_SPACING_MM = (0.75, 0.75, 2.0)


@dataclass(frozen=True)
class LabelledSet:
    """Cases in both forms.

    Attributes:
        name: In the report.
        source: An nnU-Net data set.
        store: What `glmae ingest` made of it.
        words: The crops that are made of it, as a config has them.
    """

    name: str
    source: Path
    store: Path
    words: tuple[str, ...]

    @property
    def cases(self) -> int:
        """How many there are."""
        return len([*(self.source / "imagesTr").iterdir()])

    @property
    def store_bytes(self) -> int:
        """Of the store's level 0 and label maps on disk."""
        kept = [*self.store.glob("cases/*/image/0/*"), *self.store.glob("cases/*/labels/*/0/*")]
        return sum(path.stat().st_size for path in kept)


def small(folder: Path, *, most: int) -> LabelledSet:
    """Head-and-neck CT of 128^3 voxels (`GLMAE_TEST_DATA`), else phantoms, as acquired."""
    words = ("crops.size=[48,64,64]", "crops.window=[-200,500]", "augment.rotate90=0.1")
    data = os.environ.get("GLMAE_TEST_DATA")
    if data is None:
        source = write_cohort(folder / "source", people=most)
        return _ingested("phantoms", source, words)
    source, whole = folder / "source", Path(data) / "headneck_ct"
    for name in ("imagesTr", "labelsTr"):
        (source / name).mkdir(parents=True)
        for path in sorted((whole / name).iterdir())[:most]:
            (source / name / path.name).symlink_to(path)
    for name in ("dataset.json", "cases.json"):
        (source / name).symlink_to(whole / name)
    return _ingested("headneck_ct", source, words)


def clinical(folder: Path, *, count: int) -> LabelledSet:
    """Phantom CT of 512 x 512 x 200 voxels with labels; crops of 96^3 at 1.5 mm."""
    source = folder / "source"
    for name in ("imagesTr", "labelsTr"):
        (source / name).mkdir(parents=True)
    affine = np.diag([*_SPACING_MM, 1.0])
    for number in range(count):
        # Every len(ORIENTATIONS)-th person lies like the first: x, y and z are the axes.
        image, labels, _ = make_person(number * len(ORIENTATIONS), seed=1)
        noise = np.random.default_rng(number).normal(0, 15, _SHAPE).astype(np.float32)
        voxels = (_enlarged(image) + noise).clip(-1024, 3071).astype(np.int16)
        name = f"ct_{number:03d}"
        nib.save(nib.Nifti1Image(voxels, affine), source / f"imagesTr/{name}_0000.nii.gz")
        nib.save(nib.Nifti1Image(_enlarged(labels), affine), source / f"labelsTr/{name}.nii.gz")
    about = {"channel_names": {"0": "CT"}, "labels": LABELS, "file_ending": ".nii.gz"}
    (source / "dataset.json").write_text(json.dumps(about))
    return _ingested("clinical", source, ("crops.size=96", "crops.spacing=1.5"))


def _enlarged(array: np.ndarray) -> np.ndarray:
    """Each voxel of the result is the nearest one, (X, Y, Z)."""
    picks = [
        ((np.arange(side) + 0.5) * length / side).astype(int)
        for side, length in zip(_SHAPE, array.shape, strict=True)
    ]
    return array[np.ix_(*picks)]


def _ingested(name: str, source: Path, words: tuple[str, ...]) -> LabelledSet:
    store = source.with_name("store")
    ingest_for_training(source, store)
    return LabelledSet(name, source, store, words)
