"""When the workers of a run agree what to do next: save, stop, or go on.

Signals, notices and clocks reach one worker before another, and no two may act on them at
different steps. So all meet at the same steps, about every two seconds, and do what rank 0 says.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import ray.train

from glmae_ray.config_train import TrainConfig
from glmae_ray.jobs.growing import save_done, save_wanted
from glmae_ray.jobs.stopping import stop_requested
from glmae_ray.ranks import Ranks

_EVERY_S = 2.0
_MARGIN_S = 2.0  # between the end of a late checkpoint and the end of a node


class Orders(NamedTuple):
    """What all workers do after a step.

    Attributes:
        next_meeting: Step after which they meet again.
        save: Whether they save now.
        leaving: Whether they are about to be ended, which is why they save; the write is waited
            for.
        stop: Name of the signal for which they save and end; None: they go on.
    """

    next_meeting: int
    save: bool = False
    leaving: bool = False
    stop: str | None = None


class Meetings:
    """Knows when the next one is; rank 0 also what is to be said there."""

    def __init__(self, cfg: TrainConfig, *, ranks: Ranks, start: int) -> None:
        """Meet first after the first step.

        Args:
            cfg: The run.
            ranks: This worker among the others.
            start: Steps done.
        """
        self._cfg, self._ranks = cfg, ranks
        self._next, self._met_step, self._met = start + 1, start, time.monotonic()
        self._saved = time.monotonic()
        self._save_s: float | None = None
        self._left: set[str] = set()  # nodes for whose end a checkpoint was made
        self._seen: set[str] = set()  # the same, before it was known how long one takes

    def saved(self, *, took_s: float | None) -> None:
        """Take note of a checkpoint, and how long one takes until it is written, if it is known."""
        self._saved, self._save_s = time.monotonic(), took_s

    def saved_and_waited(self) -> None:
        """Let those go on who wait for a checkpoint."""
        if self._ranks.rank == 0:
            save_done(self._cfg.run)

    def after(self, step: int) -> Orders | None:
        """Meet if it is time; what to do. Collective."""
        if step < self._next:
            return None
        notice = ray.train.get_preemption_info()
        orders = self._orders(step, notice) if self._ranks.rank == 0 else None
        told = self._ranks.told(orders)
        assert told is not None
        self._next = told.next_meeting
        return told

    def _orders(self, step: int, notice: ray.train.PreemptionInfo | None) -> Orders:
        now = time.monotonic()
        step_s = (now - self._met) / (step - self._met_step)
        self._met_step, self._met = step, now
        steps = max(1, int(_EVERY_S / max(step_s, 1e-3)))
        stop, resize = stop_requested(self._cfg.run), save_wanted(self._cfg.run)
        late = notice is not None and self._is_late(notice, wait_s=max(_EVERY_S, step_s))
        minutes = self._cfg.save.every_minutes
        due = minutes is not None and now - self._saved >= 60 * minutes
        leaves = late or resize
        return Orders(
            step + steps, save=leaves or due or stop is not None, leaving=leaves, stop=stop
        )

    def _is_late(self, notice: ray.train.PreemptionInfo, *, wait_s: float) -> bool:
        """Whether it is time to save before nodes go away: as late as it is safe, and once."""
        nodes = set(notice.preempted_node_ids)
        if nodes <= self._left:
            return False
        if notice.deadline_ms is not None:
            if self._save_s is None:  # at once, and late again when it is known how long one takes
                is_new, self._seen = not nodes <= self._seen, self._seen | nodes
                return is_new
            left_s = notice.deadline_ms / 1000 - time.time()
            # The next meeting would be too late.
            if left_s > 2 * wait_s + 2 * self._save_s + _MARGIN_S:
                return False
        self._left |= nodes
        return True
