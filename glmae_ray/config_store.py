"""The trees of the verbs that make and look into a store: ingest, inspect."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from glmae_ray.config_base import Config, Problem, Size, Spacing
from glmae_ray.config_run import RayConfig
from glmae_ray.config_train import JobConfig


class LimitsConfig(Config):
    """What is too small or too large to become a case; our decision."""

    min_side: PositiveInt = 4  # voxels; below lie scouts and single slices
    min_voxels: PositiveInt = 4096  # one patch of 16x16x16
    max_voxels: PositiveInt = 2**31  # 4 GiB of int16


class IngestConfig(JobConfig):
    """`glmae ingest`: files, folders, globs, data sets and manifests into a store."""

    source: str
    store: str
    modality: str | None = None  # None: the file's or the data set's own word, else CT
    splits: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (0.8, 0.1, 0.1)
    # Who a single file is of where nothing says it: who has its name, or that of its folder.
    subjects: Literal["name", "folder"] = "name"
    limits: LimitsConfig = LimitsConfig()
    volume: NonNegativeInt | None = None  # number K of files with several; None: quarantine them
    non_finite: Literal["quarantine", "fill"] = "quarantine"  # NaN and infinity among the voxels
    spacing_mm: Spacing | None = None  # resample to this (Z, Y, X); None: as acquired
    crop: Literal["foreground"] | None = None
    levels: PositiveInt = 3
    chunk: Size = (32, 32, 32)
    codec: Literal["zstd", "lz4"] = "zstd"  # lz4: read up to twice as fast, 27 to 40 % larger
    ray: RayConfig = RayConfig()

    def rules(self) -> Iterator[Problem]:
        """The shares of train, val and test make one whole."""
        if not math.isclose(sum(self.splits), 1.0, abs_tol=1e-6):
            shares = list(self.splits)
            yield Problem(("splits",), f"splits: {shares} sum to {sum(shares):g}, not 1")


class InspectConfig(JobConfig):
    """`glmae inspect`: what a store holds, or one case of it as facts and a picture."""

    store: str
    case: str | None = None
    out: str | None = None  # the case's picture; None: CASE.png in the current folder

    def rules(self) -> Iterator[Problem]:
        """A picture shows one case, and is a PNG."""
        if self.out is not None and self.case is None:
            yield Problem(("out", "case"), f"out: {self.out} has no effect without case=ID")
        if self.out is not None and not self.out.lower().endswith(".png"):
            yield Problem(("out",), f"out: {self.out} does not end in .png")
