"""Crops: numbers of a plan become labelled crops, whatever process makes them."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glmae_ray.config_data import CacheLimits
from glmae_ray.config_finetune import AugmentConfig, CropsConfig, FinetuneConfig
from glmae_ray.crop_plan import CropPlan, Points, crop_sides, label_points
from glmae_ray.crop_voxels import CropSource, Outputs, cut_images, cut_labels, read_outputs
from glmae_ray.intensity import window_of
from glmae_ray.labelled import Labelled
from glmae_ray.reading import CaseReader, Columns, Maker
from glmae_ray.structures import outputs_of, unknown_structures

_CASES = 1024  # whose points a process keeps, 46 KB each with 15 structures


@dataclass(frozen=True)
class CropMaker(Maker):
    """Makes labelled crops.

    `image` is float32 (B, V, C, Z, Y, X), intensities mapped and augmented. Of segmentation `label`
    is uint8 (B, V, Z, Y, X), 0 to K, and `known` bool (B, V, K + 1), whether the label map tells an
    output from background (background is known where all structures are); of classification
    `target` is int64 (B, V).

    Attributes:
        crops: How many of a sample, how large, which intensities.
        structures: In the order of the outputs behind the background.
        targets: Of classification: case id -> its class; None: of segmentation.
        augment: What is changed at random; None: nothing.
    """

    plan: CropPlan
    crops: CropsConfig
    structures: tuple[str, ...]
    targets: Mapping[str, int] | None = None
    augment: AugmentConfig | None = None

    def source(self, case: int) -> CropSource:
        """The facts about the case of a row."""
        row = self.index.at(case)
        z, y, x = row["shape"]
        window = window_of(row, self.crops)
        return CropSource(
            case_id=row["case_id"],
            shape=(z, y, x),
            factors=tuple(tuple(factors) for factors in row["factors"]),
            window=window,
            air=window.air(row["minimum"]),
            outputs=outputs_of(row, self.structures),
        )

    def known(self, case: int) -> NDArray[np.bool_]:
        """Which outputs the label map of the case of a row tells from background, (K + 1,)."""
        unknown = unknown_structures(self.index.at(case), self.structures)
        return np.array([not unknown, *(name not in unknown for name in self.structures)])

    def points(self, source: CropSource) -> Points:
        """Some voxels of each structure of a case, read once in a process."""
        if self.targets is not None:
            return []
        return _points(self.store, self.cache, source.case_id, source.outputs)

    def _room(self, count: int) -> Columns:
        shape = count, self.crops.count
        channels, size = int(self.index.at(0)["channels"]), self.crops.size
        columns: Columns = {"image": np.empty((*shape, channels, *size), np.float32)}
        if self.targets is not None:
            return columns | {"target": np.empty(shape, np.int64)}
        known = np.empty((*shape, 1 + len(self.structures)), bool)
        return columns | {"label": np.empty((*shape, *size), np.uint8), "known": known}

    def _make(self, columns: Columns, place: int, case: int) -> None:
        source = self.source(case)
        reader = CaseReader(source.case_id, store=self.store, cache=self.cache)
        began = time.perf_counter()
        draw = self.plan.draw(int(columns["number"][place]), self.points(source), case=case)
        images, labels = columns["image"][place], None
        cut_images(reader, source, draw.boxes, images)
        if self.targets is None:
            labels = columns["label"][place]
            cut_labels(reader, source, draw.boxes, labels)
            columns["known"][place] = self.known(case)
        else:
            columns["target"][place] = self.targets[source.case_id]
        if self.augment is not None:
            from glmae_ray.augmentation import augment  # with torch, which nothing else here needs

            augment(images, labels, seeds=draw.seeds, cfg=self.augment)
        whole_s = time.perf_counter() - began
        columns["made_s"][place] = reader.read_s, whole_s - reader.read_s, time.time()


def crop_maker(
    cfg: FinetuneConfig, labelled: Labelled, *, split: str, threads: int = 1
) -> CropMaker:
    """The maker of a run's samples.

    Args:
        cfg: The run.
        labelled: Its cases, see `choose_cases`.
        split: `train`, or `val`: the held-out cases, not augmented, with other crops from the same
            seed, and none stands in for another.
        threads: How many samples are made at a time in one call.
    """
    is_train = split == "train"
    index = labelled.train if is_train else labelled.val
    plan = CropPlan(
        seed=cfg.seed if is_train else cfg.seed + 2**32,
        foreground=index.boxes(),
        shapes=index.shapes(),
        sides=crop_sides(index.spacings(), cfg.crops),
        crops=cfg.crops,
    )
    return CropMaker(
        cfg.store,
        index,
        plan,
        cfg.crops,
        labelled.structures,
        targets=labelled.targets if cfg.task == "classification" else None,
        augment=cfg.augment if is_train else None,
        stand_in=is_train and cfg.pipeline.on_error == "skip",
        threads=threads,
        cache=cfg.pipeline.cache_limits,
    )


@functools.lru_cache(maxsize=_CASES)
def _points(store: str, cache: CacheLimits | None, case_id: str, outputs: Outputs) -> Points:
    """Of the structures of a case, in the order of their outputs."""
    reader = CaseReader(case_id, store=store, cache=cache)
    return label_points(read_outputs(reader, case_id, outputs))
