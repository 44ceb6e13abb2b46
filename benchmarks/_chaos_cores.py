"""How busy the rest of the machine is while processes of ours come and go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import psutil

_LOOK_S = 1.0


class Mark(NamedTuple):
    """A moment: the clock, and seconds of CPU so far, of the whole machine and of ours."""

    clock_s: float
    all_cpu_s: float
    own_cpu_s: float


class OtherCores:
    """Looks at our processes every second, because what a killed one has used is lost with it."""

    def __init__(self, own: Callable[[], list[psutil.Process]]) -> None:
        """Take what lists our processes that run."""
        self._own = own
        self._used: dict[tuple[int, float], float] = {}  # pid and start of a process -> CPU seconds
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin to look, as long as this process runs."""
        threading.Thread(target=self._watch, daemon=True).start()

    def mark(self) -> Mark:
        """Now."""
        own = self._look()
        times = psutil.cpu_times()
        busy = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
        return Mark(time.monotonic(), busy, own)

    def since(self, before: Mark) -> float:
        """Cores that others have kept busy on average since then."""
        now = self.mark()
        others = (now.all_cpu_s - before.all_cpu_s) - (now.own_cpu_s - before.own_cpu_s)
        return max(0.0, others) / (now.clock_s - before.clock_s)

    def _watch(self) -> None:
        while True:
            self._look()
            time.sleep(_LOOK_S)

    def _look(self) -> float:
        """Seconds of CPU that ours have used so far."""
        with self._lock:
            for process in self._own():
                with suppress(psutil.Error):
                    used = process.cpu_times()
                    key = (process.pid, process.create_time())
                    self._used[key] = used.user + used.system
            return sum(self._used.values())
