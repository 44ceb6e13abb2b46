"""Ends a worker group whose step does not end, and says which rank the others wait for.

A thread in each worker looks at how long ago the last step was done. Past the limit it posts where
its own training thread stands; ranks that stand in a collective wait for one that does not, or
that posts nothing because its whole process stands still.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any

from ray.experimental import internal_kv

from glmae_ray.ranks import Ranks
from glmae_ray.watch import Event, Tell

_NAMESPACE = b"glmae-hang"
_OTHERS_S = 10.0  # in which every rank that can has posted
_COLLECTIVE = ("/torch/distributed/", "/deepspeed/comm/")


class HangWatch:
    """One worker's; `beat` tells it that the run moves."""

    def __init__(self, run: str, *, ranks: Ranks, limit_s: float, tell: Tell) -> None:
        """Watch nothing until the first beat.

        Args:
            run: Which run.
            ranks: This worker among the others.
            limit_s: Seconds between two beats that are a hang.
            tell: Takes the event.
        """
        self._key = f"{run}|{ranks.told(time.time_ns())}|"
        self._ranks, self._limit_s, self._tell = ranks, limit_s, tell
        self._trains = threading.get_ident()
        self._beat: tuple[int, float] | None = None
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="hang").start()

    def beat(self, step: int) -> None:
        """So many steps are done."""
        self._beat = (step, time.monotonic())

    def close(self) -> None:
        """Watch no longer."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._limit_s / 4)):
            if self._beat is not None and time.monotonic() - self._beat[1] > self._limit_s:
                self._end(self._beat[0])

    def _end(self, step: int) -> None:
        try:
            if self._is_over_before_all_told(step):
                return
        except Exception:  # of Ray, or of the disk: the process has to end all the same
            traceback.print_exc()
        os._exit(1)  # the training thread may stand where no exception reaches it

    def _is_over_before_all_told(self, step: int) -> bool:
        """Tell where each rank stands, or that this worker ended in the meantime."""
        self._post(json.dumps(place_of(self._trains)))
        if self._over.wait(min(_OTHERS_S, self._limit_s)):
            return True
        posts = {rank: found for rank in range(self._ranks.size) if (found := self._read(rank))}
        if self._ranks.rank == min(posts):
            self._tell(hang_event(step, posts, ranks=self._ranks.size, limit_s=self._limit_s))
        return False

    def _post(self, text: str) -> None:
        key = f"{self._key}{self._ranks.rank}".encode()
        internal_kv._internal_kv_put(key, text.encode(), True, namespace=_NAMESPACE)

    def _read(self, rank: int) -> dict[str, Any] | None:
        found = internal_kv._internal_kv_get(f"{self._key}{rank}".encode(), namespace=_NAMESPACE)
        return None if found is None else json.loads(found)


def place_of(thread: int) -> dict[str, Any]:
    """Where a thread of this process stands: `line` of ours, and whether in a `collective`."""
    frames = traceback.extract_stack(sys._current_frames()[thread])
    ours = [frame for frame in frames if "/glmae_ray/" in frame.filename] or frames
    last, top = ours[-1], frames[-1]
    return {
        "line": f"{last.name} ({os.path.basename(last.filename)}:{last.lineno}), in {top.name}",
        "collective": any(part in f.filename for f in frames for part in _COLLECTIVE),
    }


def hang_event(
    step: int, posts: Mapping[int, Mapping[str, Any]], *, ranks: int, limit_s: float
) -> Event:
    """What to tell of a hang.

    Args:
        step: Steps done.
        posts: Rank -> where it stands, of those that told.
        ranks: How many there are.
        limit_s: How long a step may take.
    """
    silent = [rank for rank in range(ranks) if rank not in posts]
    apart = [rank for rank, post in posts.items() if not post["collective"]]
    where = [f"rank {rank} is in {posts[rank]['line']}" for rank in apart]
    where += [f"rank {rank} does not answer" for rank in silent]
    waited_for = sorted(silent + apart)
    what = "; ".join(where) or "every rank waits in a collective: look at the network between them"
    line = (
        f"step {step + 1}: not done after {limit_s:g} s (resources.hang_s): {what}; the workers "
        "start again from the newest checkpoint"
    )
    facts = {"step": step, "ranks": waited_for, "places": {str(r): posts[r] for r in posts}}
    return Event("hang", line, facts)
