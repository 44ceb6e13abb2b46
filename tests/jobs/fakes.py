"""What stands in for engine, workers and Ray, so that faults cost no processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from ray.train.v2.api.preemption import PreemptionInfo

from glmae_ray.jobs import meetings
from glmae_ray.jobs.held_out_views import HeldOutViews
from glmae_ray.jobs.sitting import Sitting
from glmae_ray.loop import StepInfo
from glmae_ray.optim import schedule
from glmae_ray.ranks import Ranks
from glmae_ray.reading import Maker
from glmae_ray.watch import Event
from tests.conftest import tiny_config

ALONE = Ranks(0, 1, 0, None)
_PATIENCE_S = 60.0


class Weights:
    """In the place of an engine: its weights are some bytes."""

    device, zero_stage = torch.device("cpu"), 0

    def __init__(self, content: bytes = b"", *, rank: int = 0) -> None:
        self.content, self._name = content, f"engine/weights-{rank}.pt"

    def snapshot(self) -> dict[str, bytes]:
        return {self._name: self.content}

    def load(self, folder: Path, *, saved_workers: int) -> None:
        self.content = (folder / self._name).read_bytes()
        self.saved_workers = saved_workers

    def gradient_norm(self) -> float:
        return 1.0


class Told(list[Event]):
    """The events that were told."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self]


@dataclass
class _Table:
    """Where threads that play workers lay down their values."""

    size: int
    values: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values = [None] * self.size
        self.barrier = threading.Barrier(self.size, timeout=_PATIENCE_S)


@dataclass
class Thread:
    """`Ranks` of a worker that is a thread."""

    rank: int
    table: _Table
    group: None = None

    @property
    def size(self) -> int:
        return self.table.size

    @property
    def local_rank(self) -> int:
        return self.rank

    def each(self, value: Any) -> list[Any]:
        self.table.values[self.rank] = value
        self.table.barrier.wait()
        found = list(self.table.values)
        self.table.barrier.wait()
        return found

    def told(self, value: Any) -> Any:
        return self.each(value)[0]


def on_threads(size: int, work: Callable[[Thread], Any]) -> list[Any]:
    """What `work` returns on each of so many workers, by rank."""
    table = _Table(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, [Thread(rank, table) for rank in range(size)]))


class Cases:
    """In the place of a `Maker`: three cases, in turn."""

    @property
    def index(self) -> Cases:
        return self

    def case(self, number: int) -> int:
        return number % 3

    def at(self, row: int) -> dict[str, str]:
        return {"case_id": f"case-{row}"}


class Outside:
    """What reaches a worker from outside; put into the place of Ray.

    Attributes:
        stop: Name of a signal that the driver was given.
        resize: Whether Ray waits to change the number of workers.
        notice: Of Ray, that nodes go away.
        notices_asked: How often workers asked for one.
    """

    def __init__(self) -> None:
        self.stop: str | None = None
        self.resize = False
        self.notice: PreemptionInfo | None = None
        self.notices_asked = 0

    def _get_notice(self) -> PreemptionInfo | None:
        self.notices_asked += 1
        return self.notice

    def put_into(self, patch: pytest.MonkeyPatch) -> Outside:
        patch.setattr("ray.train.get_preemption_info", self._get_notice)
        patch.setattr(meetings, "stop_requested", lambda _: self.stop)
        patch.setattr(meetings, "save_wanted", lambda _: self.resize)
        patch.setattr(meetings, "save_done", lambda _: setattr(self, "resize", False))
        return self


# No decoder, so nothing is held out and no store is read; nothing for the eye.
WITHOUT_STORE = (
    *("loss.w_rl=0", "loss.w_rg=0", "log.tensorboard=false", "log.every_steps=1"),
    "resources.hang_s=1e6",  # who watches would end the process of the tests
)


def sit(run: Path, engine: Any, *words: str) -> Sitting:
    """A sitting of one worker that reads no store."""
    cfg = tiny_config(f"run={run}", *WITHOUT_STORE, *words)
    run.mkdir(parents=True, exist_ok=True)
    held_out = HeldOutViews(cfg, engine, ranks=ALONE)
    maker = cast(Maker, Cases())
    return Sitting(cfg, engine, ranks=ALONE, maker=maker, held_out=held_out)


def step_info(step: int, *, skipped: bool = False) -> StepInfo:
    """A step of a worker that did nothing else."""
    loss = torch.tensor(float("nan") if skipped else 1.0 / step)
    values = schedule(step - 1, cfg=tiny_config(f"steps={step}"))
    return StepInfo(step, {"loss": loss}, torch.tensor(float(skipped)), values, 0.1, 0.01)
