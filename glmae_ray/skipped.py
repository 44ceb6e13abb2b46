"""Says in words which step was skipped for a number that is not finite, and on which samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from glmae_ray.config_train import TrainConfig
from glmae_ray.reading import Maker
from glmae_ray.watch import Event

_NAMED = 8  # cases in the line; the event's facts have all of them


def samples_of(step: int, *, rank: int, cfg: TrainConfig) -> list[int]:
    """Numbers of the samples that a rank consumes in a step, the first of which is step 1."""
    turns = range((step - 1) * cfg.accumulation, step * cfg.accumulation)
    return [number for turn in turns for number in cfg.samples_of(turn, rank=rank)]


def skipped_step(
    step: int,
    not_finite: Mapping[int, Sequence[str]],
    *,
    cfg: TrainConfig,
    maker: Maker,
) -> Event:
    """What to tell of a skipped step.

    The cases are those of the plan; an event `stand_in` names a sample that showed another.

    Args:
        step: Which; the first is step 1.
        not_finite: Rank -> its outputs that were not finite, for ranks that had any. Without one
            it was the gradient, and any sample of the step may be the reason.
        cfg: The run.
        maker: That of the samples.
    """
    ranks = sorted(not_finite) or list(range(cfg.workers))
    terms = sorted({name for names in not_finite.values() for name in names})
    numbers = sorted({n for rank in ranks for n in samples_of(step, rank=rank, cfg=cfg)})
    rows = dict.fromkeys(maker.case(number) for number in numbers)
    cases = [str(maker.index.at(row)["case_id"]) for row in rows]
    where = f"on rank {', '.join(map(str, ranks))}"
    what = f"{' and '.join(terms)} {where}" if terms else "the gradient, though no rank's loss,"
    line = (
        f"step {step}: skipped, because {what} was not a finite number; weights, moments, teacher "
        f"and centre are as before it; samples {_shown(numbers)} of {_shown(cases)}; where the "
        f"same case comes again, look at its intensities with glmae inspect or leave it out with "
        f"sampling.where; where others do, try a lower {cfg.lr_field} "
        f"or engine.precision=float32 ({cfg.engine.precision} now)"
    )
    facts = {
        "step": step,
        "samples": numbers,
        "cases": cases,
        "ranks": sorted(not_finite),
        "not_finite": terms or ["gradient"],
    }
    return Event("skipped_step", line, facts)


def _shown(values: Sequence[int] | Sequence[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(values) - _NAMED} more" if len(values) > _NAMED else ""
    return ", ".join(map(str, values[:_NAMED])) + more
