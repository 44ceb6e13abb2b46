"""One record for the steps since the last: values of the newest step, times of all of them."""

from __future__ import annotations

import time

import psutil
import torch

from glmae_ray.config_train import TrainConfig
from glmae_ray.engine import Engine
from glmae_ray.health import Health
from glmae_ray.jobs.operator_metrics import OperatorMetrics
from glmae_ray.loop import StepInfo, mean_over_workers, not_finite_outputs
from glmae_ray.reading import Maker
from glmae_ray.skipped import skipped_step
from glmae_ray.tracking import Record, RunLog
from glmae_ray.watch import Event


class Interval:
    """Collects steps until they are logged."""

    def __init__(self, cfg: TrainConfig, *, log: RunLog | None, metrics: OperatorMetrics) -> None:
        """Begin with no step.

        Args:
            cfg: The run, on as many workers as there are.
            log: Takes the records; rank 0 has one.
            metrics: Take of them what operators see.
        """
        self._cfg, self._log, self._metrics = cfg, log, metrics
        self._health = Health(cfg)
        self._steps: list[StepInfo] = []
        self._first_wait_s: float | None = None
        self._peak_memory = 0
        self._skips_in_a_row = 0

    @property
    def skips_in_a_row(self) -> int:
        """Steps that were skipped up to the last one that was logged."""
        return self._skips_in_a_row

    def forget_skips(self) -> None:
        """Count skipped steps from 0 again."""
        self._skips_in_a_row = 0

    def add(self, info: StepInfo) -> None:
        """Take one more step; waits for nothing."""
        self._steps.append(info)

    def write(self, engine: Engine, *, maker: Maker) -> list[Event]:
        """Write the record, and begin anew. Collective; waits for the device.

        Returns:
            What a person should read; only rank 0 knows.
        """
        steps, self._steps = self._steps, []
        skipped = torch.stack([s.skipped for s in steps])
        outputs = mean_over_workers(steps[-1].outputs)
        outputs["skipped_steps"] = self._count_skipped(skipped.tolist())
        gradient_norm = engine.gradient_norm()
        events = self._name_skipped(steps, maker) if outputs["skipped_steps"] else []
        if self._log is None:
            return []
        record: Record = {
            "step": steps[-1].step,
            "samples": steps[-1].step * self._cfg.global_batch,
            "time": time.time(),
            "workers": self._cfg.workers,
        }
        record |= self._times(steps) | outputs | steps[-1].schedule.named()
        self._peak_memory = max(self._peak_memory, memory(engine.device))
        record |= {"gradient_norm": gradient_norm, "peak_memory_bytes": self._peak_memory}
        self._log.write(record)
        self._metrics.logged(record)
        return [*events, *self._health.judge(record)]

    def _times(self, steps: list[StepInfo]) -> Record:
        interval_s, wait_s = sum(s.step_s for s in steps), sum(s.wait_s for s in steps)
        record: Record = {}
        if self._first_wait_s is None:
            # The first batch waits for Ray Data to start, which says nothing about its rate.
            self._first_wait_s = steps[0].wait_s
            record["first_batch_s"] = self._first_wait_s
            interval_s, wait_s = interval_s - self._first_wait_s, wait_s - self._first_wait_s
        samples = len(steps) * self._cfg.global_batch
        return record | {
            "interval_steps": len(steps),
            "interval_samples": samples,
            "interval_s": interval_s,
            "data_wait_s": wait_s,
            "data_wait_share": wait_s / interval_s,
            "samples_per_s": samples / interval_s,
        }

    def _count_skipped(self, flags: list[float]) -> int:
        for flag in flags:
            self._skips_in_a_row = self._skips_in_a_row + 1 if flag else 0
        return int(sum(flags))

    def _name_skipped(self, steps: list[StepInfo], maker: Maker) -> list[Event]:
        """An event a skipped step. Collective."""
        return [
            skipped_step(step, not_finite, cfg=self._cfg, maker=maker)
            for step, not_finite in not_finite_outputs(steps).items()
        ]


def memory(device: torch.device) -> int:
    """Bytes that this worker holds: the device's peak on CUDA, else its own resident memory now.

    Shared pages are left out: they are Ray's object store, which a worker maps bit by bit, and
    would look like a leak.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    own = psutil.Process().memory_info()
    return own.rss - own.shared
