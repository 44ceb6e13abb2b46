"""What stands in for engine and workers, so that faults cost no Ray and no processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from glmae_ray.ranks import Ranks
from glmae_ray.watch import Event

ALONE = Ranks(0, 1, 0, None)
_PATIENCE_S = 60.0


class Weights:
    """In the place of an engine: its weights are some bytes."""

    device = torch.device("cpu")

    def __init__(self, content: bytes = b"", *, rank: int = 0) -> None:
        self.content, self._name = content, f"engine/weights-{rank}.pt"

    def snapshot(self) -> dict[str, bytes]:
        return {self._name: self.content}

    def load(self, folder: Path) -> None:
        self.content = (folder / self._name).read_bytes()

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
