"""Does a run over a million cases start as soon, and plan a sample as fast, as over a thousand?

    python -m benchmarks.plan_scale [--quick] --out FILE.json

Each index is a Parquet table in which every column is filled. A fresh process reads what a run's
readers need of it, chooses and weighs the cases, makes the plan and draws its first sample; then
it plans samples from all over a thousand passes, and last takes the fingerprint of the whole index.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks._report import arguments, environment, report, spread
from glmae_ray.config_data import SamplingConfig, ViewsConfig
from glmae_ray.sampling import Plan
from glmae_ray.store.index import FINGERPRINT_COLUMNS, SCHEMA, VolumeIndex
from glmae_ray.store.selection import columns_to_select, select_cases

_PACKAGES = ["numpy", "pyarrow"]
_SIZES = (1_000, 100_000, 1_000_000)
_PASSES = 1000
_MOST_S, _MOST_GB = 5.0, 1.0  # what a start over a million cases may take: our decision
_WARM_UP = 100  # samples

# What views are made from.
_COLUMNS = (
    *("case_id", "modality", "channels", "dtype", "shape", "factors", "box_start", "box_stop"),
    *("minimum", "maximum", "p0_5", "p99_5"),
)
_PLAIN = SamplingConfig(where="modality == 'CT' and split == 'train' or modality == 'MR'")
_WEIGHTED = SamplingConfig(
    where=_PLAIN.where,
    weights={"spacing[0] > 3": 0.5, "std[0] > 0 and channels == 1": 2},
    shares={"'/headneck_ct/' in source": 1, "'/abdomen_ct/' in source": 2, "modality == 'MR'": 1},
)

Row = dict[str, Any]


def main() -> None:
    """Measure, print, write."""
    args = arguments((__doc__ or "").splitlines()[0])
    facts = environment(_PACKAGES)
    repeats, samples = (2, 5_000) if args.quick else (5, 20_000)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="glmae-bench-") as folder:
        for cases in _SIZES:
            store = Path(folder) / str(cases)
            _in_new_process(_write_index, str(store), cases)
            for name, sampling in (("alike", _PLAIN), ("weights and shares", _WEIGHTED)):
                runs = [
                    _in_new_process(measure, str(store), sampling, samples) for _ in range(repeats)
                ]
                figures = {key: spread([run[key] for run in runs]) for key in runs[0]}
                size = round((store / "index.parquet").stat().st_size / 1e6, 1)
                rows.append({"cases": cases, "sampling": name, "index, MB": size, **figures})
    report("plan_scale", rows=rows, ratios=_ratios(rows), facts=facts, out=args.out)


def measure(store: str, sampling: SamplingConfig, samples: int) -> dict[str, float]:
    """What a process that has done nothing else needs to start and to plan samples."""
    views = ViewsConfig()
    begin = time.perf_counter()
    index = VolumeIndex.read(store, columns={*_COLUMNS, *columns_to_select(sampling)})
    selection = select_cases(index, sampling)
    index = selection.index
    plan = Plan(seed=0, foreground=index.boxes(), views=views, weights=selection.weights)
    _look_up(plan, index, number=0)
    start = time.perf_counter() - begin
    peak = _peak_mb()
    sample = _time_per_sample(plan, index, samples)
    begin = time.perf_counter()
    VolumeIndex.read(store, columns=FINGERPRINT_COLUMNS).fingerprint()
    return {
        "start-up, s": start,
        "peak memory, MB": peak,
        "sample, us": sample,
        "fingerprint, s": time.perf_counter() - begin,
        "peak memory with fingerprint, MB": _peak_mb(),
    }


def _time_per_sample(plan: Plan, index: VolumeIndex, samples: int) -> float:
    """Median microseconds of samples all over many passes; a busy machine moves it little."""
    numbers = np.random.default_rng(0).integers(0, _PASSES * len(index), _WARM_UP + samples)
    times = []
    for number in numbers.tolist():
        begin = time.perf_counter()
        _look_up(plan, index, number=number)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[_WARM_UP:]) * 1e6


def _look_up(plan: Plan, index: VolumeIndex, *, number: int) -> None:
    """All that is planned of one sample with views of both kinds."""
    case = plan.case(number)
    index.at(case)
    plan.draw(number, "global", case=case)
    plan.draw(number, "local", case=case)


def _ratios(rows: list[Row]) -> dict[str, float]:
    """What must not grow with the cases, and what a million of them may take; the worse way."""
    fewest, most = min(_SIZES), max(_SIZES)

    def worst(key: str, cases: int) -> float:
        return max(row[key]["median"] for row in rows if row["cases"] == cases)

    memory = worst("peak memory with fingerprint, MB", most) / 1000
    return {
        f"time per sample, {most} cases / {fewest} cases": (
            worst("sample, us", most) / worst("sample, us", fewest)
        ),
        f"start-up of {most} cases, s / {_MOST_S:g} s": worst("start-up, s", most) / _MOST_S,
        f"peak memory of {most} cases / {_MOST_GB:g} GB": memory / _MOST_GB,
    }


def _in_new_process(function: Any, *values: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *values).result()


def _peak_mb() -> float:
    """The most memory this process has had; unlike getrusage, nothing of who started it."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


