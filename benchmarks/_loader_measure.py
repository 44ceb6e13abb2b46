"""Let a way of loading run in processes of its own, and measure it from outside.

A consumer process opens the way and takes batch after batch. It answers a mark at the end of a
batch, with all that it has taken so far, so that nothing is counted that is not there. Between
two marks the whole tree of processes is left alone; its memory is looked at before and after.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks._loader_data import Task
from benchmarks._loader_processes import Memory, use_cores, used

_WARM_S, _TAIL_S = 1.5, 0.75
_PATIENCE_S = 300.0  # for a batch

Batches = Iterator[Sequence[Tensor]]  # without end; (..., Z, Y, X)


@dataclass(frozen=True)
class Way:
    """A way of loading.

    Attributes:
        open: Does all that comes before the first sample is asked for.
        samples: In a batch.
        processes: How many do the same at once, each for itself.
        cores: That they are kept on, the first of those that there are.
        environment: Variables of those.
        reads: Bytes read for a batch, where system calls do not tell.
    """

    open: Callable[[Task], Batches]
    samples: int = 1
    processes: int = 1
    cores: int = 2
    environment: Mapping[str, str] | None = None
    reads: Callable[[Task], float] | None = None


class Progress(NamedTuple):
    """What a consumer had taken when."""

    at_s: float
    batches: int = 0
    views: int = 0
    bytes: int = 0


class Measured(NamedTuple):
    """Figures of one run; the cold rate is NaN where none was asked for."""

    setup_s: float
    first_batch_s: float
    samples_per_s: float
    views_per_s: float
    cold_samples_per_s: float
    cpu_s_per_view: float
    other_cores: float  # that the rest of the machine kept busy meanwhile
    read_per_byte: float
    peak_mib: float


def measure(
    way: Way, task: Task, *, seconds: float, least: int = 1, cold: bool = False, brief: bool = False
) -> Measured:
    """Run a way.

    Args:
        way: The way.
        task: What it is to deliver.
        seconds: Of the steady state that are measured, at least.
        least: Batches in it, at least.
        cold: Measure the first pass over all cases as well; the caller has dropped the files
            from the cache.
        brief: Measure right behind the first batch, and end there.
    """
    with _consumers(way, task) as crew, Memory(crew.pids) as memory:
        first = crew.mark()
        cold_rate = math.nan
        if cold:
            batches = max(2, math.ceil(len(task.data.images) / way.samples / way.processes))
            cold_rate = way.samples * crew.mark(batches).rate("batches", since=first)
        time.sleep(0 if brief else _WARM_S)
        with memory.unwatched():
            before, used_before = first if brief else crew.mark(), used(crew.pids)
            time.sleep(seconds)
            after, used_after = crew.mark(least, since=before), used(crew.pids)
        if not brief:
            time.sleep(_TAIL_S)
    own = used_after - used_before
    read = own.read_bytes
    if way.reads is not None:
        read = way.reads(task) * (after.total("batches") - before.total("batches"))
    return Measured(
        setup_s=max(crew.setup_s),
        first_batch_s=max(part.at_s for part in first.parts),
        samples_per_s=way.samples * after.rate("batches", since=before),
        views_per_s=after.rate("views", since=before),
        cold_samples_per_s=cold_rate,
        cpu_s_per_view=own.cpu_s / (after.total("views") - before.total("views")),
        other_cores=max(0.0, own.all_cpu_s - own.cpu_s) / own.wall_s,
        read_per_byte=read / (after.total("bytes") - before.total("bytes")),
        peak_mib=memory.peak_bytes / 2**20,
    )


@dataclass(frozen=True)
class Mark:
    """Where each consumer was, each at the end of a batch of its own."""

    parts: list[Progress]

    def total(self, what: str) -> int:
        """Sum over the consumers."""
        return sum(getattr(part, what) for part in self.parts)

    def rate(self, what: str, *, since: Mark) -> float:
        """Sum of the consumers' rates."""
        return sum(
            (getattr(now, what) - getattr(then, what)) / (now.at_s - then.at_s)
            for now, then in zip(self.parts, since.parts, strict=True)
        )


class Crew:
    """The consumers of one way, by their pipes."""

    def __init__(self, pids: list[int], pipes: list[Connection]) -> None:
        self.pids, self._pipes = pids, pipes
        self.setup_s = [float(_answer(pipe)) for pipe in pipes]

    def mark(self, least: int = 1, *, since: Mark | None = None) -> Mark:
        """Let each say where it is, once it has taken that many batches in all, or since a mark."""
        starts = [part.batches for part in since.parts] if since else [0] * len(self._pipes)
        for pipe, start in zip(self._pipes, starts, strict=True):
            pipe.send(start + least)
        return Mark([_answer(pipe) for pipe in self._pipes])

    def dismiss(self) -> None:
        """Ask them to end."""
        for pipe in self._pipes:
            pipe.send(None)  # they end with the next batch


@contextmanager
def _consumers(way: Way, task: Task) -> Iterator[Crew]:
    spawn = multiprocessing.get_context("spawn")
    processes, pipes = [], []
    with NamedTemporaryFile("r") as said:
        for part in range(way.processes):
            here, there = spawn.Pipe()
            share = replace(task, part=part, parts=way.processes)
            arguments = (replace(way, reads=None), share, there, said.name)
            processes.append(spawn.Process(target=_consume, args=arguments))
            pipes.append(here)
            processes[-1].start()
            there.close()
        try:
            crew = Crew([process.pid or 0 for process in processes], pipes)
            yield crew
            crew.dismiss()
            for process in processes:
                process.join(timeout=_PATIENCE_S)
        except (EOFError, OSError):  # one has failed, or has fallen silent
            print(said.read(), file=sys.stderr)
            raise
        finally:
            for process in processes:
                process.kill()
                process.join()


def _answer(pipe: Connection) -> Any:
    if not pipe.poll(_PATIENCE_S):
        raise TimeoutError(f"no batch in {_PATIENCE_S:g} s")
    return pipe.recv()


def _consume(way: Way, task: Task, pipe: Connection, log: str) -> None:
    """Take batches; answer marks; end when told."""
    # Loaders complain when they are ended in the middle of an epoch.
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
    os.environ.update(way.environment or {})
    use_cores(way.cores)
    began = time.monotonic()
    batches = way.open(task)
    opened = time.monotonic()
    pipe.send(opened - began)
    taken, wanted = Progress(0.0), math.inf
    for tensors in batches:
        taken = _added(taken, tensors, at_s=time.monotonic() - opened)
        if wanted == math.inf and pipe.poll():
            wanted = pipe.recv()
            if wanted is None:
                break
        if taken.batches >= wanted:
            pipe.send(taken)
            wanted = math.inf
    if isinstance(batches, Generator):
        batches.close()


def _added(taken: Progress, tensors: Sequence[Tensor], *, at_s: float) -> Progress:
    views = sum(math.prod(tensor.shape[:-3]) for tensor in tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Progress(at_s, taken.batches + 1, taken.views + views, taken.bytes + size)
