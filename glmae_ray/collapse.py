"""Says in words when consistency with a momentum teacher collapses, from the records of a run.

Every threshold here is a decision of this project: `docs/method.md` lists the collapse that nobody
notices as a trap, and `docs/log.md` has the collapsed runs that the advice comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from glmae_ray.config import LossConfig, PretrainConfig

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


Record = Mapping[str, Any]
Finding = tuple[str, dict[str, Any]]  # what is the matter in words, and the figures behind it


class Collapse:
    """The ways in which the objective of a run can stop to teach."""

    def __init__(self, cfg: PretrainConfig) -> None:
        """Know what the figures can be at most, and which settings to name."""
        self._cfg = cfg
        self._most = math.log(cfg.model.prototypes)
        self._weights = _weights(cfg.loss)

    @property
    def checks(self) -> dict[str, Callable[[Record], Finding | None]]:
        """What looks for each kind of event in a record."""
        return {
            "collapsed_to_uniform": self._uniform,
            "collapsed_to_one_answer": self._one_answer,
            "collapsed_features": self._constant_features,
        }

    def _uniform(self, record: Record) -> Finding | None:
        entropy, divergence = record.get("teacher_entropy"), _divergence(record)
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
            f"({loss.center_momentum:g} now), or a lower weight ({self._weights} now), so that "
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
            f"({loss.teacher_momentum:g} now), a lower weight ({self._weights} now) or a lower "
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
                f"({self._weights} now), a lower optim.base_lr ({cfg.optim.base_lr:g} now), or a "
                f"lower loss.teacher_temperature ({_range(cfg.loss.teacher_temperature)} now), and "
                f"look at the pictures: views that are all alike give such features too"
            )
            return line, {f"cls_std_{kind}": deviation}
        return None


def _divergence(record: Record) -> float | None:
    """The larger KL from teacher to student of the terms that are on."""
    found = [record[name] for name in ("kl_gg", "kl_gl") if name in record]
    return max(found, default=None)


def _weights(loss: LossConfig) -> str:
    on = {"loss.w_gg": loss.w_gg, "loss.w_gl": loss.w_gl}
    return " and ".join(f"{name} {weight:g}" for name, weight in on.items() if weight > 0)


def _range(temperature: tuple[float, float]) -> str:
    cold, warm = temperature
    return f"{cold:g}" if cold == warm else f"{cold:g} to {warm:g}"
