"""What does a whole pre-training step cost, and how near is it to what the hardware gives?

    python -m benchmarks.step [--quick] --out FILE.json

A step is forward, backward, clipping, AdamW and teacher. Ours runs through engine and loop of
`glmae pretrain`; the rival is what a user would compose from MONAI: one call a view, an EMA
copy, a DINO head (benchmarks/_step_monai.py; tests show that both compute the same loss). Each
measurement is a process of its own; ways take turns, so that a busy machine troubles them alike.
FLOPs are the algorithm's own need, counted once by torch on our module, for all ways alike.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks._report import arguments, environment, report, spread
from benchmarks._step_rows import Size, Way, config, counted_flops, matrix_rate, measure
from glmae_ray.costs import flops
from glmae_ray.costs_memory import memory

_PACKAGES = ["torch", "monai", "deepspeed", "numpy"]
_WAYS = (
    Way("glmae", "ours"),
    Way("glmae", "monai"),
    Way("glmae", "ours", compile=True),
    Way("glmae", "ours", precision="bf16"),
    Way("glmae", "ours", precision="bf16", compile=True),
    Way("mae", "ours"),
    Way("mae", "monai"),
)
_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
_AUTHORS_SAMPLES = 746 * 1600  # scans x epochs

Row = dict[str, Any]


def main() -> None:
    """Measure, print, write."""
    args = arguments((__doc__ or "").splitlines()[0])
    facts = environment(_PACKAGES)
    threads = facts["cores"]
    sizes = {way: _size(way, quick=args.quick) for way in _WAYS}
    facts |= {"device": _device_name(), "threads": threads}
    # Where memory is counted, torch's recorder has much to say that is of no use here.
    os.environ |= {"KINETO_LOG_LEVEL": "5", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    # The second step of a process is still a fifth slower than those that follow.
    rounds, warm_up, steps = (3 if args.quick else 5), 2, 3
    runs: dict[Way, list[Row]] = {way: [] for way in _WAYS}
    rates: dict[str, list[float]] = {precision: [] for precision in _DTYPES}
    for turn in range(rounds):
        for precision, dtype in _DTYPES.items():
            rates[precision].append(_in_new_process(matrix_rate, dtype, threads=threads))
        for way in _WAYS:
            options = {"warm_up": warm_up, "steps": steps, "threads": threads, "weigh": not turn}
            runs[way].append(_in_new_process(measure, way, sizes[way], **options))
    one_of_each = {way.objective: way for way in _WAYS}
    needs = {
        objective: _in_new_process(counted_flops, way, sizes[way])
        for objective, way in one_of_each.items()
    }
    rows = [_row(way, sizes[way], needs, runs[way], rates[way.precision]) for way in _WAYS]
    report("step", rows=rows, ratios=_ratios(rows), facts=facts, out=args.out)


def _size(way: Way, *, quick: bool) -> Size:
    """The recipe's own sides, or smaller ones; on a GPU as many samples as ours fit in."""
    sides = (96, 64) if quick else (160, 96)
    if not torch.cuda.is_available():
        return Size(*sides, samples=2 if quick else 1)
    # MONAI's parts hold more than ours; in float32 they get half of what fits ours.
    room = torch.cuda.get_device_properties(0).total_memory * (0.85 if way.who == "ours" else 0.4)
    samples = 1
    while memory(config(way, Size(*sides, samples=samples + 1))).peak < room:
        samples += 1
    return Size(*sides, samples=samples)


def _row(
    way: Way, size: Size, needs: dict[str, float], runs: Sequence[Row], rates: Sequence[float]
) -> Row:
    seconds = [second for run in runs for second in run["seconds"]]
    need, cfg = needs[way.objective], config(way, size)
    rate = statistics.median(need * size.samples / second for second in seconds)
    speed = [size.samples / second for second in seconds]
    peak = max(run["peak"] for run in runs)
    row = {
        "objective": way.objective,
        "way": way.name,
        "samples": size.samples,
        "samples/s": spread(speed),
        "GFLOP a sample": round(need / 1e9, 1),
        "GFLOP/s": round(rate / 1e9, 1),
        "matrix GFLOP/s": spread([each / 1e9 for each in rates], digits=1),
        "share": round(rate / statistics.median(rates), 3),
        "peak memory, GB": round(peak / 1e9, 2),
    }
    if way.who == "ours":
        row["doctor / counted FLOP"] = round(sum(flops(cfg).values()) / need, 4)
        row["doctor / measured memory"] = round(memory(cfg).peak / peak, 4)
    if torch.cuda.is_available() and way.objective == "glmae":
        hours = _AUTHORS_SAMPLES / statistics.median(speed) / 3600
        row["GPU-hours for 746 scans x 1600 epochs"] = round(hours, 1)
    return row


def _ratios(rows: Sequence[Row]) -> dict[str, float]:
    speed = {(row["objective"], row["way"]): row["samples/s"]["median"] for row in rows}
    pairs = (
        ("glmae", "ours_fp32", "monai_composed_fp32"),
        ("mae", "ours_fp32", "monai_mae_fp32"),
        ("glmae", "ours_fp32_compiled", "ours_fp32"),
        ("glmae", "ours_bf16", "ours_fp32"),
        ("glmae", "ours_bf16_compiled", "ours_fp32"),
    )
    ratios = {
        f"{what}: {one} / {two}": speed[what, one] / speed[what, two] for what, one, two in pairs
    }
    ratios["glmae: ours_fp32 / matrix rate"] = rows[0]["share"]
    for name in ("doctor / counted FLOP", "doctor / measured memory"):
        given = [row[name] for row in rows if name in row]
        ratios[f"{name}, furthest from 1"] = max(given, key=lambda ratio: abs(ratio - 1))
    return ratios


def _device_name() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"


def _in_new_process(function: Any, *values: Any, **options: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *values, **options).result()


if __name__ == "__main__":
    main()