def _write_index(store: str, cases: int) -> None:
    """An index as an archive of three data sets would give it; no two rows are alike."""
    rng = np.random.default_rng(cases)
    columns = {**_words(rng, cases), **_geometry(rng, cases), **_intensities(rng, cases)}
    arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
    VolumeIndex(pa.Table.from_arrays(arrays, schema=SCHEMA)).write(store)


def _words(rng: np.random.Generator, cases: int) -> dict[str, Any]:
    sets = rng.choice(["headneck_ct", "abdomen_ct", "brain_mr"], cases, p=[0.02, 0.58, 0.4])
    is_mr = sets == "brain_mr"
    subjects = [f"{name}_{number // 2:07}" for number, name in enumerate(sets)]
    digests = [rng.bytes(96).hex() for _ in range(cases)]
    labels = [("liver", 151_000), ("spleen", 21_000), ("kidney_left", 16_000)]
    technique = [("KVP", "120"), ("Manufacturer", "SIEMENS"), ("ConvolutionKernel", "B30f")]
    sources = [
        f"s3://archive/{name}/{subject}/1.2.826.0.1.3680043.{digest[:30]}/0001.dcm"
        for name, subject, digest in zip(sets, subjects, digests, strict=True)
    ]
    return {
        "case_id": [f"case_{number:07}_{digest[:8]}" for number, digest in enumerate(digests)],
        "subject": subjects,
        "split": rng.choice(["train", "val", "test"], cases, p=[0.8, 0.1, 0.1]),
        "modality": np.where(is_mr, "MR", "CT"),
        "dtype": ["int16"] * cases,
        "structures": [labels[: number % 4] for number in range(cases)],
        "annotated": [["liver", "spleen", "kidney_left"]] * cases,
        "acquisition": [technique] * cases,
        "source": sources,
        "source_hash": [digest[:64] for digest in digests],
        "source_stamp": [digest[64:128] for digest in digests],
        "voxel_hash": [digest[128:] for digest in digests],
        "reader": ["dicom"] * cases,
        "options": [[("crop", "None"), ("modality", "None"), ("spacing_mm", "None")]] * cases,
    }


def _geometry(rng: np.random.Generator, cases: int) -> dict[str, Any]:
    shape = rng.integers((40, 256, 256), (600, 640, 640), (cases, 3))
    spacing = rng.choice([0.8, 1.0, 1.5, 2.5, 5.0], (cases, 3)) + rng.random((cases, 1)) / 10
    affine = np.zeros((cases, 4, 4))
    affine[:, range(4), range(4)] = np.pad(spacing, ((0, 0), (0, 1)), constant_values=1)
    affine[:, :3, 3] = rng.normal(0, 200, (cases, 3))
    margin = shape // 10
    return {
        "channels": np.ones(cases, dtype=np.int32),
        "shape": list(shape),
        "spacing": list(spacing),
        "affine": list(affine.reshape(cases, 16)),
        "source_affine": list(affine[:, ::-1].reshape(cases, 16)),
        "source_shape": list(shape[:, ::-1]),
        "box_start": list(rng.integers(0, margin)),
        "box_stop": list(shape - rng.integers(0, margin)),
        "factors": [[[1, 1, 1], [1, 2, 2], [2, 4, 4]]] * cases,
        "filled": np.zeros(cases, dtype=np.int64),
        "ingest_version": np.full(cases, 2, dtype=np.int32),
    }


def _intensities(rng: np.random.Generator, cases: int) -> dict[str, Any]:
    names = ("minimum", "p0_5", "p50", "p99_5", "maximum")
    ordered = np.sort(rng.normal(0, 500, (cases, len(names))), axis=1)
    columns = {name: list(ordered[:, n : n + 1]) for n, name in enumerate(names)}
    columns["mean"] = list(ordered[:, 2:3] + rng.normal(0, 20, (cases, 1)))
    columns["std"] = list(rng.uniform(50, 400, (cases, 1)))
    return columns


if __name__ == "__main__":
    main()
