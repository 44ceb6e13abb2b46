"""How fast and how small does ingest write cases, beside bare decoding, nnssl and MONAI?

    python -m benchmarks.ingest [--quick] --out FILE.json

On one core, all ways take in the same cases, case by case in random order, each in a process of
its own and with warm file caches. Ours reads image and label map and does all that `glmae ingest`
does; nnssl and MONAI get the image only. Then the job itself runs on one worker and on two.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._ingest_job import run_job
from benchmarks._ingest_volumes import VolumeSet, huge_volume, large_volumes, small_volumes
from benchmarks._ingest_writers import decode, monai, nnssl, ours, pending_cases
from benchmarks._report import arguments, environment, report, spread
from glmae_ray.store.intake import Pending
from glmae_ray.store.zarr_store import VolumeStore

_PACKAGES = ["blosc2", "monai", "nibabel", "numcodecs", "numpy", "ray", "torch", "zarr"]
_DECODE, _DECODE_IMAGE, _OURS = "decode image and label", "decode image", "ours"
_DECODE_KEPT = "decode image and label, memory kept"
_INT16, _FLOAT32, _MONAI = "nnssl int16", "nnssl float32", "MONAI PersistentDataset"
_REPEATS = 3
_MOST_MB = 4 * 256 + 400  # of a worker with a volume of 512^3 int16: our decision

Row = dict[str, Any]
Way = Callable[[Pending], float]


class Found(NamedTuple):
    """What a part of the benchmark adds to the report."""

    rows: list[Row]
    ratios: dict[str, float]


def main() -> None:
    """Measure, print, write."""
    args = arguments((__doc__ or "").splitlines()[0])
    facts = environment(_PACKAGES)
    with tempfile.TemporaryDirectory(prefix="glmae-bench-") as folder:
        scratch = Path(folder)
        small = small_volumes(scratch)
        large = large_volumes(scratch, count=2 if args.quick else 4)
        parts = [
            _one_core(small, scratch / "small", most=40 if args.quick else 203),
            _one_core(large, scratch / "large-out", most=4),
            _workers(small, scratch),
            _memory(scratch),
        ]
    rows = [row for part in parts for row in part.rows]
    ratios = {what: value for part in parts for what, value in part.ratios.items()}
    report("ingest", rows=rows, ratios=ratios, facts=facts, out=args.out)


def _one_core(volumes: VolumeSet, out: Path, *, most: int) -> Found:
    """Time every way on the same cases, and weigh what they wrote."""
    VolumeStore.create(out / _OURS)
    store = VolumeStore.open(out / _OURS, threads=1)
    cases = pending_cases(volumes.folder, store)
    cases = cases[:: -(-len(cases) // most)]
    ways: dict[str, Way] = {
        _DECODE: partial(decode, with_label=True),
        _DECODE_KEPT: partial(decode, with_label=True, keep_memory=True),
        _DECODE_IMAGE: partial(decode, with_label=False),
        _OURS: partial(ours, store=store),
        _INT16: partial(nnssl, folder=out / _INT16, dtype="int16"),
        _FLOAT32: partial(nnssl, folder=out / _FLOAT32, dtype="float32"),
        _MONAI: partial(monai, folder=out / _MONAI),
    }
    for name in ways:
        (out / name).mkdir(parents=True, exist_ok=True)
    seconds = _interleaved(ways, cases)
    kilobytes = {name: size / len(cases) / 1e3 for name, size in _sizes(out).items()}
    rows: list[Row] = [
        {
            "volumes": volumes.name,
            "what": name,
            "cases": len(cases),
            "ms a case": spread([1e3 * s / len(cases) for s in sums], digits=2),
            "cases a second": len(cases) / statistics.median(sums),
        }
        for name, sums in seconds.items()
    ]
    rows += [
        {"volumes": volumes.name, "what": f"size: {what}", "kB a case": round(size, 1)}
        for what, size in kilobytes.items()
    ]
    return Found(rows, _ratios(volumes.name, seconds, kilobytes))


def _interleaved(ways: Mapping[str, Way], cases: Sequence[Pending]) -> dict[str, list[float]]:
    """Seconds that each way took for all cases, by repeat."""
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        homes = {
            name: stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for name in ways
        }
        for case in cases:  # into the file cache
            homes[_DECODE].submit(ways[_DECODE], case).result()
        for name, way in ways.items():  # imports
            homes[name].submit(way, cases[0]).result()
        for _ in range(_REPEATS):
            sums = dict.fromkeys(ways, 0.0)
            for case in cases:
                for name in rng.sample(list(ways), len(ways)):
                    sums[name] += homes[name].submit(ways[name], case).result()
            for name, total in sums.items():
                seconds[name].append(total)
    return seconds


def _sizes(out: Path) -> dict[str, int]:
    """Bytes on disk of what the ways wrote, and of the parts of our cases."""
    arrays = out / _OURS / "cases"
    levels = {f"ours, level {n}": _bytes(arrays, f"*/image/{n}/c.*") for n in range(3)}
    return {
        "ours, levels 0 to 2": sum(levels.values()),
        **levels,
        "ours, labels": _bytes(arrays, "*/labels/*/0/c.*"),
        "ours, documents": _bytes(arrays, "**/zarr.json"),
        _INT16: _bytes(out / _INT16, "*.b2nd"),
        _FLOAT32: _bytes(out / _FLOAT32, "*.b2nd"),
        _MONAI: _bytes(out / _MONAI, "*/*.pt"),
    }


def _bytes(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())


def _ratios(
    name: str, seconds: Mapping[str, Sequence[float]], kilobytes: Mapping[str, float]
) -> dict[str, float]:
    """Speed of ours over that of the others (above 1: ours is faster), and sizes."""

    def speed(other: str) -> float:
        pairs = zip(seconds[other], seconds[_OURS], strict=True)
        return statistics.median(theirs / mine for theirs, mine in pairs)

    others = (_DECODE, _DECODE_KEPT, _DECODE_IMAGE, _FLOAT32, _INT16, _MONAI)
    speeds = {f"{name}: cases a second, ours / {other}": speed(other) for other in others}
    sizes = {
        f"{name}: size, {mine} / {_INT16}": kilobytes[mine] / kilobytes[_INT16]
        for mine in ("ours, levels 0 to 2", "ours, level 0")
    }
    return speeds | sizes


def _workers(volumes: VolumeSet, scratch: Path) -> Found:
    """The job on Rays of one and of two CPUs, in turn."""
    jobs: dict[int, list[Row]] = {1: [], 2: []}
    for repeat in range(_REPEATS):
        for workers, results in jobs.items():
            store = scratch / f"job-{repeat}-{workers}"
            results.append(run_job(volumes.folder, store, workers=workers))
    rows: list[Row] = [
        {
            "volumes": volumes.name,
            "what": f"glmae ingest, workers: {workers}",
            "cases": results[0]["cases"],
            "cases a second": spread([r["cases_per_s"] for r in results], digits=2),
            "Ray starts, s": spread([r["ray_start_s"] for r in results], digits=2),
            "first case after, s": spread([r["first_case_s"] for r in results], digits=2),
        }
        for workers, results in jobs.items()
    ]
    pairs = zip(jobs[2], jobs[1], strict=True)
    gain = statistics.median(two["cases_per_s"] / one["cases_per_s"] for two, one in pairs)
    return Found(rows, {f"{volumes.name}: cases a second, 2 workers / 1 worker": gain})


def _memory(scratch: Path) -> Found:
    """The job on one volume of 512^3 int16, 256 MiB."""
    volumes = huge_volume(scratch)
    peak_mb = run_job(volumes.folder, scratch / "job-huge", workers=1, watch=True)["peak_mb"]
    row = {"volumes": volumes.name, "what": "glmae ingest, workers: 1", "cases": 1}
    what = "512^3 int16: own memory of a worker / (4 volumes + 400 MiB)"
    return Found([row | {"worker's peak, MiB": round(peak_mb)}], {what: peak_mb / _MOST_MB})


if __name__ == "__main__":
    main()
