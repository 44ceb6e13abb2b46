"""How well label maps agree: Dice, NSD and HD95 by MONAI, their means, and bootstrap intervals.

A structure that is in neither map is not counted. One that is in only one of them has Dice 0, NSD
0, and for HD95 the diagonal of the scan: no distance there is could be larger. One that nobody
looked for in a case is not counted there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.metrics import (
    compute_dice,
    compute_hausdorff_distance,
    compute_roc_auc,
    compute_surface_dice,
)
from numpy.typing import NDArray

FIGURES = ("dice", "nsd", "hd95")
CLASS_FIGURES = ("accuracy", "balanced_accuracy", "auc")

Score = dict[str, float]  # by figure
Interval = list[float]  # lower and upper end

_PERCENTILE = 95  # of the distances between two surfaces
_COVERAGE = (2.5, 97.5)  # percentiles that an interval lies between


def score_case(
    predicted: NDArray[np.integer],
    truth: NDArray[np.integer],
    *,
    structures: Sequence[str],
    spacing: Sequence[float],
    tolerances: Mapping[str, float],
    known: Collection[str],
) -> dict[str, Score | None]:
    """Dice, NSD and HD95 (mm) of every structure of one case; None where it is not counted.

    Args:
        predicted: (Z, Y, X); structure number n has the value n + 1.
        truth: The same of the labels.
        structures: In the order of their values.
        spacing: (Z, Y, X) in mm.
        tolerances: Of the surface Dice, in mm, by structure.
        known: Structures that somebody looked for in this case.
    """
    diagonal = math.hypot(*(side * step for side, step in zip(truth.shape, spacing, strict=True)))
    scores: dict[str, Score | None] = {}
    for value, name in enumerate(structures, start=1):
        found, there = predicted == value, truth == value
        if name not in known or not (found.any() or there.any()):
            scores[name] = None
        elif not (found.any() and there.any()):
            scores[name] = {"dice": 0.0, "nsd": 0.0, "hd95": diagonal}
        else:
            scores[name] = _agreement(found, there, spacing=spacing, tolerance=tolerances[name])
    return scores


def dice_case(
    predicted: NDArray[np.integer],
    truth: NDArray[np.integer],
    *,
    structures: Sequence[str],
    known: Sequence[bool] | NDArray[np.bool_],
) -> dict[str, float | None]:
    """Dice alone, by the rules of `score_case`: cheap enough for every validation.

    Args:
        predicted: (Z, Y, X); structure number n has the value n + 1.
        truth: The same of the labels.
        structures: In the order of their values.
        known: Whether somebody looked for each in this case.
    """
    scores: dict[str, float | None] = {}
    for value, (name, looked_for) in enumerate(zip(structures, known, strict=True), start=1):
        found, there = predicted == value, truth == value
        total = int(found.sum()) + int(there.sum())
        counts = looked_for and total
        scores[name] = 2 * int((found & there).sum()) / total if counts else None
    return scores


def _agreement(
    found: NDArray[np.bool_],
    there: NDArray[np.bool_],
    *,
    spacing: Sequence[float],
    tolerance: float,
) -> Score:
    box = _box(found | there)
    inside = (np.ascontiguousarray(mask[box]) for mask in (found, there))
    masks = [torch.from_numpy(mask)[None, None] for mask in inside]
    dice = compute_dice(*masks)
    with warnings.catch_warnings():  # MONAI 1.6 warns of an argument that only itself passes
        warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
        nsd = compute_surface_dice(*masks, [tolerance], include_background=True, spacing=spacing)
        hd95 = compute_hausdorff_distance(
            *masks, include_background=True, percentile=_PERCENTILE, spacing=spacing
        )
    return {name: value.item() for name, value in zip(FIGURES, (dice, nsd, hd95), strict=True)}


def _box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    """The box of what is true in a mask (Z, Y, X); what lies around it costs time only."""
    sides = []
    for axis in range(3):
        hit = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        sides.append(slice(hit[0], hit[-1] + 1))
    return tuple(sides)


def summarise(
    cases: Mapping[str, Mapping[str, Score | None]],
    *,
    structures: Sequence[str],
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """Means over cases, and with them intervals: what a table of results shows.

    A structure's figure is the mean over the cases that count it; `mean` is the mean of the
    structures' figures, so that frequent structures weigh no more than rare ones. Intervals are
    the percentiles 2.5 and 97.5 over resamplings of whole cases (Efron 1979); of fewer than two
    cases there is none.

    Returns:
        `mean`: figure -> value; `structures`: name -> figure -> value, and the number of `cases`
        counted; `intervals`: the same two with [lower, upper]. None where nothing is counted.
    """
    values = score_table(cases, structures)
    counts = np.isfinite(values[..., 0]).sum(axis=0)
    mean, each = means_over(values, np.ones((1, len(values)), int))
    draws = resamplings(len(values), bootstrap, seed=seed)
    drawn_mean, drawn_each = means_over(values, draws)
    return {
        "mean": named_figures(mean[0]),
        "structures": {
            name: {**named_figures(each[0, n]), "cases": int(counts[n])}
            for n, name in enumerate(structures)
        },
        "intervals": {
            "mean": intervals(drawn_mean, FIGURES),
            "structures": {
                name: intervals(drawn_each[:, n], FIGURES) for n, name in enumerate(structures)
            },
        },
    }


def score_table(
    cases: Mapping[str, Mapping[str, Score | None]], structures: Sequence[str]
) -> NDArray[np.float64]:
    """(cases, structures, figures), NaN where a case does not count a structure."""
    rows = [
        [[math.nan] * len(FIGURES) if s is None else [s[name] for name in FIGURES] for s in scores]
        for scores in ([case[name] for name in structures] for case in cases.values())
    ]
    return np.array(rows, np.float64).reshape(len(cases), len(structures), len(FIGURES))


def summarise_classes(
    probabilities: NDArray[np.floating], targets: NDArray[np.integer], *, bootstrap: int, seed: int
) -> dict[str, Any]:
    """Accuracy, balanced accuracy and AUC of N classified cases, with intervals as `summarise`.

    Balanced accuracy is the mean over the classes that there are of the share found. AUC is that
    of the second of two classes; of more, the mean of each class against the rest.

    Args:
        probabilities: (N, classes).
        targets: (N,), numbers of classes.
        bootstrap: Resamplings of cases.
        seed: Of these.
    """
    draws = resamplings(len(targets), bootstrap, seed=seed)
    picks = (np.repeat(np.arange(len(targets)), draw) for draw in draws)
    drawn = np.array([_class_scores(probabilities[pick], targets[pick]) for pick in picks])
    mean = _class_scores(probabilities, targets)
    return {
        "mean": named_figures(mean, CLASS_FIGURES),
        "intervals": {"mean": intervals(drawn.reshape(-1, len(CLASS_FIGURES)), CLASS_FIGURES)},
    }


def _class_scores(
    probabilities: NDArray[np.floating], targets: NDArray[np.integer]
) -> NDArray[np.float64]:
    right = probabilities.argmax(axis=1) == targets
    present = [number for number in range(probabilities.shape[1]) if (targets == number).any()]
    balanced = np.mean([right[targets == number].mean() for number in present])
    against = present if probabilities.shape[1] > 2 else [1]
    areas = [_area(probabilities[:, number], targets == number) for number in against]
    return np.array([right.mean(), balanced, np.mean(areas)])


def _area(scores: NDArray[np.floating], is_class: NDArray[np.bool_]) -> float:
    if is_class.all() or not is_class.any():
        return math.nan
    return float(compute_roc_auc(torch.from_numpy(scores), torch.from_numpy(is_class).long()))


def resamplings(cases: int, times: int, *, seed: int) -> NDArray[np.int64]:
    """How often each of the cases is drawn, (times, cases); none for fewer than two cases."""
    if cases < 2:
        return np.empty((0, cases), np.int64)
    return np.random.Generator(np.random.Philox(seed)).multinomial(
        cases, [1 / cases] * cases, times
    )


def means_over(
    values: NDArray[np.float64], draws: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means over structures, (draws, figures), and each structure's, (draws, structures, figures).

    Args:
        values: (cases, structures, figures), NaN where not counted.
        draws: How often each case counts, (draws, cases).
    """
    sums = np.einsum("dc,csf->dsf", draws, np.nan_to_num(values))
    counts = np.einsum("dc,cs->ds", draws, np.isfinite(values[..., 0]))[..., np.newaxis]
    each = np.divide(sums, counts, out=np.full_like(sums, math.nan), where=counts > 0)
    there = np.isfinite(each).sum(axis=1)
    total = np.nan_to_num(each).sum(axis=1)
    return np.divide(total, there, out=np.full_like(total, math.nan), where=there > 0), each


def intervals(drawn: NDArray[np.float64], figures: Sequence[str]) -> dict[str, Interval | None]:
    """The ends of the middle 95 % of what was drawn, (draws, figures)."""
    counted = (column[np.isfinite(column)] for column in drawn.T)
    return {
        name: np.percentile(values, _COVERAGE).tolist() if len(values) else None
        for name, values in zip(figures, counted, strict=True)
    }


def named_figures(
    values: NDArray[np.float64], figures: Sequence[str] = FIGURES
) -> dict[str, float | None]:
    """Values by the names of their figures, None where nothing is counted."""
    pairs = zip(figures, values.tolist(), strict=True)
    return {name: value if math.isfinite(value) else None for name, value in pairs}
