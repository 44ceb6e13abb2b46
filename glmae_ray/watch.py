"""What a worker notices of its batches: cases that others stand in for, and stages that starve."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glmae_ray.config_data import PipelineConfig
from glmae_ray.reading import Maker, fault_texts

Columns = Mapping[str, NDArray[Any]]

_FULL = 0.5  # share of the object store from which on Ray Data waits


class Event(NamedTuple):
    """Something a person should read.

    Attributes:
        kind: `stand_in`, `many_stand_ins`, `slow_batch`, `skipped_step`, or one of
            `glmae_ray/health.py`.
        line: It, in one line.
        facts: JSON values for who counts them.
    """

    kind: str
    line: str
    facts: dict[str, Any]


Tell = Callable[[Event], None]  # takes what a person should read


class Watch:
    """One worker's watch over its batches.

    Attributes:
        samples: How many it was given.
        stand_ins: How many of them are of a case that stands in for another.
    """

    def __init__(
        self,
        maker: Maker,
        *,
        pipeline: PipelineConfig,
        tell: Tell,
        free: Callable[[], Mapping[str, float]],
    ) -> None:
        """Watch batches of a maker.

        Args:
            maker: Knows the cases by their rows.
            pipeline: Patience, and the share of stand-ins that is told.
            tell: Takes each event as it happens.
            free: CPUs and bytes of object store that are free and (`total_...`) there are.
        """
        self.samples, self.stand_ins = 0, 0
        self._maker, self._pipeline, self._tell, self._free = maker, pipeline, tell, free
        self._last_s = (0.0, 0.0)  # of reading and resizing the newest sample
        self._told = 0.0  # the share that was last told

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait for a batch: when it becomes long, the likely reason is told."""
        timer = threading.Timer(self._pipeline.patience_s, self._tell_of_wait)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def take(self, columns: Columns, *, waited_s: float) -> None:
        """Look at a batch's `number`, `case`, `fault` and `made_s` (see `Maker.make`)."""
        self.samples += len(columns["number"])
        for number, case, fault in zip(
            columns["number"].tolist(),
            columns["case"].tolist(),
            fault_texts(columns["fault"]),
            strict=True,
        ):
            if fault:
                self._tell_of_stand_in(number, case, fault)
        made_s = columns["made_s"]
        self._last_s = (float(made_s[-1, 0]), float(made_s[-1, 1]))
        if waited_s > self._pipeline.patience_s:
            stage = starving_stage(made_s, waited_s=waited_s, now=time.time())
            line = f"a batch came after {waited_s:.0f} s; it waited for {stage}"
            self._tell(Event("slow_batch", line, {"waited_s": waited_s, "stage": stage}))

    def _tell_of_stand_in(self, number: int, case: int, fault: str) -> None:
        self.stand_ins += 1
        other = str(self._maker.index.at(case)["case_id"])
        facts = {"sample": number, "stand_in": other, "fault": fault}
        self._tell(Event("stand_in", f"sample {number}: {fault}; {other} stands in", facts))
        share, bound = self.stand_ins / self.samples, self._pipeline.skip_warning
        # Of as many samples as one in which is the bound; again when it has doubled.
        if self.samples * bound >= 1 and share > max(bound, 2 * self._told):
            self._told = share
            line = (
                f"{self.stand_ins} of {self.samples} samples ({share:.1%}) are stand-ins, more "
                f"than pipeline.skip_warning {bound:.1%}; the last: {fault}"
            )
            self._tell(Event("many_stand_ins", line, {"share": share, "fault": fault}))

    def _tell_of_wait(self) -> None:
        free = self._free()
        read_s, resize_s = self._last_s
        line = (
            f"no batch for {self._pipeline.patience_s:.0f} s: {_suspect(free)} (free: "
            f"{free['CPU']:g} of {free['total_CPU']:g} CPUs, "
            f"{free['object_store_memory'] / 1e9:.1f} of "
            f"{free['total_object_store_memory'] / 1e9:.1f} GB of object store; the newest sample "
            f"took {read_s:.1f} s to read and {resize_s:.1f} s to resize)"
        )
        self._tell(Event("slow_batch", line, {"waited_s": self._pipeline.patience_s}))


def starving_stage(made_s: NDArray[np.float64], *, waited_s: float, now: float) -> str:
    """What a batch waited for longest.

    Args:
        made_s: (B, 3): seconds of reading and resizing, and when it was done.
        waited_s: How long the batch was waited for.
        now: In seconds since 1970.
    """
    read_s, resize_s, ready_s = made_s[:, 0].sum(), made_s[:, 1].sum(), now - made_s[:, 2].max()
    if ready_s > waited_s / 2:
        return f"its way from the node that made it {ready_s:.0f} s ago"
    if read_s + resize_s < waited_s / 2:
        return f"a free CPU: making it took {read_s + resize_s:.1f} s"
    if read_s > resize_s:
        return f"the store: reading took {read_s:.1f} s"
    return f"its views: resizing took {resize_s:.1f} s"


def _suspect(free: Mapping[str, float]) -> str:
    if free["object_store_memory"] < (1 - _FULL) * free["total_object_store_memory"]:
        return "the object store is full"
    if free["CPU"] < 1:
        return "no CPU is free, view makers may wait for one"
    return "there are CPUs to make views, the store may be slow"
