"""MONAI's data sets with the two recipes, as its users write them.

Two loader workers, one sample a batch. What is not random comes first and is what the caches
keep: decode, turn to canonical axes and, for views, cut the foreground box and map the window
to [0, 1]. Voxels are float32.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from monai.data import CacheDataset, DataLoader, Dataset, PersistentDataset
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    RandomizableTransform,
    Resize,
    ScaleIntensityRanged,
    SpatialCrop,
    Transform,
)
from torch import Tensor
from torch.utils.data import Sampler

from benchmarks._loader_data import CROP, DataSet, Task
from glmae_ray.config_data import ViewsConfig
from glmae_ray.sampling import KINDS, Plan

Kind = Literal["dataset", "persistent", "cache", "cache without copies"]
Item = dict[Hashable, Any]

_WORKERS = 2


def monai(
    task: Task, *, kind: Kind, anti_aliased: bool = False, workers: int = _WORKERS
) -> Iterator[list[Tensor]]:
    """A loader over one of the data sets.

    Args:
        task: What to deliver.
        kind: Which data set; the copies of a cached volume are MONAI's default.
        anti_aliased: Whether `Resize` smooths before it shrinks; not its default.
        workers: Processes of the loader; none: this one, with a thread a core.
    """
    loader = DataLoader(
        _dataset(task, kind, anti_aliased=anti_aliased),
        sampler=_Endless(task),
        batch_size=1,
        num_workers=workers,
        collate_fn=_only,
    )
    return iter(loader)


def fill(task: Task) -> None:
    """Let PersistentDataset write its cache."""
    dataset = _dataset(task, "persistent", anti_aliased=False)
    for _ in DataLoader(dataset, batch_size=1, num_workers=_WORKERS, collate_fn=_only):
        pass


def _dataset(task: Task, kind: Kind, *, anti_aliased: bool) -> Any:
    items, steps = _items(task.data), _steps(task, anti_aliased=anti_aliased)
    if kind == "dataset":
        return Dataset(items, steps)
    if kind == "persistent":
        return PersistentDataset(items, steps, cache_dir=task.data.persistent(task.recipe))
    copies = kind == "cache"
    return CacheDataset(items, steps, num_workers=_WORKERS, copy_cache=copies, progress=False)


def _items(data: DataSet) -> list[Item]:
    """Numbers, paths, and the foreground boxes along X, Y, Z as MONAI has the axes."""
    boxes = data.foreground[:, :, ::-1].tolist()
    pairs = zip(data.images, boxes, strict=True)
    return [
        {"case": case, "image": image, "box": tuple(map(tuple, box))}
        for case, (image, box) in enumerate(pairs)
    ]


def _steps(task: Task, *, anti_aliased: bool) -> Compose:
    canonical = Orientationd("image", axcodes="RAS", labels=None)
    steps: list[Any] = [LoadImaged("image"), EnsureChannelFirstd("image"), canonical]
    if task.recipe == CROP:
        return Compose([*steps, _RandomCrop(task)])
    low, high = ViewsConfig().window
    window = ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True)
    return Compose([*steps, _ToForeground(), window, _RandomViews(anti_aliased=anti_aliased)])


class _ToForeground(Transform):
    """Cut the foreground box out."""

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        start, stop = data["box"]
        cut = SpatialCrop(roi_start=start, roi_end=stop)
        return {**data, "image": cut(data["image"])}


class _RandomViews(RandomizableTransform):
    """The views of one sample: boxes by the plan's own rule, then MONAI's crop and resize."""

    def __init__(self, *, anti_aliased: bool) -> None:
        super().__init__()
        self._views = ViewsConfig()
        self._resize = {
            kind: Resize(
                getattr(self._views, f"{kind}_size"), mode="trilinear", anti_aliasing=anti_aliased
            )
            for kind in KINDS
        }

    def __call__(self, data: Mapping[Hashable, Any]) -> list[Tensor]:
        volume = data["image"]
        whole = np.array([[[0, 0, 0], volume.shape[1:]]])
        plan = Plan(seed=0, foreground=whole, views=self._views)
        number = self.R.randint(2**31)
        return [self._cut(volume, plan.draw(number, kind).boxes, kind) for kind in KINDS]

    def _cut(self, volume: Tensor, boxes: np.ndarray, kind: str) -> Tensor:
        views = []
        for start, stop in boxes:
            crop = SpatialCrop(roi_start=start, roi_end=stop)(volume)
            views.append(torch.as_tensor(self._resize[kind](crop)))
        return torch.stack(views)


class _RandomCrop(RandomizableTransform):
    """One crop at native resolution, where a task's crops may lie."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._task = task

    def __call__(self, data: Mapping[Hashable, Any]) -> list[Tensor]:
        rng = np.random.default_rng(self.R.randint(2**31))
        start, stop = self._task.box_in(data["case"], rng)[:, ::-1]
        crop = SpatialCrop(roi_start=start, roi_end=stop)(data["image"])
        return [torch.as_tensor(crop).contiguous()]


class _Endless(Sampler[int]):
    """The case of each sample of a task, without end."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __iter__(self) -> Iterator[int]:
        return map(self._task.plan.case, self._task.numbers())


def _only(batch: list[Any]) -> Any:
    (sample,) = batch
    return sample
