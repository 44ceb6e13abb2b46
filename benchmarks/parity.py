"""Does a run under Ray Train and DeepSpeed train as fast as a plain torchrun loop?

    python -m benchmarks.parity [--quick] [--config FILE.yaml] [--store STORE] --out FILE.json

Both train the same module with the same AdamW, schedules and batches on the same cores, with the
same threads; the rival (benchmarks/_torchrun_loop.py) is DistributedDataParallel and a DataLoader.
With views from memory the table says what the loops cost: ours is engine and loop under Ray Train.
With views from a store it says what feeding costs as well: ours is `glmae pretrain` as it is, the
rival makes the same views with the same code in as many processes as there are CPUs for. A run
writes a line of metrics every few steps, and is timed from outside by when the lines appear; the
first are left out. Validation, pictures and checkpoints are off. Ours and torchrun take turns;
ratios are medians over pairs of runs that lie side by side. The losses show that the work is the
same. Others: cores that the rest of the machine kept busy; much above 0, a run says little.

Processes: 1 and 2, or as many GPUs as there are. Without `--store` phantom people are ingested,
without `--config` it is configs/pretrain/demo.yaml, whose small steps are the hardest case.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks._parity_runs import FEEDS, OURS, TORCHRUN, WAYS, Plan, Run, run
from benchmarks._report import environment, parser, report, spread
from benchmarks._stores import phantom_store
from glmae_ray.config_loading import merge, read_yaml, shipped

_PACKAGES = ["torch", "deepspeed", "ray", "numpy"]
_QUICK, _FULL = Plan(window=3, warm_up=2, windows=4), Plan(window=5, warm_up=3, windows=10)
_PEOPLE = 6

Row = dict[str, Any]
Case = tuple[str, int]  # feed, processes
Pairs = dict[Case, list[dict[str, Run]]]  # by way


def main() -> None:
    """Measure, print, write."""
    args = _arguments()
    facts = environment(_PACKAGES)
    devices = torch.cuda.device_count()
    facts["device"] = torch.cuda.get_device_name(0) if devices else "CPU"
    plan, repeats = (_QUICK, 2) if args.quick else (_FULL, 5)
    counts = [count for count in (1, 2) if not devices or count <= devices]
    with tempfile.TemporaryDirectory(prefix="glmae-bench-") as scratch:
        store = args.store or str(phantom_store(Path(scratch), people=_PEOPLE))
        tree = merge(read_yaml(args.config), {"store": store})
        pairs = _measure(tree, counts, plan=plan, repeats=repeats, scratch=Path(scratch))
    rows = [row for case, found in pairs.items() for row in _rows(case, found)]
    report("parity", rows=rows, ratios=_ratios(pairs), facts=facts, out=args.out)


def _arguments() -> argparse.Namespace:
    asked = parser((__doc__ or "").splitlines()[0])
    asked.add_argument("--store", help="made of phantoms where none is named")
    asked.add_argument("--config", type=Path, default=shipped("pretrain/demo.yaml"))
    return asked.parse_args()


def _measure(
    tree: dict[str, Any], counts: list[int], *, plan: Plan, repeats: int, scratch: Path
) -> Pairs:
    """Run all ways in turn, the other one first in every second repeat."""
    pairs: Pairs = {(feed, count): [] for feed in FEEDS for count in counts}
    for repeat in range(repeats):
        for (feed, count), found in pairs.items():
            pair = {}
            for way in WAYS if repeat % 2 == 0 else WAYS[::-1]:
                changed = merge(tree, {"resources": {"workers": count}})
                folder = scratch / f"{feed}-{count}-{way}-{repeat}"
                pair[way] = run(way, feed, changed, plan=plan, folder=folder)
                rate = statistics.median(pair[way].rates)
                others = f"others {pair[way].others:.2g} cores"
                print(f"{feed}, {count}, {way}: {rate:.4g} samples/s, {others}", flush=True)
            found.append(pair)
    return pairs


def _rows(case: Case, pairs: list[dict[str, Run]]) -> list[Row]:
    feed, processes = case
    rows = []
    for way in WAYS:
        runs = [pair[way] for pair in pairs]
        row = {
            "feed": feed,
            "processes": processes,
            "way": way,
            "samples/s": spread([rate for run in runs for rate in run.rates]),
            "CPU, s a sample": spread([run.cpu_s_a_sample for run in runs]),
            "others, cores": spread([run.others for run in runs], digits=2),
            "start, s": spread([run.start_s for run in runs], digits=1),
            "loss": round(runs[0].loss, 4),
        }
        if way == OURS:
            row["ours / torchrun, of pairs"] = spread(_pair_ratios(pairs))
        rows.append(row)
    return rows


def _ratios(pairs: Pairs) -> dict[str, float]:
    ratios = {
        f"{feed}, {processes} process{'es' * (processes > 1)}: ours / torchrun": (
            statistics.median(_pair_ratios(found))
        )
        for (feed, processes), found in pairs.items()
    }
    return ratios | {"lowest": min(ratios.values())}


def _pair_ratios(pairs: list[dict[str, Run]]) -> list[float]:
    """Speed of ours over that of torchrun's, each the median over a run's windows."""
    return [
        statistics.median(pair[OURS].rates) / statistics.median(pair[TORCHRUN].rates)
        for pair in pairs
    ]


if __name__ == "__main__":
    main()
