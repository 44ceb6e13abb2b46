"""What the scaling benchmark measures: steps of so many workers, and views of one core."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray

from benchmarks._scaling_model import views_per_step
from benchmarks._training import Job, Times, fit
from glmae_ray.config import PretrainConfig
from glmae_ray.config_loading import build, merge
from glmae_ray.samples import sample_maker

MEMORY, VIEWS = FEEDS = ("memory", "views")
WEAK, STRONG = ("weak", "strong")
_FEEDING_S, _FEEDING_WARM_UP = 10.0, 2  # CPU time; samples, which load libraries and compile


@dataclass(frozen=True)
class Case:
    """What a number of workers does.

    Attributes:
        workers: How many.
        global_batch: Samples of a step.
        micro_batch: Of a worker, at a time.
    """

    workers: int
    global_batch: int
    micro_batch: int

    def config(self, tree: dict[str, Any]) -> PretrainConfig:
        """The run."""
        changes = {
            "global_batch": self.global_batch,
            "engine": {"micro_batch": self.micro_batch},
            "resources": {"workers": self.workers},
        }
        return build(PretrainConfig, merge(tree, changes))


@dataclass(frozen=True)
class Effort:
    """How much is measured: times that all is repeated, steps that are timed together, windows."""

    repeats: int
    window: int
    warm_up: int
    windows: int


EFFORTS = {
    "quick": Effort(repeats=2, window=3, warm_up=1, windows=3),
    "full": Effort(repeats=5, window=5, warm_up=2, windows=6),
}
Series = dict[str, list[Case]]  # weak and strong
Found = dict[tuple[Case, str], list[Times]]  # by case and feed, one a repeat


def series(cfg: PretrainConfig, counts: Sequence[int]) -> Series:
    """Weak: every worker keeps its micro-batch. Strong: the global batch stays.

    The micro-batch is the one that the config states, else what is left for each of the most
    workers; strong scaling leaves out counts that do not divide the global batch.
    """
    micro = cfg.engine.micro_batch or max(1, cfg.global_batch // max(counts))
    weak = [Case(count, count * micro, micro) for count in counts]
    parts = {count: min(micro, cfg.global_batch // count) for count in counts}
    strong = [
        Case(count, cfg.global_batch, part)
        for count, part in parts.items()
        if part and cfg.global_batch % (count * part) == 0
    ]
    return {WEAK: weak, STRONG: strong}


def measure(wanted: Series, tree: dict[str, Any], effort: Effort) -> Found:
    """Run all cases in turn, again and again; a case of both series once."""
    cases = list(dict.fromkeys(itertools.chain(*wanted.values())))
    found: Found = {(case, feed): [] for case in cases for feed in FEEDS}
    rounds = asdict(effort)
    for _ in range(rounds.pop("repeats")):
        for (case, feed), times in found.items():
            cfg = case.config(tree).model_dump(mode="json")
            times.append(fit(Job(cfg, feed, threads=1, apart=feed == MEMORY, **rounds)))
            rate = case.global_batch / statistics.median(times[-1].together)
            what = f"{case.workers} workers, batch of {case.global_batch}, {feed}"
            print(f"{what}: {rate:.4g} samples/s", flush=True)
    return found


def feeding_rate(cfg: PretrainConfig) -> float:
    """Views that a core of the cluster makes a second, by CPU time, in a process of its own."""
    task = ray.remote(num_cpus=1, max_calls=1)(_feed)
    return ray.get(task.remote(cfg.model_dump(mode="json")))


def _feed(config: dict[str, Any]) -> float:
    cfg = PretrainConfig.model_validate(config)
    maker = sample_maker(cfg, split="train", kinds=cfg.loss.kinds)
    for number in range(_FEEDING_WARM_UP):
        maker.make({"number": np.array([number])})
    samples, began = 0, time.process_time()
    while time.process_time() - began < _FEEDING_S:
        maker.make({"number": np.array([_FEEDING_WARM_UP + samples])})
        samples += 1
    views = samples * views_per_step(cfg) / (cfg.micro_batch * cfg.accumulation)
    return views / (time.process_time() - began)
