"""Ways to bring a NIfTI case into a form for training, each as its users run it, on one core.

A way takes a case and returns the seconds that it took. It imports what it needs when it is
called: each runs in a process of its own, which holds nothing of the others.
"""

from __future__ import annotations

import math
import pickle
import shutil
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from glmae_ray.store.intake import Choices, Pending, take_in
from glmae_ray.store.ledger import Ledger
from glmae_ray.store.sources import discover
from glmae_ray.store.zarr_store import VolumeStore

_NNSSL_PATCH = (160, 160, 160)  # of nnssl's published models
_L1_BYTES, _L3_BYTES, _SHARE = 32768, 1441792, 0.8  # what nnssl assumes of a core's caches
_KEPT_BYTES = 31 * 2**20  # below the 32 MiB at which glibc stops adapting


def pending_cases(source: Path, store: VolumeStore) -> list[Pending]:
    """The cases of a source as `glmae ingest` finds them."""
    sources = discover(str(source), read_headers=lambda places: [None] * len(places))
    return Ledger(store, sources, splits=(0.8, 0.1, 0.1), choices=Choices()).pending


def decode(pending: Pending, *, with_label: bool, keep_memory: bool = False) -> float:
    """Decode with nibabel and do nothing else.

    `keep_memory` shows how much of that is the allocator: once it has freed a large array, glibc
    keeps what is freed, where a plain loop of loads gets each array anew from the system.
    """
    import nibabel as nib

    if keep_memory:
        np.ones(_KEPT_BYTES, np.uint8)
    paths = pending.item.locations if with_label else [_image(pending)]
    begin = time.perf_counter()
    for path in paths:
        np.asanyarray(nib.load(path).dataobj)
    return time.perf_counter() - begin


def ours(pending: Pending, *, store: VolumeStore) -> float:
    """`take_in` as a worker runs it: image and label map, all checks, a new case each time."""
    store.remove(pending.item.case_id)
    begin = time.perf_counter()
    take_in(pending, store=store, choices=Choices())
    return time.perf_counter() - begin


def nnssl(pending: Pending, *, folder: Path, dtype: str) -> float:
    """Write the file of nnssl and nnU-Net v2 for an image: blosc2, zstd level 8, one thread.

    Cropping, normalising and resampling are left out, and so is the label map. nnssl stores
    float32; int16 is the same file for the voxels as we store them.
    """
    import blosc2
    import nibabel as nib

    blosc2.set_nthreads(1)
    target = folder / f"{pending.item.case_id}.b2nd"
    target.unlink(missing_ok=True)
    begin = time.perf_counter()
    image = nib.load(_image(pending))
    voxels = np.asanyarray(image.dataobj).transpose(2, 1, 0)[np.newaxis].astype(dtype)
    blocks, chunks = blosc2_blocks(voxels.shape, voxels.itemsize)
    blosc2.asarray(
        np.ascontiguousarray(voxels),
        urlpath=str(target),
        chunks=chunks,
        blocks=blocks,
        cparams={"codec": blosc2.Codec.ZSTD, "clevel": 8},
        mmap_mode="w+",
    )
    with target.with_suffix(".pkl").open("wb") as file:
        pickle.dump({"spacing": image.header.get_zooms()}, file)
    return time.perf_counter() - begin


def monai(pending: Pending, *, folder: Path) -> float:
    """Let MONAI's PersistentDataset fill its cache with an image on canonical axes."""
    from monai.data import PersistentDataset

    steps, target = _monai_steps(), folder / pending.item.case_id
    shutil.rmtree(target, ignore_errors=True)
    begin = time.perf_counter()
    data: Any = PersistentDataset([{"image": _image(pending)}], steps, cache_dir=target)
    data[0]
    return time.perf_counter() - begin


def blosc2_blocks(shape: tuple[int, ...], itemsize: int) -> tuple[tuple[int, ...], ...]:
    """Blocks and chunks (C, Z, Y, X) by nnssl's rule: a block fits L1, a chunk a core's L3.

    A block starts as the largest powers of two in half a patch, and the axis that is longest
    for its patch is halved until the block fits; then blocks are put together along the axis
    that has the fewest until the chunk is full or is the array.
    """
    block = [shape[0], *(2 ** int(math.log2(side / 2)) for side in _NNSSL_PATCH)]
    while math.prod(block) * itemsize > _L1_BYTES * _SHARE:
        # Of equal axes the last one: blocks come out flat in x.
        axis = max(range(1, 4), key=lambda n: (block[n] / _NNSSL_PATCH[n - 1], n))
        block[axis] //= 2
    block = [min(pair) for pair in zip(block, shape, strict=True)]
    chunk = list(block)
    while math.prod(chunk) * itemsize < _L3_BYTES * _SHARE and chunk != list(shape):
        open_axes = [axis for axis in range(1, 4) if chunk[axis] < shape[axis]]
        axis = min(open_axes, key=lambda n: chunk[n] / block[n])
        chunk[axis] = min(chunk[axis] + block[axis], shape[axis])
    return tuple(block), tuple(chunk)


@cache
def _monai_steps() -> Any:
    import torch
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd

    torch.set_num_threads(1)
    channel, turn = EnsureChannelFirstd("image"), Orientationd("image", axcodes="RAS", labels=None)
    return Compose([LoadImaged("image"), channel, turn])


def _image(pending: Pending) -> str:
    return pending.item.channels[0].locations[0]
