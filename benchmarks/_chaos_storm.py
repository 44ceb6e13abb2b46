"""What befalls a run on a cluster, and what it costs until the run goes on."""

from __future__ import annotations

import random
import threading
import time
from typing import Any, Self

import psutil

from benchmarks._chaos_cores import OtherCores
from tests.jobs.loopback_cluster import LoopbackCluster, Node, session
from tests.jobs.watched_run import Look, WatchedRun

_GRACE_S = 15.0  # between a notice and the end of a node
_SETTLED = 3  # steps of a sitting before the next event
_PATIENCE_S = 300.0
_LOOK_S = 0.1


class Storm:
    """Lets one event after the other happen to a run."""

    def __init__(self, cluster: LoopbackCluster, run: WatchedRun, *, rng: random.Random) -> None:
        """Take a cluster and a run that has not started.

        Args:
            cluster: Where the run is.
            run: Elastic, so that it outlives every event.
            rng: Chooses workers and nodes.
        """
        self._cluster, self._run, self._rng = cluster, run, rng
        self._taken: threading.Timer | None = None  # takes a drained node
        self._others = OtherCores(self._own)
        self._kinds = {
            "worker killed": self._kill_worker,
            "node killed": lambda: cluster.kill_node(self._node()),
            "node drained": self._drain_node,
            "node added": cluster.add_node,
            "driver killed": self._kill_driver,
        }

    def __enter__(self) -> Self:
        self._run.start()
        self._others.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._taken is not None:
            self._taken.join()
        self._run.stop()

    def wait_for_calm(self, step: int) -> None:
        """Until a step is done, by a sitting that has done a few, and no node is on notice."""
        if self._taken is not None:
            self._taken.join()
            self._taken = None
        self._run.wait_for(step=step, timeout_s=_PATIENCE_S)
        while (now := self._run.look()).step < now.start + _SETTLED:
            self._run.wait_for(step=now.step + 1, timeout_s=_PATIENCE_S)

    def happen(self, kind: str) -> dict[str, Any]:
        """Let an event happen, and wait until the next sitting has done a step.

        Returns:
            A row: what it cost; `sittings`, the numbers of the one before and the one after.
        """
        before, began, mark = self._run.look(), time.time(), self._others.mark()
        self._kinds[kind]()
        last, after = self._watch(before)
        resumed = self._run.time_of(after.start + 1)
        return {
            "event": kind,
            "step": before.step,
            "workers": f"{before.workers} -> {after.workers}",
            "outage, s": round(resumed - began, 1),
            "standstill, s": round(resumed - last.time, 1),
            "others, cores": round(self._others.since(mark), 2),
            "sittings": (before.sitting, after.sitting),
        }

    def _watch(self, before: Look) -> tuple[Look, Look]:
        """The last look at the sitting that was, and the first at the one that came."""
        until, last = time.monotonic() + _PATIENCE_S, before
        while (now := self._run.look()).sitting <= before.sitting:
            if now.time > last.time:
                last = now
            if time.monotonic() > until or self._run.has_ended():
                raise RuntimeError(f"the run does not go on: {self._run.said()[-3000:]}")
            time.sleep(_LOOK_S)
        return last, now

    def _own(self) -> list[psutil.Process]:
        driver = self._run.driver
        return self._cluster.processes() + ([] if driver is None else session(driver.pid))

    def _kill_worker(self) -> None:
        self._rng.choice(self._cluster.workers()).kill()

    def _kill_driver(self) -> None:
        self._run.stop()
        self._run.start()

    def _drain_node(self) -> None:
        node = self._node()
        self._cluster.drain_node(node, grace_s=_GRACE_S)
        self._taken = threading.Timer(_GRACE_S, self._cluster.kill_node, [node])
        self._taken.start()

    def _node(self) -> Node:
        """One with a worker on it."""
        return self._rng.choice([node for node in self._cluster.nodes if node.workers()])
