"""What every way of loading is given: cases in the form it reads, a recipe, its share of samples.

A data set lies in one folder: `images` are the NIfTI files, `store` is what `glmae ingest` made of
them, `store-lz4` the same with `codec=lz4`, `int16` and `float32` are nnssl's files,
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glmae_ray.config_data import ViewsConfig
from glmae_ray.sampling import Plan
from glmae_ray.store.index import VolumeIndex

GLMAE, CROP = "glmae", "crop"  # the recipes
LZ4_STORE = "store-lz4"
SIDE = 96  # voxels, of a crop
_SEED = 0

Box = NDArray[np.int64]  # (2, 3): start and stop along Z, Y, X in voxels of the whole case


@dataclass(frozen=True, eq=False)
class DataSet:
    """Cases in every form, in the order of the store's index.

    Attributes:
        name: In the report.
        folder: Where they lie.
        case_ids: In the store and among nnssl's files.
        images: NIfTI files.
        shapes: int64 (N, 3), voxels along Z, Y, X.
        foreground: int64 (N, 2, 3), what the store's index knows of each case.
    """

    name: str
    folder: Path
    case_ids: list[str]
    images: list[str]
    shapes: NDArray[np.int64]
    foreground: NDArray[np.int64]

    @classmethod
    def load(cls, name: str, folder: Path) -> DataSet:
        """Read the index of a store that was prepared."""
        index = VolumeIndex.read(str(folder / "store"))
        images = [str(row["source"]) for row in index.records()]
        return cls(name, folder, index.case_ids(), images, index.shapes(), index.boxes())

    @property
    def store(self) -> str:
        """What `glmae ingest` made."""
        return str(self.folder / "store")

    def blosc2(self, case: int, dtype: str) -> Path:
        """A file of nnssl."""
        return self.folder / dtype / f"{self.case_ids[case]}.b2nd"

    def persistent(self, recipe: str) -> Path:
        """The cache of MONAI's PersistentDataset."""
        return self.folder / f"persistent-{recipe}"


@dataclass(frozen=True, eq=False)
class Task:
    """What a way is asked to deliver: the samples `part`, `part + parts`, ... of a recipe."""

    data: DataSet
    recipe: str
    part: int = 0
    parts: int = 1
    store: str | None = None  # in place of the data set's own: the same on S3

    @property
    def place(self) -> str:
        """The store to read."""
        return self.store or self.data.store

    @cached_property
    def plan(self) -> Plan:
        """Which case each sample shows, and the boxes of its views."""
        return Plan(seed=_SEED, foreground=self.data.foreground, views=ViewsConfig())

    def numbers(self) -> Iterator[int]:
        """Sample numbers, without end."""
        return itertools.count(self.part, self.parts)

    def crops(self) -> Iterator[Crop]:
        """Crops of 96^3 in and about the foreground, without end."""
        return map(self.crop, self.numbers())

    def crop(self, number: int) -> Crop:
        """The crop of one sample."""
        case = self.plan.case(number)
        return Crop(case, self.box_in(case, np.random.default_rng([_SEED, number])))

    def box_in(self, case: int, rng: np.random.Generator) -> Box:
        """A crop in the foreground box of a case.

        Where that is smaller than a crop along an axis, the crop holds it and lies anywhere else
        within the case.
        """
        last = self.data.shapes[case] - SIDE
        ends = self.data.foreground[case] - [[0], [SIDE]]
        low, high = np.sort(ends.clip(0, last), axis=0)
        start = rng.integers(low, high, endpoint=True)
        return np.stack([start, start + SIDE])


class Crop(NamedTuple):
    """Where a crop lies."""

    case: int  # row of the data set
    box: Box
