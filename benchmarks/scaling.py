"""What do more workers gain, measured here, and what would they gain on many GPUs?

    python -m benchmarks.scaling [--quick] [--workers 1,2,4] [--config FILE.yaml] [--store STORE]
                                 [--predict FILE.yaml] --out FILE.json

Weak scaling: each worker keeps its micro-batch. Strong: the global batch of the config stays. Views
come from memory, which is what counts here, and beside it from the store through Ray Data. Joins
the cluster that RAY_ADDRESS names, one GPU a worker where it has GPUs; the store has then to be one
that every node reaches. Every worker computes with one thread, so that on CPUs 1 and 2 workers
compare. Where cores are fewer than workers, their threads and the makers of views, as on 2 cores,
weak scaling measures what a second worker costs the first (memory, caches, Ray's own processes),
not what a second machine gains.

In the same run each worker times the same steps without exchange, and an all-reduce of as many
numbers as have gradients. benchmarks/_scaling_model.py predicts from both the step that was
measured; and, from assumptions that the table states, steps of `--predict` on clusters. There the
limit by feeding comes from the views that one core of this run makes a second.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray

from benchmarks._report import environment, parser, report
from benchmarks._scaling_measure import EFFORTS, feeding_rate, measure, series
from benchmarks._scaling_rows import measured_rows, prediction_rows, ratios
from benchmarks._stores import clinical_store, phantom_store
from glmae_ray.config import PretrainConfig, RayConfig
from glmae_ray.config_loading import build, merge, read_yaml, shipped
from glmae_ray.jobs.ray_session import ray_session

_PACKAGES = ["torch", "deepspeed", "ray", "numpy"]
_PEOPLE = 6
_CLINICAL = {"cases": 2, "slices": 200}


def main() -> None:
    """Measure, print, write."""
    args = _arguments()
    facts = environment(_PACKAGES)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="glmae-bench-")))
        # What makes a store starts a Ray of its own.
        store = args.store or str(phantom_store(scratch, people=_PEOPLE))
        large = args.store or str(clinical_store(scratch, **_CLINICAL))
        stack.enter_context(ray_session(RayConfig()))
        facts |= _cluster(max(args.workers))
        tree = merge(read_yaml(args.config), {"store": store, "run": "", "steps": 10**6})
        target = build(PretrainConfig, merge(read_yaml(args.predict), {"store": large, "run": ""}))
        views_per_s = feeding_rate(target)
        wanted = series(build(PretrainConfig, tree), args.workers)
        found = measure(wanted, tree, EFFORTS["quick" if args.quick else "full"])
    rows = measured_rows(wanted, tree, found)
    # Steps of the accelerators themselves, where they did what is predicted.
    known = rows if facts["GPUs"] and args.predict == args.config else []
    report(
        "scaling",
        rows=[*rows, *prediction_rows(target, views_per_s=views_per_s, known=known)],
        ratios=ratios(rows),
        facts=facts,
        out=args.out,
    )


def _arguments() -> argparse.Namespace:
    asked = parser((__doc__ or "").splitlines()[0])
    asked.add_argument("--workers", type=_counts, default=(1, 2), help="such as 1,2,4,8")
    asked.add_argument("--store", help="made of phantoms where none is named")
    asked.add_argument("--config", type=Path, default=shipped("pretrain/demo.yaml"))
    asked.add_argument("--predict", type=Path, default=shipped("pretrain/base.yaml"))
    return asked.parse_args()


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({int(count) for count in text.split(",")}))


def _cluster(most: int) -> dict[str, Any]:
    """What Ray has; ends the benchmark where that is not enough for so many workers."""
    has = ray.cluster_resources()
    gpus, cpus = (int(has.get(name, 0)) for name in ("GPU", "CPU"))
    nodes = sum(node["Alive"] for node in ray.nodes())
    # A worker takes half a CPU where there are no GPUs, and makers of views one at least.
    if not (most <= gpus if gpus else most / 2 + 1 <= cpus):
        raise SystemExit(f"--workers: {most} are more than {gpus} GPUs and {cpus} CPUs can run")
    kinds = sorted(name for name in has if name.startswith("accelerator_type:"))
    return {"nodes": nodes, "CPUs": cpus, "GPUs": gpus, "accelerators": kinds, "threads": 1}


if __name__ == "__main__":
    main()
