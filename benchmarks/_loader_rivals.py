"""torchio's queue, and the way in which nnssl and nnU-Net v2 read their blosc2 files: crops only.

Neither has random resized views of several sizes, so the recipe `glmae` is not theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks._loader_data import SIDE, Task

_PER_VOLUME, _WORKERS = 10, 2  # torchio: crops of a volume, as in its example; processes
_CROPS = 200  # over which the bytes of a crop are averaged


def torchio_queue(task: Task, *, length: int) -> Iterator[list[Tensor]]:
    """Volumes through `Queue` and `UniformSampler`, float32; a batch is all that the queue held.

    The queue fills up while the consumer waits and is then emptied at once. Its crops lie
    anywhere in the volume.

    Args:
        task: What to deliver.
        length: Crops that the queue holds.
    """
    import torchio

    steps = torchio.ToCanonical()
    subjects = [torchio.Subject(image=torchio.ScalarImage(image)) for image in task.data.images]
    queue = torchio.Queue(
        torchio.SubjectsDataset(subjects, transform=steps),
        max_length=length,
        samples_per_volume=_PER_VOLUME,
        sampler=torchio.UniformSampler(SIDE),
        num_workers=_WORKERS,
    )
    return _emptied(queue, length)


def _emptied(queue: torch.utils.data.Dataset, length: int) -> Iterator[list[Tensor]]:
    import torchio

    loader = torchio.SubjectsLoader(queue, batch_size=_PER_VOLUME, num_workers=0)
    crops = (batch["image"][torchio.DATA] for batch in _again_and_again(loader))
    while True:
        yield list(itertools.islice(crops, length // _PER_VOLUME))


def _again_and_again(loader: torch.utils.data.DataLoader) -> Iterator:
    while True:
        yield from loader


def blosc2_crops(task: Task, *, dtype: str) -> Iterator[list[Tensor]]:
    """Crops of nnssl's files: each opened anew, mapped, read by one thread, as nnssl does."""
    import blosc2

    blosc2.set_nthreads(1)
    one_thread = {"nthreads": 1}
    open_file = partial(blosc2.open, mode="r", dparams=one_thread, mmap_mode="r")
    for case, (start, stop) in task.crops():
        image = open_file(urlpath=str(task.data.blosc2(case, dtype)))
        box = tuple(itertools.starmap(slice, zip(start.tolist(), stop.tolist(), strict=True)))
        yield [torch.from_numpy(image[(slice(None), *box)])]


def blosc2_bytes(task: Task, *, dtype: str) -> float:
    """Bytes of its file that a crop needs, in the mean: it is mapped, no system call tells.

    Reckoned from the blocks that the crop touches, each with an equal share of the file.
    """
    import blosc2

    sizes = []
    for case, box in itertools.islice(task.crops(), _CROPS):
        path = task.data.blosc2(case, dtype)
        image = blosc2.open(urlpath=str(path), mode="r")
        sides = np.array(image.blocks[1:])
        touched = (-(-box[1] // sides) - box[0] // sides).prod()
        sizes.append(path.stat().st_size * touched / (-(-task.data.shapes[case] // sides)).prod())
    return float(np.mean(sizes))
