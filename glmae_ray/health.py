"""Says in words when a run's loss spikes or is no number, from the records it logs.

Every threshold here is a decision of this project. What a momentum teacher can suffer beside is in
`collapse`.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable

from glmae_ray.collapse import Collapse, Finding, Record
from glmae_ray.config import PretrainConfig
from glmae_ray.config_train import TrainConfig
from glmae_ray.watch import Event

PATIENCE = 3  # logged steps in a row before a state is told, or counts as over
# A loss is a spike above the median of the last so many logged ones plus so many times their median
# absolute deviation; below so few nothing is said. Of noise with a normal distribution 10 MAD are
# 6.7 standard deviations, and of a loss that hardly moves a hundredth counts as its deviation.
SPIKE_WINDOW, SPIKE_LEAST, SPIKE_DEVIATIONS, SPIKE_FLOOR = 20, 10, 10.0, 0.01


class Health:
    """Judges the records of a run; remembers what it has told, and the last losses."""

    def __init__(self, cfg: TrainConfig) -> None:
        """Judge records of a run.

        Args:
            cfg: The run; says what the figures can be at most, and which settings to name.
        """
        self._cfg = cfg
        self._checks: dict[str, Callable[[Record], Finding | None]] = {
            "loss_not_finite": self._not_finite,
            "loss_spike": self._spike,
        }
        if isinstance(cfg, PretrainConfig):
            self._checks |= Collapse(cfg).checks
        self._patience = dict.fromkeys(self._checks, PATIENCE) | {"loss_spike": 1}
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._ill = dict.fromkeys(self._checks, 0)  # records in a row
        self._well = dict.fromkeys(self._checks, 0)
        self._told: set[str] = set()

    def judge(self, record: Record) -> list[Event]:
        """What to tell after one more record of a logged step.

        A state is told once it has lasted `PATIENCE` records, a spike at once, and again only
        after `PATIENCE` records without it.

        Args:
            record: As in metrics.jsonl; figures that it lacks are not judged.
        """
        events = []
        for kind, check in self._checks.items():
            finding = check(record)
            self._ill[kind] = self._ill[kind] + 1 if finding else 0
            self._well[kind] = 0 if finding else self._well[kind] + 1
            if self._well[kind] == PATIENCE:
                self._told.discard(kind)
            if finding and self._ill[kind] >= self._patience[kind] and kind not in self._told:
                self._told.add(kind)
                line, facts = finding
                line = f"step {record['step']}: {line}"
                events.append(Event(kind, line, {"step": record["step"], **facts}))
        return events

    def _not_finite(self, record: Record) -> Finding | None:
        names = [name for name in record if name == "loss" or name.startswith("loss_")]
        broken = [name for name in names if not math.isfinite(record[name])]
        if not broken:
            return None
        line = (
            f"{' and '.join(broken)}: not a finite number for {PATIENCE} logged steps; such "
            f"steps are skipped, so the run learns nothing; if that goes on, resume from a "
            f"checkpoint before step {record['step']} with a lower {self._cfg.lr_field} "
            f"({self._rate():g} now), a longer optim.warmup_steps "
            f"({self._cfg.warmup_steps} now) or engine.precision=float32 "
            f"({self._cfg.engine.precision} now), and look at the intensities in the store"
        )
        return line, {"not_finite": broken}

    def _spike(self, record: Record) -> Finding | None:
        """Compares with the losses before; a loss that stays is the usual one after a while."""
        loss = record.get("loss", math.nan)
        if not math.isfinite(loss):
            return None
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < SPIKE_LEAST:
            return None
        median = statistics.median(before)
        spread = statistics.median(abs(value - median) for value in before)
        limit = median + SPIKE_DEVIATIONS * max(spread, SPIKE_FLOOR * abs(median))
        if loss <= limit:
            return None
        optim = self._cfg.optim
        line = (
            f"loss {loss:.4g} is a spike: the last {len(before)} logged ones had the median "
            f"{median:.4g}, and above {limit:.4g} is far from it; one that passes needs nothing; "
            f"where they come again, try a lower {self._cfg.lr_field} ({self._rate():g} now), a "
            f"lower optim.clip ({optim.clip:g} now) or a longer optim.warmup_steps "
            f"({self._cfg.warmup_steps} now)"
        )
        return line, {"loss": loss, "median": median, "limit": limit}

    def _rate(self) -> float:
        """The value of the field that sets the learning rate."""
        section, name = self._cfg.lr_field.split(".")
        return getattr(getattr(self._cfg, section), name)
