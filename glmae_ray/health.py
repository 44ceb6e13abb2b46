"""Says in words when a run's objective collapses or its loss spikes, from the records it logs.

Every threshold here is a decision of this project: `docs/method.md` lists the collapse that nobody
notices as a trap, and `docs/log.md` has the collapsed runs that the advice comes from.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from glmae_ray.config import PretrainConfig
from glmae_ray.watch import Event

PATIENCE = 3  # logged steps in a row before a state is told, or counts as over
# Of ln K. The teacher's answer tells at most ln K - entropy about a view (mutual information), so
# at 0.99 less than a hundredth of what K prototypes could. Of the six runs in docs/log.md three
# ended above 0.99 and three below 0.92.
NEAR_UNIFORM, NEAR_CERTAIN = 0.99, 0.01
# Of ln K. Below it the student agrees with the teacher, and nothing pulls either elsewhere; early
# in a run a centred teacher may be uniform too, but the student is far from it.
NEAR_AGREEMENT = 0.01
# The last LayerNorm gives a CLS feature size 1 per dimension. 2^-9 is half a step of bfloat16 at 1:
# features that differ less are one answer to a run's arithmetic. Not relative to the first
# values, which a resumed run would not know. Untrained encoders had 0.12 to 0.19 on head-and-neck
# CT, and a run of the demo that recovered had 0.011 at its lowest.
NEAR_CONSTANT = 2.0**-9

# A loss is a spike above the median of the last so many logged ones plus so many times their median
# absolute deviation; below so few nothing is said. Of noise with a normal distribution 10 MAD are
# 6.7 standard deviations, and of a loss that hardly moves a hundredth counts as its deviation.
SPIKE_WINDOW, SPIKE_LEAST, SPIKE_DEVIATIONS, SPIKE_FLOOR = 20, 10, 10.0, 0.01

Record = Mapping[str, Any]
Finding = tuple[str, dict[str, Any]]  # what is the matter in words, and the figures behind it


class Health:
    """Judges the records of a run; remembers what it has told, and the last losses."""

    def __init__(self, cfg: PretrainConfig) -> None:
        """Judge records of a run.

        Args:
            cfg: The run; says what the figures can be at most, and which settings to name.
        """
        self._cfg = cfg
        self._most = math.log(cfg.model.prototypes)
        self._checks: dict[str, Callable[[Record], Finding | None]] = {
            "loss_not_finite": self._not_finite,
            "loss_spike": self._spike,
            "collapsed_to_uniform": self._uniform,
            "collapsed_to_one_answer": self._one_answer,
            "collapsed_features": self._constant_features,
        }
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
        names = ["loss", *(f"loss_{term}" for term in ("rl", "rg", "gg", "gl"))]
        broken = [name for name in names if not math.isfinite(record.get(name, 0.0))]
        if not broken:
            return None
        line = (
            f"{' and '.join(broken)}: not a finite number for {PATIENCE} logged steps; such "
            f"steps are skipped, so the run learns nothing; if that goes on, resume from a "
            f"checkpoint before step {record['step']} with a lower optim.base_lr "
            f"({self._cfg.optim.base_lr:g} now), a longer optim.warmup_steps "
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
            f"where they come again, try a lower optim.base_lr ({optim.base_lr:g} now), a lower "
            f"optim.clip ({optim.clip:g} now) or a longer optim.warmup_steps "
            f"({self._cfg.warmup_steps} now)"
        )
        return line, {"loss": loss, "median": median, "limit": limit}

    def _uniform(self, record: Record) -> Finding | None:
        entropy, divergence = record.get("teacher_entropy"), self._divergence(record)
        if entropy is None or divergence is None:
            return None
        # A figure that is no number is on no side of a threshold.
        if not (entropy >= NEAR_UNIFORM * self._most and divergence <= NEAR_AGREEMENT * self._most):
            return None
        loss = self._cfg.loss
        line = (
            f"the consistency terms have collapsed to uniform: the teacher's entropy is "
            f"{entropy:.3f} of at most {self._most:.3f} (ln {self._cfg.model.prototypes}) and its "
            f"KL to the student {divergence:.4f}, so both give every view every prototype "
            f"alike and learn nothing from one another; try a lower loss.teacher_temperature "
            f"({_range(loss.teacher_temperature)} now), a "
            f"loss.teacher_momentum that fits the length of the run ({loss.teacher_momentum:g} "
            f"now; short ones did better with 0.99 than with 0.98), a higher loss.center_momentum "
            f"({loss.center_momentum:g} now), or a lower weight ({self._weights()} now), so that "
            f"reconstruction leads"
        )
        return line, {"teacher_entropy": entropy, "kl": divergence}

    def _one_answer(self, record: Record) -> Finding | None:
        entropy = record.get("teacher_entropy")
        if entropy is None or not entropy <= NEAR_CERTAIN * self._most:
            return None
        loss = self._cfg.loss
        line = (
            f"the consistency terms have collapsed to one answer: the teacher's entropy is "
            f"{entropy:.4f} of at most {self._most:.3f} (ln {self._cfg.model.prototypes}), so it "
            f"gives all its probability to one prototype and the student copies "
            f"that; try a higher loss.teacher_temperature ({_range(loss.teacher_temperature)} "
            f"now), a lower loss.center_momentum, with which the centre takes back sooner what all "
            f"views share ({loss.center_momentum:g} now), a loss.teacher_momentum nearer 1 "
            f"({loss.teacher_momentum:g} now), a lower weight ({self._weights()} now) or a lower "
            f"optim.base_lr ({self._cfg.optim.base_lr:g} now)"
        )
        return line, {"teacher_entropy": entropy}

    def _constant_features(self, record: Record) -> Finding | None:
        """Only where a consistency term uses CLS: reconstruction alone leaves it free."""
        cfg = self._cfg
        if not cfg.loss.uses_teacher:
            return None
        for kind in cfg.loss.masked_kinds:
            deviation = record.get(f"cls_std_{kind}")
            alone = cfg.micro_batch * getattr(cfg.views, f"{kind}_count") == 1
            if deviation is None or alone or not deviation <= NEAR_CONSTANT:
                continue
            line = (
                f"the CLS features of {kind} views have collapsed: their standard deviation over "
                f"views is {deviation:.2g}, where their size is about 1, so the encoder says the "
                f"same of every view; try a lower weight of the consistency terms "
                f"({self._weights()} now), a lower optim.base_lr ({cfg.optim.base_lr:g} now), or a "
                f"lower loss.teacher_temperature ({_range(cfg.loss.teacher_temperature)} now), and "
                f"look at the pictures: views that are all alike give such features too"
            )
            return line, {f"cls_std_{kind}": deviation}
        return None

    def _divergence(self, record: Record) -> float | None:
        """The larger KL from teacher to student of the terms that are on."""
        found = [record[name] for name in ("kl_gg", "kl_gl") if name in record]
        return max(found, default=None)

    def _weights(self) -> str:
        loss = self._cfg.loss
        on = {"loss.w_gg": loss.w_gg, "loss.w_gl": loss.w_gl}
        return " and ".join(f"{name} {weight:g}" for name, weight in on.items() if weight > 0)


def _range(temperature: tuple[float, float]) -> str:
    cold, warm = temperature
    return f"{cold:g}" if cold == warm else f"{cold:g} to {warm:g}"
