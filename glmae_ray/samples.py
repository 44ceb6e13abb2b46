"""Samples: numbers of a plan become views, seeds and windows, whatever process makes them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from glmae_ray.config import PretrainConfig
from glmae_ray.config_data import ViewsConfig
from glmae_ray.intensity import percentiles
from glmae_ray.reading import CaseReader, Columns, Maker
from glmae_ray.sampling import Plan
from glmae_ray.store.index import VolumeIndex
from glmae_ray.store.selection import columns_to_select, select_cases
from glmae_ray.store.statistics import tissue_above
from glmae_ray.views import Cut, Source, make_views

# Of the index, beside what the selection asks for.
_COLUMNS = {
    "case_id", "shape", "factors", "box_start", "box_stop", "modality", "channels", "dtype",
    "minimum", "maximum", "p0_5", "p99_5",
}  # fmt: skip
_REDRAWS = 8  # a view that is still air then stays: its case is nearly empty


@dataclass(frozen=True)
class SampleMaker(Maker):
    """Makes views.

    Of each kind they are int16 (B, V, C, Z, Y, X), its mask seeds int64 (B, V); `window` float32
    (B, C, 2) has the values that become 0 and 1.

    Attributes:
        views: Counts and sizes.
        kinds: The kinds of view that the loss uses.
    """

    plan: Plan
    views: ViewsConfig
    kinds: tuple[str, ...]

    def source(self, case: int) -> Source:
        """The facts about the case of a row."""
        return _source(self.index.at(case), self.views.window)

    def _room(self, count: int) -> Columns:
        channels = int(self.index.at(0)["channels"])
        columns = {"window": np.empty((count, channels, 2), np.float32)}
        for kind in self.kinds:
            views, size = getattr(self.views, f"{kind}_count"), getattr(self.views, f"{kind}_size")
            columns[kind] = np.empty((count, views, channels, *size), np.int16)
            columns[f"{kind}_seeds"] = np.empty((count, views), np.int64)
        return columns

    def _make(self, columns: Columns, place: int, case: int) -> None:
        number, source = int(columns["number"][place]), self.source(case)
        cuts: list[Cut] = []
        for kind in self.kinds:
            draw = self.plan.draw(number, kind, case=case)
            columns[f"{kind}_seeds"][place] = draw.mask_seeds
            cuts += map(Cut, draw.boxes, columns[kind][place])
        reader = CaseReader(source.case_id, store=self.store, cache=self.cache)
        began = time.perf_counter()
        make_views(reader, source, cuts, level_share=self.views.level_share)
        self._redraw(reader, source, columns, place, case)
        whole_s = time.perf_counter() - began
        columns["window"][place] = source.coded_window
        columns["made_s"][place] = reader.read_s, whole_s - reader.read_s, time.time()

    def _redraw(
        self, reader: CaseReader, source: Source, columns: Columns, place: int, case: int
    ) -> None:
        """Make the views that came out as air again, from the plan's next boxes for them."""
        number = int(columns["number"][place])
        for kind in self.kinds:
            views = columns[kind][place]
            air = [view for view in range(len(views)) if source.is_air(views[view])]
            for attempt in range(1, _REDRAWS + 1):
                if not air:
                    break
                boxes = self.plan.draw(number, kind, case=case, attempt=attempt).boxes
                cuts = [Cut(boxes[view], views[view]) for view in air]
                make_views(reader, source, cuts, level_share=self.views.level_share)
                air = [view for view in air if source.is_air(views[view])]


def sample_maker(
    cfg: PretrainConfig, *, split: str, kinds: tuple[str, ...], threads: int = 1
) -> SampleMaker:
    """The maker of a run's samples.

    Args:
        cfg: The run.
        split: `train`: the cases that `sampling` chooses. `val`: the held-out ones, all alike, with
            other boxes and masks from the same seed.
        kinds: `local`, `global` or both.
        threads: How many samples are made at a time in one call.

    Raises:
        UserError: The store has no index, or `sampling` does not fit it.
    """
    columns = _COLUMNS | columns_to_select(cfg.sampling)
    index, weights, seed = VolumeIndex.read(cfg.store, columns=columns), None, cfg.seed
    if split == "train":
        selection = select_cases(index, cfg.sampling)
        index, weights = selection.index, selection.weights
    else:
        index, seed = index.select(split=split), cfg.seed + 2**32
    plan = Plan(seed=seed, foreground=index.boxes(), views=cfg.views, weights=weights)
    return SampleMaker(
        cfg.store,
        index,
        plan,
        cfg.views,
        kinds,
        stand_in=split == "train" and cfg.pipeline.on_error == "skip",
        threads=threads,
        cache=cfg.pipeline.cache_limits,
    )


def _source(row: Mapping[str, Any], hounsfield: tuple[float, float]) -> Source:
    z, y, x = row["shape"]
    low, high = (np.array(row[name], float) for name in ("p0_5", "p99_5"))
    is_ct = row["modality"] == "CT"
    return Source(
        case_id=row["case_id"],
        shape=(z, y, x),
        factors=tuple(tuple(factors) for factors in row["factors"]),
        is_integer=np.issubdtype(np.dtype(row["dtype"]), np.integer),
        window=np.tile(hounsfield, (len(low), 1)) if is_ct else percentiles(row),
        tissue=np.array(
            [tissue_above(*ends, modality=row["modality"]) for ends in zip(low, high, strict=True)]
        ),
    )
