"""Bring cases into the form that each way of loading reads, once, on two cores; time and weigh it.

What a folder of earlier runs holds is kept, with the seconds that it took then.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._ingest_volumes import small_volumes, write_large
from benchmarks._ingest_writers import nnssl, pending_cases
from benchmarks._loader_data import CROP, GLMAE, LZ4_STORE, SIDE, DataSet, Task
from benchmarks._stores import ingest_for_training
from glmae_ray.store.zarr_store import VolumeStore

_CORES = 2
_SLICES = (200, 300)  # of CT of clinical size, fewest and most
_SPAWN = multiprocessing.get_context("spawn")

Row = dict[str, Any]
Step = Callable[[Path], None]


def clinical(scratch: Path, *, count: int, only_bars: bool = False) -> DataSet:
    """Phantom CT of 512x512x200 to 300 voxels.

    Args:
        scratch: Where the data sets lie.
        count: How many cases.
        only_bars: Leave out the forms that no ratio needs.
    """
    folder = scratch / f"clinical-{count}"
    _prepare(folder, partial(_write_clinical, count=count), only_bars=only_bars)
    return DataSet.load("clinical", folder)


def headneck(scratch: Path, *, most: int, only_bars: bool = False) -> DataSet:
    """Head-and-neck CT of 128^3 voxels (`GLMAE_TEST_DATA`), else phantoms; see `clinical`."""
    name = "headneck_ct" if os.environ.get("GLMAE_TEST_DATA") else "phantoms"
    folder = scratch / f"{name}-{most}"
    _prepare(folder, partial(_write_small, most=most), only_bars=only_bars)
    return DataSet.load(name, folder)


def preparation(data: DataSet) -> list[Row]:
    """What it took: a row a form."""
    known = json.loads(_accounts(data.folder).read_text())
    return [{"data": data.name, "cases": len(data.images), **row} for row in known.values()]


def _prepare(folder: Path, write_images: Step, *, only_bars: bool) -> None:
    """All forms of a data set; the images come first, and then the store."""
    folder.mkdir(parents=True, exist_ok=True)
    _once(folder, "images", "images", write_images)
    _once(folder, "ours: glmae ingest", "store", _ingest)
    lz4 = partial(_ingest, into=LZ4_STORE, codec="lz4")
    _once(folder, "ours: glmae ingest codec=lz4", LZ4_STORE, lz4)
    for dtype in ("int16",) if only_bars else ("int16", "float32"):
        _once(folder, f"nnssl, {dtype}", dtype, partial(_write_blosc2, dtype=dtype))
    for recipe in (GLMAE,) if only_bars else (GLMAE, CROP):
        what, into = f"MONAI PersistentDataset, {recipe}", f"persistent-{recipe}"
        _once(folder, what, into, partial(_fill_persistent, recipe=recipe))


def _once(folder: Path, what: str, into: str, step: Step) -> None:
    """Let a step write a subfolder, unless the accounts say that it has."""
    accounts = _accounts(folder)
    known = json.loads(accounts.read_text()) if accounts.exists() else {}
    if into in known:
        return
    shutil.rmtree(folder / into, ignore_errors=True)
    begin = time.perf_counter()
    step(folder)
    seconds = round(time.perf_counter() - begin, 2)
    files = [path for path in (folder / into).rglob("*") if path.is_file()]
    disk_mb = round(sum(path.stat().st_size for path in files) / 1e6, 1)
    known[into] = {"prepared": what, "prepare, s": seconds, "disk, MB": disk_mb}
    accounts.write_text(json.dumps(known, indent=2))
    print(f"{folder.name}: {what}, {seconds:g} s, {disk_mb:g} MB", flush=True)


def _accounts(folder: Path) -> Path:
    return folder / "prepared.json"


def _write_clinical(folder: Path, *, count: int) -> None:
    images = folder / "images"
    images.mkdir()
    with ProcessPoolExecutor(_CORES, mp_context=_SPAWN) as pool:
        written = [
            pool.submit(write_large, images / f"ct_{number:03d}.nii.gz", number, slices=slices)
            for number, slices in enumerate(np.linspace(*_SLICES, count, dtype=int).tolist())
        ]
        for one in written:
            one.result()


def _write_small(folder: Path, *, most: int) -> None:
    """Copies on canonical axes: nnssl, which turns nothing, then has the voxels that ours has.

    Volumes that are smaller than a crop, as some phantoms are, stay out.
    """
    import nibabel as nib

    images = folder / "images"
    images.mkdir()
    source = small_volumes(folder).folder / "imagesTr"
    for path in sorted(source.glob("*_0000.nii.gz"))[:most]:
        image = nib.as_closest_canonical(nib.load(path))
        if min(image.shape) >= SIDE:
            nib.save(image, images / path.name.replace("_0000", ""))


def _ingest(folder: Path, *, into: str = "store", codec: str = "zstd") -> None:
    ingest_for_training(folder / "images", folder / into, codec=codec)


def _write_blosc2(folder: Path, *, dtype: str) -> None:
    into, elsewhere = folder / dtype, folder / "unused"
    into.mkdir()
    VolumeStore.create(elsewhere)  # in which no case is, so that all are named
    cases = pending_cases(folder / "images", VolumeStore.open(elsewhere))
    with ProcessPoolExecutor(_CORES, mp_context=_SPAWN) as pool:
        list(pool.map(partial(nnssl, folder=into, dtype=dtype), cases))
    shutil.rmtree(elsewhere)


def _fill_persistent(folder: Path, *, recipe: str) -> None:
    from benchmarks._loader_monai import fill

    task = Task(DataSet.load("", folder), recipe)
    with ProcessPoolExecutor(1, mp_context=_SPAWN) as pool:
        pool.submit(fill, task).result()
