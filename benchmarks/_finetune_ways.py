"""Ways of making labelled crops: ours from a store, MONAI's from volumes kept in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import CacheDataset
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    FgBgToIndicesd,
    LoadImaged,
    Orientationd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandRotate90d,
    RandShiftIntensityd,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
)

from glmae_ray.config_finetune import FinetuneConfig
from glmae_ray.crops import crop_maker
from glmae_ray.labelled import choose_cases

_KEYS = ("image", "label")
_SAMPLES = 10**6  # more than any run takes

Sample = tuple[np.ndarray, np.ndarray]  # float32 (V, C, ...), labels (V, ...)


def ours(cfg: FinetuneConfig) -> Iterator[Sample]:
    """`CropMaker`, sample after sample."""
    maker = crop_maker(cfg, choose_cases(cfg), split="train")
    for number in range(_SAMPLES):
        columns = maker.make({"number": np.array([number])})
        yield columns["image"][0], columns["label"][0]


def cached(cfg: FinetuneConfig, source: Path, *, fast: bool) -> tuple[CacheDataset, int]:
    """MONAI's CacheDataset with the steps of its UNETR tutorial, and the bytes that it keeps.

    Args:
        cfg: Size, spacing, window and augmentation; the same as ours.
        source: An nnU-Net data set.
        fast: Keep the foreground's and background's voxels too, and copy no volume: a change of
            the tutorial, and not MONAI's default.
    """
    steps = Compose([*_fixed(cfg, with_indices=fast), *_random(cfg, with_indices=fast)])
    dataset = CacheDataset(_items(source), steps, copy_cache=not fast, progress=False)
    kept = sum(
        value.nbytes if isinstance(value, np.ndarray) else value.numel() * value.element_size()
        for item in dataset._cache
        for value in item.values()
        if hasattr(value, "dtype")
    )
    return dataset, kept


def monai(dataset: CacheDataset, *, seed: int) -> Iterator[Sample]:
    """Its samples, case after case in an order of each pass."""
    rng = np.random.default_rng(seed)
    while True:
        for case in rng.permutation(len(dataset)):
            crops = dataset[int(case)]
            yield (
                np.stack([crop["image"].numpy() for crop in crops]),
                np.stack([crop["label"].numpy()[0] for crop in crops]),
            )


def _items(source: Path) -> list[dict[str, str]]:
    return [
        {"image": str(image), "label": str(source / "labelsTr" / image.name.replace("_0000", ""))}
        for image in sorted((source / "imagesTr").iterdir())
    ]


def _fixed(cfg: FinetuneConfig, *, with_indices: bool) -> Iterator[Any]:
    """What CacheDataset does once."""
    yield LoadImaged(_KEYS)
    yield EnsureChannelFirstd(_KEYS)
    yield Orientationd(_KEYS, axcodes="RAS", labels=None)
    if cfg.crops.spacing is not None:
        yield Spacingd(_KEYS, pixdim=cfg.crops.spacing[::-1], mode=("bilinear", "nearest"))
    low, high = cfg.crops.window
    yield ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True)
    yield CropForegroundd(_KEYS, source_key="image", allow_smaller=True)
    yield SpatialPadd(_KEYS, spatial_size=cfg.crops.size[::-1])
    if with_indices:
        yield FgBgToIndicesd("label", image_key="image", image_threshold=0)


def _random(cfg: FinetuneConfig, *, with_indices: bool) -> Iterator[Any]:
    indices = {"fg_indices_key": "label_fg_indices", "bg_indices_key": "label_bg_indices"}
    yield RandCropByPosNegLabeld(
        _KEYS,
        label_key="label",
        spatial_size=cfg.crops.size[::-1],
        pos=1,
        neg=1,
        num_samples=cfg.crops.count,
        image_key=None if with_indices else "image",
        image_threshold=0,
        **(indices if with_indices else {}),
    )
    augment = cfg.augment
    for axis, chance in enumerate(augment.flips[::-1]):
        yield RandFlipd(_KEYS, prob=chance, spatial_axis=axis)
    yield RandRotate90d(_KEYS, prob=augment.rotate90, max_k=3, spatial_axes=(0, 1))
    yield RandShiftIntensityd("image", offsets=augment.shift, prob=augment.shift_chance)
