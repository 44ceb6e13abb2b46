"""Stores that benchmarks make for themselves: phantom people through the real `glmae ingest`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from glmae_ray.phantoms import write_cohort


def phantom_store(
    scratch: Path, *, people: int, splits: tuple[float, float, float] = (1, 0, 0)
) -> Path:
    """A store of phantom torso CT at 2-4 mm with label maps.

    Args:
        scratch: Where images and store go.
        people: How many.
        splits: Shares of train, val and test; every case for training.
    """
    source, store = scratch / "phantoms", scratch / "phantoms.zarr"
    ingest(write_cohort(source, people=people), store, splits=splits)
    return store


def clinical_store(scratch: Path, *, cases: int, slices: int) -> Path:
    """A store of phantom CT of 512 x 512 x `slices` voxels with the noise of a scanner."""
    from benchmarks._ingest_volumes import write_large

    images, store = scratch / "clinical", scratch / "clinical.zarr"
    images.mkdir()
    for number in range(cases):
        write_large(images / f"ct_{number:03d}.nii.gz", number, slices=slices)
    ingest_for_training(images, store)
    return store


def ingest_for_training(source: Path, store: Path, *, codec: str = "zstd") -> None:
    """The command itself; every case is for training."""
    ingest(source, store, splits=(1, 0, 0), codec=codec)


def ingest(
    source: Path, store: Path, *, splits: tuple[float, float, float], codec: str = "zstd"
) -> None:
    """The command itself."""
    words = [f"source={source}", f"store={store}", f"splits={[*splits]}", f"codec={codec}"]
    command = [sys.executable, "-m", "glmae_ray.cli", "ingest", *words]
    subprocess.run(command, check=True, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"})
