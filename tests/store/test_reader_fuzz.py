"""Damaged files: a reader refuses them, or gives what the library of the format gives.

Where a library refuses a file that a reader takes, the damage must lie where it does not matter:
the image is then the undamaged one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from glmae_ray.store.readers import read_image
from glmae_ray.store.scan import REASONS, Limits, ReadError
from glmae_ray.volume import to_source_axes
from tests.store import scans
from tests.store.scans import KINDS, files_of, trusted

LIMITS = Limits(min_side=1, min_voxels=2, max_voxels=2**22)
SHAPE = (7, 6, 5)


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, or the end missing."""
    if rng.random() < 0.2:
        return raw[: rng.randrange(len(raw))]
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 8)):
        # Half of the changes stay text: in a header of text those get past the parser.
        change = (rng.randrange(256), rng.choice(b" 0123456789.-:=,()_e\n"))
        changed[rng.randrange(len(raw))] = rng.choice(change)
    return bytes(changed)


def attempt(path: Path):
    """The image in file axes and its affine, or None for an honest refusal."""
    try:
        image = read_image([files_of(path)], case_id="a", limits=LIMITS)
    except ReadError as error:
        honest = error.reason in REASONS and str(path.parent) in error.message
        if not (honest and error.message.isprintable()):
            raise
        return None
    return to_source_axes(image.volume.array[0], image.source_affine), image.source_affine


def library(path: Path):
    """What nibabel or SimpleITK make of a file; None where they refuse it."""
    sitk.ProcessObject_SetGlobalWarningDisplay(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trusted(path)
    except Exception:
        return None


class Libraries:
    """The libraries in a process of their own: SimpleITK can take its process down."""

    def __init__(self) -> None:
        self._pool = self._started()

    @staticmethod
    def _started() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def read(self, path: Path):
        try:
            return self._pool.submit(library, path).result(timeout=60)
        except BrokenProcessPool:
            self._pool = self._started()
            return None

    def close(self) -> None:
        self._pool.shutdown()


@pytest.fixture(scope="module")
def libraries() -> Iterator[Libraries]:
    with contextlib.closing(Libraries()) as both:
        yield both


def right(mine, other, sound) -> bool:
    """Voxels and affine of the library, or of the undamaged file where the library gives none.

    SimpleITK says "Uncompress failed", and gives noise, where a MetaImage does not say how long
    the packed voxels are; the undamaged voxels are right there, too.
    """
    if other is None:
        return same(mine, sound)
    return same(mine, other) or same(mine, (sound[0], other[1]))


def same(mine, other) -> bool:
    voxels, affine = other
    voxels = np.reshape(voxels, voxels.shape[:3]) if set(voxels.shape[3:]) <= {1} else voxels
    return (
        mine[0].shape == voxels.shape
        and np.array_equal(mine[0].astype(np.float32), voxels.astype(np.float32))
        and np.allclose(mine[1], affine, atol=1e-4, rtol=1e-6)
    )


def check(kind: scans.Kind, folder: Path, libraries: Libraries, *, count: int) -> None:
    noise = np.random.default_rng(2).normal(0, 300, SHAPE)
    for dtype in ("<i2", ">f4"):
        whole = folder / dtype / f"scan{kind.suffix}"
        whole.parent.mkdir()
        kind.write(whole, noise.astype(dtype), scans.affine("PIR", degrees=12))
        sound = attempt(whole)
        assert same(sound, libraries.read(whole))
        for seed in range(count // 2):
            rng = random.Random(seed)
            target = folder / f"{dtype}-{seed}"
            shutil.copytree(whole.parent, target)
            victim = rng.choice(sorted(target.iterdir()))
            victim.write_bytes(damaged(victim.read_bytes(), rng))
            mine = attempt(target / whole.name)
            if mine is not None:
                other = libraries.read(target / whole.name)
                assert right(mine, other, sound), f"{target} of seed {seed}"
            shutil.rmtree(target)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_damaged_file_is_refused_or_read_as_the_library_reads_it(tmp_path, libraries, kind):
    check(kind, tmp_path, libraries, count=300)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_many_damaged_files_are_refused_or_read_alike(tmp_path, libraries, kind):
    check(kind, tmp_path, libraries, count=6000)
