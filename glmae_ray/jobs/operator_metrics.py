"""What operators see of a run: figures that each node offers to Prometheus, through Ray.

Ray puts `ray_` before the names, adds labels of its own, and sends what has been counted every 10 s
and when a worker ends; what a worker counts in the last seconds before a SIGKILL is lost. Where
there is no Ray nothing is sent.
"""

from __future__ import annotations

from typing import TypeVar

from ray.util.metrics import Counter, Gauge, Histogram, Metric

from glmae_ray.config import PretrainConfig
from glmae_ray.config_train import TrainConfig
from glmae_ray.jobs.saving import Saved
from glmae_ray.journal import Record
from glmae_ray.loop import StepInfo
from glmae_ray.paths import to_place

_RUN = ("verb", "run")  # not `job`, which Prometheus sets itself
_RANK = (*_RUN, "rank")
# From a toy's step to the longest that `resources.hang_s` lets pass by default.
_STEP_BUCKETS_S = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800]

AnyMetric = TypeVar("AnyMetric", bound=Metric)


class OperatorMetrics:
    """One worker's figures; those that have no label `rank` come from rank 0, for all.

    Of a histogram Ray rebuilds the sum from the middles of its buckets, so what is to be exact is
    a counter of seconds.
    """

    def __init__(self, cfg: TrainConfig, *, rank: int) -> None:
        """Name them.

        Args:
            cfg: The run; the name of its folder is the label `run`.
            rank: Of this worker.
        """
        verb = "pretrain" if isinstance(cfg, PretrainConfig) else "finetune"
        self._tags = {"verb": verb, "run": to_place(cfg.run).name, "rank": str(rank)}
        self._cfg, self._leads = cfg, rank == 0
        self._shown: dict[Gauge, float] = {}
        self._samples = self._of_run(Counter, "samples_total", "Samples that steps consumed.")
        self._skipped = self._of_run(
            Counter, "skipped_samples_total", "Samples of steps with a number that is not finite."
        )
        self._restarts = self._of_run(Counter, "restarts_total", "Starts of workers but the first.")
        self._step = self._of_run(Gauge, "step", "Newest step.")
        self._planned = self._of_run(Gauge, "planned_steps", "Steps of the whole run.")
        self._loss = self._of_run(Gauge, "loss", "Loss of the newest logged step.")
        self._saves = self._of_run(Counter, "checkpoints_total", "Checkpoints begun.")
        self._held_s = self._of_run(
            Counter,
            "checkpoint_seconds_total",
            "Seconds that training stood still for checkpoints.",
        )
        self._written_s = self._of_run(
            Gauge, "checkpoint_write_seconds", "Seconds of the last write, beside training or not."
        )
        self._step_s = self._own(Counter("glmae_step_seconds_total", "Seconds of steps.", _RANK))
        self._wait_s = self._own(
            Counter("glmae_data_wait_seconds_total", "Seconds of steps waiting for data.", _RANK)
        )
        self._step_times = self._own(
            Histogram("glmae_step_duration_seconds", "Seconds of a step.", _STEP_BUCKETS_S, _RANK)
        )
        self._events = self._own(
            Counter("glmae_events_total", "Events, by kind.", (*_RANK, "kind"))
        )

    def begin(self, sitting: int) -> None:
        """The workers have started; the first sitting of a run is 0."""
        if self._leads:
            self._show(self._planned, self._cfg.steps)
            if sitting:
                self._restarts.inc()

    def step(self, info: StepInfo) -> None:
        """A step is done; waits for no device."""
        if self._leads:
            self._samples.inc(self._cfg.global_batch)
            self._show(self._step, info.step)
        self._step_s.inc(info.step_s)
        self._wait_s.inc(info.wait_s)
        self._step_times.observe(info.step_s)

    def logged(self, record: Record) -> None:
        """Rank 0 has written a record of steps."""
        self._show(self._loss, record["loss"])
        if skipped := record["skipped_steps"]:
            self._skipped.inc(skipped * self._cfg.global_batch)

    def saved(self, saved: Saved) -> None:
        """A snapshot was taken."""
        if self._leads:
            self._saves.inc()
            self._held_s.inc(saved.held_s)
            if saved.written_s is not None:
                self._show(self._written_s, saved.written_s)

    def _show(self, gauge: Gauge, value: float) -> None:
        """Have a gauge say something; again at each step, as Ray forgets what is not said again."""
        self._shown[gauge] = value
        for known, newest in self._shown.items():
            known.set(newest)

    def event(self, kind: str) -> None:
        """Something was told."""
        self._events.inc(tags={"kind": kind})

    def _of_run(self, kind: type[AnyMetric], name: str, description: str) -> AnyMetric:
        return self._own(kind(f"glmae_{name}", description, _RUN))

    def _own(self, metric: AnyMetric) -> AnyMetric:
        """The same, with this worker's values of its labels."""
        names = metric.info["tag_keys"]
        metric.set_default_tags({k: v for k, v in self._tags.items() if k in names})
        return metric
