"""How fast do views reach a training process, beside MONAI, torchio and nnssl?

    python -m benchmarks.loader [--quick] --out FILE.json

Two recipes on the same cases and two cores. `glmae`: 2 views of 160^3 and 8 of 96^3 of a case, of
random parts of its foreground, resized. `crop`: 96^3 voxels as they are. A way of loading runs in
processes of its own; what counts is what has become a torch tensor in the process that consumes.
Runs of all ways alternate; ratios are medians over pairs of runs that lie side by side.

In process and nnssl's files are two processes that each consume what they read. Ours and nnssl
read the same crops; MONAI's lie where ours may lie, torchio's anywhere. Ours delivers int16,
MONAI and torchio what their users get. Cold: each case once, after the system has dropped the
files from its cache. Bytes read are those of read calls of the whole tree of processes (blosc2
maps its files: reckoned from the blocks touched). Memory is anonymous and shared memory of the
tree, the most at once, its start included, the steady state left out. Others: cores that the rest
of the machine kept busy in the steady state; much above 0, a run says little (the S3 server is
one of them).

With `--quick` only the ways that a ratio needs run, on fewer cases and fewer times.

Variables: GLMAE_TEST_DATA, a folder with `headneck_ct` (else phantoms take its place), and
GLMAE_BENCH_SCRATCH, a folder in which what is prepared stays for the next run.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._loader_chart import draw_rates
from benchmarks._loader_data import CROP, GLMAE, DataSet, Task
from benchmarks._loader_measure import Measured, measure
from benchmarks._loader_processes import drop_from_cache, use_cores
from benchmarks._loader_server import object_server
from benchmarks._loader_ways import Entry, ways, ways_by_s3
from benchmarks._report import arguments, environment, report, spread

_PACKAGES = ["blosc2", "monai", "nibabel", "numpy", "ray", "tensorstore", "torch", "torchio"]
_S3, _S3_SLOW = "ours_ray_s3", "ours_ray_s3_20ms"
_DELAY_S = 0.020
_RATIOS: dict[str, tuple[tuple[str, str, str], ...]] = {  # name's end, above, below
    GLMAE: (
        ("ours_ray / monai_dataset", "ours_ray", "monai_dataset"),
        ("ours_ray / monai_persistent", "ours_ray", "monai_persistent"),
        ("ours_ray / monai_cache_ram", "ours_ray", "monai_cache_ram"),
        ("ours_ray / ours_in_process", "ours_ray", "ours_in_process"),
        ("ours_ray_lz4 / monai_persistent", "ours_ray_lz4", "monai_persistent"),
        ("ours_ray_lz4 / monai_cache_ram", "ours_ray_lz4", "monai_cache_ram"),
        ("s3 with 20 ms / s3 without", _S3_SLOW, _S3),
    ),
    CROP: (
        ("ours_in_process / blosc2_nnssl", "ours_in_process", "blosc2_nnssl"),
        ("ours_in_process / torchio_queue", "ours_in_process", "torchio_queue"),
        ("ours_in_process_lz4 / blosc2_nnssl", "ours_in_process_lz4", "blosc2_nnssl"),
    ),
}

Row = dict[str, Any]
Runs = dict[str, list[Measured]]  # by way


@dataclass(frozen=True)
class Effort:
    """How much is measured, and how long.

    Attributes:
        cases: Of clinical size.
        small_cases: Of head-and-neck CT.
        repeats: Runs of a way on the cases of clinical size.
        small_repeats: On the small ones.
        seconds: Of the steady state in each run.
        only_bars: Leave out the ways that no ratio needs.
    """

    cases: int
    small_cases: int
    repeats: int
    small_repeats: int
    seconds: float
    only_bars: bool


_QUICK = Effort(cases=4, small_cases=24, repeats=2, small_repeats=1, seconds=4, only_bars=True)
_FULL = Effort(cases=12, small_cases=203, repeats=3, small_repeats=3, seconds=20, only_bars=False)


def main() -> None:
    """Measure, print, write."""
    args = arguments((__doc__ or "").splitlines()[0])
    effort = _QUICK if args.quick else _FULL
    facts = environment(_PACKAGES)
    use_cores(2)
    with _scratch() as scratch:
        prepared, found, ratios = _measure_all(scratch, effort)
    _draw(found, args.out.with_suffix(".png"))
    report("loader", rows=[*prepared, *found], ratios=ratios, facts=facts, out=args.out)


@contextmanager
def _scratch() -> Iterator[Path]:
    kept = os.environ.get("GLMAE_BENCH_SCRATCH")
    if kept:
        yield Path(kept).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="glmae-bench-") as folder:
        yield Path(folder)


def _measure_all(scratch: Path, effort: Effort) -> tuple[list[Row], list[Row], dict[str, float]]:
    """Rows of what was prepared, rows of what was measured, ratios."""
    from benchmarks._loader_prepare import clinical, headneck, preparation

    large = clinical(scratch, count=effort.cases, only_bars=effort.only_bars)
    small = headneck(scratch, most=effort.small_cases, only_bars=effort.only_bars)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    asked = [(large, GLMAE), (large, CROP), (small, GLMAE)]
    if not effort.only_bars:
        asked.append((small, CROP))
    with _s3_ways(large, once=effort.only_bars) as s3_ways:
        for data, recipe in asked:
            entries = ways(recipe, data)
            if data is large and recipe == GLMAE:
                entries += s3_ways
            if effort.only_bars:
                entries = [entry for entry in entries if entry.has_bar]
            repeats = effort.repeats if data is large else effort.small_repeats
            runs = _runs(data, recipe, entries, repeats=repeats, seconds=effort.seconds)
            rows += [_row(data, recipe, entry, runs[entry.name]) for entry in entries]
            prefix = recipe if data is large else f"{data.name}, {recipe}"
            ratios |= {f"{prefix}: {what}": ratio for what, ratio in _ratios(recipe, runs).items()}
    return [row for data in (large, small) for row in preparation(data)], rows, ratios


@contextmanager
def _s3_ways(data: DataSet, *, once: bool = False) -> Iterator[list[Entry]]:
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(object_server(data.folder.parent, delay_s=delay_s))
            for name, delay_s in ((_S3, 0.0), (_S3_SLOW, _DELAY_S))
        }
        yield ways_by_s3(f"s3://{data.folder.name}/store", servers, once=once)


def _runs(
    data: DataSet, recipe: str, entries: Sequence[Entry], *, repeats: int, seconds: float
) -> Runs:
    """Measure every way, in turn and in random order; the first run of each begins cold."""
    rng = random.Random(0)
    runs: Runs = {entry.name: [] for entry in entries}
    for repeat in range(repeats):
        for entry in rng.sample(entries, len(entries)):
            if entry.once and repeat > 0:
                continue
            began = time.perf_counter()
            run = _run(data, recipe, entry, seconds=seconds, cold=repeat == 0)
            runs[entry.name].append(run)
            rate = f"{run.samples_per_s:.3g} samples a second, others {run.other_cores:.2g} cores"
            took = f"{time.perf_counter() - began:.0f} s"
            print(f"{data.name}, {recipe}, {entry.name}: {rate} ({took})", flush=True)
    return runs


def _run(data: DataSet, recipe: str, entry: Entry, *, seconds: float, cold: bool) -> Measured:
    task = Task(data, recipe, store=entry.store)
    # A batch that holds every case says nothing about the first pass.
    cold = cold and entry.files is not None and entry.way.samples <= len(data.images)
    if cold:
        files = (path for path in (data.folder / str(entry.files)).rglob("*") if path.is_file())
        cold = drop_from_cache(files)
    return measure(
        entry.way, task, seconds=seconds, least=entry.least, cold=cold, brief=entry.brief
    )


def _row(data: DataSet, recipe: str, entry: Entry, runs: Sequence[Measured]) -> Row:
    cold = [run.cold_samples_per_s for run in runs if not math.isnan(run.cold_samples_per_s)]
    return {
        "data": data.name,
        "recipe": recipe,
        "way": entry.name,
        "delivers": entry.delivers,
        "samples a second": spread([run.samples_per_s for run in runs]),
        "views a second": spread([run.views_per_s for run in runs]),
        "cold": round(cold[0], 4) if cold else None,
        "first batch, s": spread([run.first_batch_s for run in runs], digits=2),
        "set-up, s": spread([run.setup_s for run in runs], digits=2),
        "CPU, s a view": spread([run.cpu_s_per_view for run in runs]),
        "others, cores": spread([run.other_cores for run in runs], digits=2),
        "read / delivered": spread([run.read_per_byte for run in runs]),
        "peak, MiB": round(max(run.peak_mib for run in runs)),
    }


def _ratios(recipe: str, runs: Runs) -> dict[str, float]:
    """Rates over rates, and the wait for the first batch on a Ray that runs."""
    ratios = {
        what: statistics.median(
            a.samples_per_s / b.samples_per_s
            for a, b in zip(runs[above], runs[below], strict=False)
        )
        for what, above, below in _RATIOS[recipe]
        if above in runs and below in runs
    }
    if recipe == GLMAE:
        waits = [run.first_batch_s for run in runs["ours_ray"]]
        ratios["ours_ray, seconds to the first batch"] = statistics.median(waits)
    return ratios


def _draw(rows: Sequence[Row], path: Path) -> None:
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(f"{row['data']}, {row['recipe']}", []).append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_rates(panels, path)


if __name__ == "__main__":
    main()
