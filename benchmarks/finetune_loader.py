"""How fast do labelled crops come from the store, beside MONAI's volumes cached in memory?

    python -m benchmarks.finetune_loader [--quick] --out FILE.json

Crops a second of CPU in one process with one thread, each way with crops of the same size, spacing,
window and chances of augmentation: ours reads its chunks from the store for every crop, MONAI's
CacheDataset holds every volume decoded, resampled and mapped. `monai_cache` is its UNETR tutorial;
`monai_cache_fast` also keeps which voxels are foreground and copies no volume, which is not its
default. Ways take turns; ratios are medians over turns that lie side by side. `kept` is what
CacheDataset holds in memory, and what ours has on disk.

Variables: GLMAE_TEST_DATA, a folder with `headneck_ct` (else phantoms take its place).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks._finetune_data import LabelledSet, clinical, small
from benchmarks._finetune_ways import Sample, cached, monai, ours
from benchmarks._report import arguments, environment, report, spread
from glmae_ray.config_finetune import FinetuneConfig
from glmae_ray.config_loading import load

_PACKAGES = ["monai", "numpy", "torch", "nibabel"]
_OURS, _TUTORIAL, _FAST = "ours", "monai_cache", "monai_cache_fast"
_RIVALS = (_TUTORIAL, _FAST)

Row = dict[str, Any]


def main() -> None:
    """Measure, print, write."""
    args = arguments((__doc__ or "").splitlines()[0])
    facts = environment(_PACKAGES)
    torch.set_num_threads(1)
    turns, seconds = (5, 2.0) if args.quick else (9, 5.0)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="glmae-bench-") as folder:
        for data in _sets(Path(folder), quick=args.quick):
            found = _measure(data, turns=turns, seconds=seconds)
            rows += [_row(data, way, one) for way, one in found.items()]
            for rival in _RIVALS:
                pairs = zip(found[_OURS].rates, found[rival].rates, strict=True)
                ratio = statistics.median(one / other for one, other in pairs)
                ratios[f"{data.name}: {_OURS} / {rival}"] = ratio
    report("finetune_loader", rows=rows, ratios=ratios, facts=facts, out=args.out)


def _sets(scratch: Path, *, quick: bool) -> list[LabelledSet]:
    return [
        small(scratch / "small", most=12 if quick else 48),
        clinical(scratch / "clinical", count=2 if quick else 6),
    ]


@dataclass
class _Measured:
    """One way on one set of cases."""

    samples: Iterator[Sample]
    kept: int  # bytes
    first_s: float = 0.0  # to the first crop
    rates: list[float] = field(default_factory=list)  # crops a second, a turn each


def _measure(data: LabelledSet, *, turns: int, seconds: float) -> dict[str, _Measured]:
    cfg = _config(data)
    found: dict[str, _Measured] = {}
    for way in (_OURS, *_RIVALS):
        began = time.perf_counter()
        if way == _OURS:
            found[way] = _Measured(ours(cfg), data.store_bytes)
        else:
            dataset, kept = cached(cfg, data.source, fast=way == _FAST)
            found[way] = _Measured(monai(dataset, seed=0), kept)
        image, label = next(found[way].samples)
        found[way].first_s = time.perf_counter() - began
        assert len(image) == len(label) == cfg.crops.count
        for _ in islice(found[way].samples, 2 * data.cases):  # points, open files, compiled loops
            pass
    for _ in range(turns):
        for one in found.values():
            one.rates.append(cfg.crops.count * _rate(one.samples, seconds=seconds))
    return found


def _row(data: LabelledSet, way: str, found: _Measured) -> Row:
    return {
        "data": data.name,
        "cases": data.cases,
        "way": way,
        "crops a second": spread(found.rates),
        "kept, MB": round(found.kept / 1e6, 1),
        "first crop, s": round(found.first_s, 2),
    }


def _config(data: LabelledSet) -> FinetuneConfig:
    words = [f"store={data.store}", "run=none", "init=none", "steps=1", "global_batch=1"]
    everyone = ["where=split == 'train'", "val_where=split == 'train'", "model.patch=8"]
    return load(FinetuneConfig, [*words, *everyone, *data.words])


def _rate(samples: Iterator[Sample], *, seconds: float) -> float:
    """Samples a second of CPU, which other work on the machine hardly changes."""
    began, count = time.process_time(), 0
    while (passed := time.process_time() - began) < seconds:
        next(samples)
        count += 1
    return count / passed


if __name__ == "__main__":
    main()
