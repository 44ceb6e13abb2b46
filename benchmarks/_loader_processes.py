"""What trees of processes use: CPU, memory, bytes read; and which files the page cache holds."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Self

import psutil

_LOOK_S = 0.25
_PAGE = 4096
_OWN = ("Pss_Anon:", "Pss_Shmem:")


def use_cores(count: int) -> None:
    """Keep this process, and all that it starts from now on, on the first cores that it has."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


class Used(NamedTuple):
    """What has been used so far; the difference of two is what was used in between.

    Attributes:
        wall_s: Time of the clock.
        cpu_s: User and system time of the processes, ended and waited for ones included.
        all_cpu_s: The same of the whole machine, and what its host took away.
        read_bytes: What the processes read by system calls, from the cache or not; pages of
            mapped files are no part.
    """

    wall_s: float
    cpu_s: float
    all_cpu_s: float
    read_bytes: float

    def __sub__(self, before: Used) -> Used:
        return Used(*(now - then for now, then in zip(self, before, strict=True)))


def used(pids: Sequence[int]) -> Used:
    """What trees of processes have used."""
    return Used(
        wall_s=time.monotonic(),
        cpu_s=_sum(pids, lambda process: sum(process.cpu_times()[:4])),
        all_cpu_s=_busy_seconds(),
        read_bytes=_sum(pids, lambda process: float(process.io_counters().read_chars)),
    )


class Memory:
    """Watch trees of processes: the most memory that they held at once.

    That is anonymous and shared memory, where processes share it in equal parts. Pages of files,
    mapped or cached, are left out: the system takes them back when it needs them.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self.peak_bytes = 0.0
        self._pids = pids
        self._ended, self._watching = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._watching.set()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watching.set()
        self._thread.join()

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Look away: a look takes time of the processes."""
        self._watching.clear()
        yield
        self._watching.set()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            self.peak_bytes = max(self.peak_bytes, _sum(self._pids, _own_bytes))
            self._watching.wait()


def drop_from_cache(files: Iterable[Path]) -> bool:
    """Make the system forget the content of files; whether it did."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if _is_cached(file.fileno()):
                return False
    return True


def _is_cached(descriptor: int) -> bool:
    """Whether the first page of a file is in memory."""
    try:
        return bool(os.preadv(descriptor, [bytearray(_PAGE)], 0, os.RWF_NOWAIT))
    except BlockingIOError:
        return False


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal


def _sum(pids: Sequence[int], figure: Callable[[psutil.Process], float]) -> float:
    """A figure of each process of the trees, summed."""
    roots = [psutil.Process(pid) for pid in pids]
    total = 0.0
    for process in [*roots, *(child for root in roots for child in root.children(recursive=True))]:
        with suppress(psutil.Error, OSError):  # it has ended
            total += figure(process)
    return total


def _own_bytes(process: psutil.Process) -> float:
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(_OWN))
