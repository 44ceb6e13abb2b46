"""The runs of the parity benchmark: processes that train, watched from outside.

What counts is when a line comes to stand in RUN/metrics.jsonl, which all write every few steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._loader_processes import Used, used
from glmae_ray.config import PretrainConfig
from glmae_ray.config_loading import build, merge
from glmae_ray.tracking import METRICS, read_metrics

_LOOK_S = 0.01
_PATIENCE_S = 600.0  # for a line

MEMORY, VIEWS = FEEDS = ("memory", "views")
OURS, TORCHRUN = WAYS = ("ours", "torchrun")


@dataclass(frozen=True)
class Plan:
    """How long each run is.

    Attributes:
        window: Steps from line to line.
        warm_up: Lines after which a run counts as steady.
        windows: From line to line after those.
    """

    window: int
    warm_up: int
    windows: int

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.window * (self.warm_up + self.windows)


class Run(NamedTuple):
    """What was seen of a run.

    Attributes:
        start_s: From the start of the process to its first line.
        rates: Samples a second in each window of the steady state.
        cpu_s_a_sample: Of all its processes in the steady state.
        others: Cores that the rest of the machine kept busy meanwhile.
        loss: On the last line, mean over the ranks.
    """

    start_s: float
    rates: list[float]
    cpu_s_a_sample: float
    others: float
    loss: float


def run(way: str, feed: str, tree: dict[str, Any], *, plan: Plan, folder: Path) -> Run:
    """Train in new processes.

    Args:
        way: `ours` or `torchrun`.
        feed: `memory` or `views`.
        tree: Of the config, without what a plan decides.
        plan: How long.
        folder: New; for config, run and what the processes say.

    Raises:
        RuntimeError: They failed.
    """
    folder.mkdir()
    tree = merge(tree, _quiet(plan, run=folder / "run"))
    cfg = build(PretrainConfig, tree)
    (folder / "config.yaml").write_text(json.dumps(tree))  # JSON is YAML too
    said, environment = folder / "said.txt", _environment()
    with said.open("w") as file:
        began = time.monotonic()
        process = subprocess.Popen(
            _command(way, feed, cfg, folder), env=environment, stdout=file, stderr=file
        )
        try:
            lines = _watch(process, Path(cfg.run), plan)
            process.wait(timeout=_PATIENCE_S)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            raise RuntimeError(f"{way}, {feed}: {error}; {said.read_text()[-4000:]}") from None
        finally:
            process.terminate()
            process.wait()
    return _seen(cfg, lines, began=began, plan=plan)


def _quiet(plan: Plan, *, run: Path) -> dict[str, Any]:
    """Fields that leave a run with nothing to do but to train and to write its lines."""
    never = {"every_steps": 10**9}
    log = {"every_steps": plan.window, "tensorboard": False, "pictures": False}
    steps = {"steps": plan.steps, "optim": {"warmup_steps": 1}}
    return {"run": str(run), **steps, "save": never, "validation": never, "log": log}


def _environment() -> dict[str, str]:
    """Ray of its own on this machine, and no threads but those that torch is told of."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**kept, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


def _command(way: str, feed: str, cfg: PretrainConfig, folder: Path) -> Sequence[str]:
    config, workers = str(folder / "config.yaml"), cfg.resources.workers
    if (way, feed) == (OURS, VIEWS):
        return [sys.executable, "-m", "glmae_ray.cli", "pretrain", config]
    Path(cfg.run).mkdir()
    if way == OURS:
        return [sys.executable, "-m", "benchmarks._parity_ours", config]
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    script = ["-m", "benchmarks._torchrun_loop", config, feed, str(_loaders(workers))]
    return [sys.executable, "-m", *launch, *script]


def _loaders(ranks: int) -> int:
    """Processes of each rank's DataLoader: the CPUs that ours has for its makers, one at least."""
    import torch

    each = 1.0 if torch.cuda.is_available() else 0.5
    return max(1, int(((os.cpu_count() or 1) - ranks * each) / ranks))


class _Line(NamedTuple):
    at_s: float
    used: Used
    loss: float


def _watch(process: subprocess.Popen, run: Path, plan: Plan) -> list[_Line]:
    """Wait for the lines; what was used is looked up at the ends of the steady state only."""
    lines: list[_Line] = []
    wanted, seen, asked = plan.warm_up + plan.windows, -1, time.monotonic()
    nothing = Used(0, 0, 0, 0)
    while len(lines) < wanted:
        time.sleep(_LOOK_S)
        size = _size(run / METRICS)
        if size == seen:
            if process.poll() is not None:
                raise RuntimeError(f"ended with {process.returncode}")
            if time.monotonic() - asked > _PATIENCE_S:
                raise RuntimeError(f"no line in {_PATIENCE_S:g} s")
            continue
        seen, now = size, time.monotonic()
        records = [record for record in read_metrics(run) if "loss" in record]
        for record in records[len(lines) :]:
            asked, count = now, len(lines) + 1
            at_end = count in (plan.warm_up, wanted)
            lines.append(_Line(now, used([process.pid]) if at_end else nothing, record["loss"]))
    return lines


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _seen(cfg: PretrainConfig, lines: list[_Line], *, began: float, plan: Plan) -> Run:
    steady = lines[plan.warm_up - 1 :]
    samples = plan.window * cfg.global_batch
    own = steady[-1].used - steady[0].used
    seconds = [after.at_s - before.at_s for before, after in pairwise(steady)]
    return Run(
        start_s=lines[0].at_s - began,
        rates=[samples / second for second in seconds],
        cpu_s_a_sample=own.cpu_s / (samples * plan.windows),
        others=max(0.0, own.all_cpu_s - own.cpu_s) / own.wall_s,
        loss=lines[-1].loss,
    )
