"""The real `glmae ingest` on a Ray of a given size: its speed, its start, its workers' memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil

from glmae_ray.config_store import IngestConfig
from glmae_ray.jobs.ingest import ingest

_WARMING = 0.1  # share of the cases after which every worker has started
_LOOK_S = 0.02  # between two looks at the memory


def run_job(source: Path, store: Path, *, workers: int, watch: bool = False) -> dict[str, float]:
    """Ingest a source into a new store.

    A case ends when its document is published. The steady state lasts from the end of the first
    tenth of the cases, by when each worker has imported what it needs, to the end of the last.

    Returns:
        `ray_start_s`, `first_case_s` (from the call of the job), `cases_per_s` in the steady
        state, and with `watch`, which takes time from the workers, `peak_mb`: the largest memory
        that a worker had of its own, in MiB.
    """
    begin = time.perf_counter()
    with local_ray(workers):
        ray_start_s = time.perf_counter() - begin
        began = time.time()
        with _peak_of_workers() if watch else nullcontext({"bytes": 0}) as peak:
            ingest(IngestConfig(source=str(source), store=str(store)))
        documents = (store / "cases").glob("*/zarr.json")
        ends = sorted(document.stat().st_mtime for document in documents)
    first = int(_WARMING * len(ends))
    steady = len(ends) > first + 1
    return {
        "cases": len(ends),
        "ray_start_s": ray_start_s,
        "first_case_s": ends[0] - began,
        "cases_per_s": (len(ends) - 1 - first) / (ends[-1] - ends[first]) if steady else 0.0,
        "peak_mb": peak["bytes"] / 2**20,
    }


@contextmanager
def local_ray(workers: int) -> Iterator[None]:
    """Have a Ray of that many CPUs inside."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
    import ray

    ray.init(
        address="local",
        num_cpus=workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _peak_of_workers() -> Iterator[dict[str, Any]]:
    """Watch Ray's workers: the largest resident memory that one does not share with others."""
    peak, ended = {"bytes": 0}, threading.Event()

    def watch() -> None:
        me = psutil.Process()
        while not ended.wait(_LOOK_S):
            own = [_own_bytes(process) for process in me.children(recursive=True)]
            peak["bytes"] = max([peak["bytes"], *own])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def _own_bytes(process: psutil.Process) -> int:
    try:
        if not process.name().startswith("ray::"):
            return 0
        memory = process.memory_info()
    except psutil.Error:  # it has ended
        return 0
    return memory.rss - memory.shared
