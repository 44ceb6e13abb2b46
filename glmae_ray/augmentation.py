"""Augmentation: MONAI's random transforms, each crop from a seed of its own."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from monai.transforms import (
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from numpy.typing import NDArray

from glmae_ray.config_finetune import AugmentConfig

_AXES = range(3)  # Z, Y, X, as MONAI counts them behind the channels
_PLANE = (1, 2)


def augment(
    images: NDArray[np.float32],
    labels: NDArray[np.uint8] | None,
    *,
    seeds: NDArray[np.int64],
    cfg: AugmentConfig,
) -> None:
    """Change crops in place, in space and then in intensity.

    A crop and its seed give the same result in any company, on any number of threads; what is
    interpolated (rotation, zoom) may differ in the last bits between machines.

    Args:
        images: (V, C, Z, Y, X).
        labels: (V, Z, Y, X), moved as the images are; None: there are none.
        seeds: (V,), not negative.
        cfg: What is changed, and how often.
    """
    keys = ("image",) if labels is None else ("image", "label")
    is_square = images.shape[-2] == images.shape[-1]
    # Transforms keep what they drew until they have used it: no two threads share any.
    steps, random = _transforms(cfg, keys, is_square, threading.get_ident())
    for crop, seed in enumerate(seeds.tolist()):
        random.seed([seed & 0xFFFFFFFF, seed >> 32])
        data = {"image": torch.from_numpy(images[crop])}
        if labels is not None:
            data["label"] = torch.from_numpy(labels[crop][None])
        for step in steps:
            data = step(data)
        images[crop] = data["image"].numpy()
        if labels is not None:
            labels[crop] = data["label"].numpy()[0]


@functools.lru_cache(maxsize=64)
def _transforms(
    cfg: AugmentConfig, keys: tuple[str, ...], is_square: bool, _thread: int
) -> tuple[list[Any], np.random.RandomState]:
    """The transforms of one thread, and the generator from which all of them draw.

    One for all, since a new one for each, as MONAI seeds them, takes longer than they do.
    """
    steps, random = [*_in_space(cfg, keys, is_square), *_in_intensity(cfg)], np.random.RandomState()
    for step in steps:
        step.set_random_state(state=random)
    return steps, random


def _in_space(cfg: AugmentConfig, keys: tuple[str, ...], is_square: bool) -> Iterator[Any]:
    if cfg.affine_chance:
        yield RandAffined(
            keys,
            prob=cfg.affine_chance,
            rotate_range=[math.radians(cfg.rotate_deg)] * 3,
            scale_range=[cfg.zoom] * 3,
            mode=["bilinear", "nearest"][: len(keys)],
            padding_mode="border",
        )
    for axis, chance in zip(_AXES, cfg.flips, strict=True):
        if chance:
            yield RandFlipd(keys, prob=chance, spatial_axis=axis)
    if cfg.rotate90 and is_square:
        yield RandRotate90d(keys, prob=cfg.rotate90, max_k=3, spatial_axes=_PLANE)
    elif cfg.rotate90:  # a quarter turn would swap its sides
        yield RandFlipd(keys, prob=cfg.rotate90, spatial_axis=_PLANE)


def _in_intensity(cfg: AugmentConfig) -> Iterator[Any]:
    if cfg.scale_chance:
        yield RandScaleIntensityd("image", factors=cfg.scale, prob=cfg.scale_chance)
    if cfg.shift_chance:
        yield RandShiftIntensityd("image", offsets=cfg.shift, prob=cfg.shift_chance)
    if cfg.noise_chance:
        std = cfg.noise
        yield RandGaussianNoised("image", prob=cfg.noise_chance, std=std, sample_std=False)
