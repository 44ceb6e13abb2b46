"""How fast do labelled crops come from the store, beside MONAI's volumes cached in memory?

    python -m benchmarks.finetune_loader [--quick] --out FILE.json

Crops a second of one process on one core, each of the same size, spacing, window and chances of
augmentation: ours reads its chunks from the store for every crop, MONAI's CacheDataset holds every
volume decoded, resampled and mapped. `monai_cache` is its UNETR tutorial; `monai_cache_fast` also
keeps the voxels of foreground and background and copies no volume, which is not its default. Ways
take turns; ratios are medians over turns that lie side by side. `kept` is what CacheDataset
holds, and what the files of ours are on disk.

Variables: GLMAE_TEST_DATA, a folder with `headneck_ct` (else phantoms take its place).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
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
        scratch = Path(folder)
        sets = [
            small(scratch / "small", most=12 if args.quick else 48),
            clinical(scratch / "clinical", count=2 if args.quick else 6),
        ]
        for data in sets:
            rates, kept, first_s = _measure(data, turns=turns, seconds=seconds)
            for way, values in rates.items():
                rows.append(
                    {
                        "data": data.name,
                        "cases": data.cases,
                        "way": way,
                        "crops a second": spread(values),
                        "kept, MB": round(kept[way] / 1e6, 1),
                        "first crop, s": round(first_s[way], 2),
                    }
                )
            for rival in _RIVALS:
                pairs = zip(rates[_OURS], rates[rival], strict=True)
                ratio = statistics.median(a / b for a, b in pairs)
                ratios[f"{data.name}: {_OURS} / {rival}"] = ratio
    report("finetune_loader", rows=rows, ratios=ratios, facts=facts, out=args.out)


def _measure(
    data: LabelledSet, *, turns: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, float]]:
    """Crops a second of each way in each turn, bytes kept, seconds to the first crop."""
    cfg = _config(data)
    samples: dict[str, Iterator[Sample]] = {}
    kept, first_s = {_OURS: data.store_bytes}, {}
    for way in (_OURS, *_RIVALS):
        began = time.perf_counter()
        if way == _OURS:
            samples[way] = ours(cfg)
        else:
            dataset, kept[way] = cached(cfg, data.source, fast=way == _FAST)
            samples[way] = monai(dataset, seed=0)
        image, label = next(samples[way])
        first_s[way] = time.perf_counter() - began
        assert image.shape[0] == len(label) == cfg.crops.count
        for _ in islice(samples[way], 2 * data.cases):  # points, open files, compiled loops
            pass
    rates: dict[str, list[float]] = {way: [] for way in samples}
    for _ in range(turns):
        for way, made in samples.items():
            rates[way].append(cfg.crops.count * _rate(made, seconds=seconds))
    return rates, kept, first_s


def _config(data: LabelledSet) -> FinetuneConfig:
    words = [f"store={data.store}", "run=none", "init=none", "steps=1", "global_batch=1"]
    everyone = ["where=split == 'train'", "val_where=split == 'train'", "model.patch=8"]
    return load(FinetuneConfig, [*words, *everyone, *data.words])


def _rate(samples: Iterator[Sample], *, seconds: float) -> float:
    """Samples a second over at least so many seconds."""
    began, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        next(samples)
        count += 1
    return count / passed


if __name__ == "__main__":
    main()
