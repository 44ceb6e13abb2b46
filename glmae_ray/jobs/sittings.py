"""The sittings of a run: each start of its workers, and from which step it went on.

RUN/sittings.jsonl has a line for each; RUN/samples, where `log.samples` asks for it, which samples
every worker of a sitting consumed at which step. The surviving history of a run is, for each
step, what the last sitting did that got there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glmae_ray.config_train import TrainConfig
from glmae_ray.paths import Place, publish, read_file

SITTINGS = "sittings.jsonl"
SAMPLES = "samples"  # folder in the run folder


def read_sittings(run: Place) -> list[dict[str, Any]]:
    """All of them, in order."""
    return [json.loads(line) for line in (read_file(run / SITTINGS) or b"").splitlines()]


def begin_sitting(run: Place, *, start: int, workers: int, checkpoint: str | None) -> int:
    """Write down that one begins; by one process of a run at a time.

    Args:
        run: The run folder.
        start: Steps done.
        workers: How many there are.
        checkpoint: Name of the one that was loaded.

    Returns:
        Its number, from 0.
    """
    known = read_sittings(run)
    facts = {
        "sitting": len(known),
        "time": time.time(),
        "start": start,
        "workers": workers,
        "checkpoint": checkpoint,
    }
    publish(run / SITTINGS, "".join(json.dumps(line) + "\n" for line in [*known, facts]))
    return len(known)


def last_start(run: Place) -> int:
    """The step from which the newest sitting goes on."""
    return int(read_sittings(run)[-1]["start"])


def ledger(
    run: Place, *, cfg: TrainConfig, sitting: int, rank: int
) -> Callable[[int], None] | None:
    """What writes the samples of a worker's step, where `log.samples` asks for it."""
    if not cfg.log.samples:
        return None
    assert isinstance(run, Path)  # a rule of the config refuses a URL
    path = run / SAMPLES / f"{sitting}-rank{rank}.jsonl"
    path.parent.mkdir(exist_ok=True)

    def write(step: int) -> None:
        turns = range((step - 1) * cfg.accumulation, step * cfg.accumulation)
        counted = [turn for turn in turns if cfg.weight_of(turn, rank=rank)]
        samples = [number for turn in counted for number in cfg.samples_of(turn, rank=rank)]
        facts = {
            "sitting": sitting,
            "workers": cfg.workers,
            "rank": rank,
            "step": step,
            "samples": samples,
        }
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    return write
