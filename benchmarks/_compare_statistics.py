"""From the scores of every evaluation to figures, differences, and what their intervals cover.

The figure of a cell (arm and label fraction) is that of `glmae evaluate`, the mean over structures
of means over cases, averaged over seeds. Its interval is over resamplings of the test cases, the
same for all seeds. A difference of two arms is taken between the same cases and the same seeds,
resampled both, independently of each other (Owen 2007, the pigeonhole bootstrap).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glmae_ray.scores import (
    FIGURES,
    Score,
    intervals,
    means_over,
    named_figures,
    resamplings,
    score_table,
)

Scores = Mapping[str, Mapping[str, Score | None]]  # by case and structure
Values = NDArray[np.float64]  # (seeds, cases, structures, figures), NaN where not counted


class Draws(NamedTuple):
    """Resamplings: how often each counts, (times, cases) and (times, seeds)."""

    cases: NDArray[np.int64]
    seeds: NDArray[np.int64]


class Estimate(NamedTuple):
    """Figures, (times, figures), and each structure's, (times, structures, figures)."""

    mean: NDArray[np.float64]
    each: NDArray[np.float64]

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.mean - other.mean, self.each - other.each)


def draw(cases: int, seeds: int, *, times: int, seed: int) -> Draws:
    """Resample cases and, of two or more, seeds; none at all of fewer than two cases."""
    drawn = resamplings(cases, times, seed=seed)
    if seeds < 2:
        return Draws(drawn, np.ones((len(drawn), seeds), np.int64))
    # Of another seed: the same numbers would tie seeds to cases.
    return Draws(drawn, resamplings(seeds, len(drawn), seed=seed + 1))


def values_of(scores: Sequence[Scores], cases: Sequence[str], structures: Sequence[str]) -> Values:
    """The scores of one cell as an array.

    Args:
        scores: Of each seed.
        cases: That are taken, in this order.
        structures: In the order of the table.
    """
    tables = [score_table({case: one[case] for case in cases}, structures) for one in scores]
    return np.stack(tables)


def estimate(values: Values, draws: Draws) -> Estimate:
    """The figures of a cell under resamplings."""
    parts = [means_over(one, draws.cases) for one in values]
    mean, each = (np.stack(part) for part in zip(*parts, strict=True))
    shares = (draws.seeds / draws.seeds.sum(axis=1, keepdims=True)).T  # (seeds, times)
    return Estimate(_weighted(mean, shares), _weighted(each, shares))


def _weighted(parts: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over seeds; what is not counted under a seed that was not drawn does no harm."""
    shares = shares.reshape(*shares.shape, *[1] * (parts.ndim - 2))
    return np.where(shares > 0, parts * shares, 0).sum(axis=0)


def cell_summary(values: Values, structures: Sequence[str], draws: Draws) -> dict[str, Any]:
    """Figures of a cell and their intervals over cases, as `scores.summarise` has them."""
    of_cases = Draws(draws.cases, np.ones_like(draws.seeds))
    return _summary(estimate(values, _whole(values)), estimate(values, of_cases), structures)


def difference_summary(
    values: Values, others: Values, structures: Sequence[str], draws: Draws
) -> dict[str, Any]:
    """What one arm has more than another, with intervals over cases and seeds.

    Args:
        values: Of the arm.
        others: Of the other one: the same seeds and cases in the same order.
        structures: In this order too.
        draws: Of both.
    """
    point = estimate(values, _whole(values)) - estimate(others, _whole(others))
    return _summary(point, estimate(values, draws) - estimate(others, draws), structures)


def seed_means(values: Values) -> list[dict[str, float | None]]:
    """The figures under each seed alone."""
    return [named_figures(estimate(one[None], _whole(one[None])).mean[0]) for one in values]


def coverage(cases: int, seeds: int, *, times: int, one_encoder: bool) -> list[str]:
    """What the intervals say and what they do not, in sentences."""
    if cases < 2:
        return ["There are no intervals: of fewer than two test cases nothing can be resampled."]
    lines = [
        f"Brackets after a figure: the middle 95 % of {times} resamplings of the {cases} test "
        f"cases, after averaging over {_count(seeds)}. They cover which people were tested, not "
        "what training again would change."
    ]
    also = "of the cases alone" if seeds < 2 else f"of the cases and of the {seeds} seeds"
    paired = f"Brackets after a difference: the same, paired, {also}"
    if seeds < 2:
        lines.append(f"{paired}; what another seed would change is not covered.")
    else:
        lines.append(
            f"{paired}: a seed has the same labelled people and crops in both arms. So few seeds "
            "show less than their whole spread."
        )
    if one_encoder:
        lines.append("Every arm was pre-trained once: what doing so again would change is open.")
    return lines


def _whole(values: Values) -> Draws:
    seeds, cases = values.shape[:2]
    return Draws(np.ones((1, cases), np.int64), np.ones((1, seeds), np.int64))


def _summary(point: Estimate, drawn: Estimate, structures: Sequence[str]) -> dict[str, Any]:
    return {
        "mean": named_figures(point.mean[0]),
        "structures": {name: named_figures(point.each[0, n]) for n, name in enumerate(structures)},
        "intervals": {
            "mean": intervals(drawn.mean, FIGURES),
            "structures": {
                name: intervals(drawn.each[:, n], FIGURES) for n, name in enumerate(structures)
            },
        },
    }


def _count(seeds: int) -> str:
    return "one seed" if seeds == 1 else f"{seeds} seeds"
