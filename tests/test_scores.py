"""Scores against MONAI's on whole volumes, the rules for what is empty, and intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from glmae_ray.scores import score_case, summarise, summarise_classes

SPACING = (3.0, 0.8, 1.2)
SHAPE = (17, 22, 13)
TOLERANCES = {"liver": 2.0, "spleen": 1.0, "cyst": 2.0}
STRUCTURES = tuple(TOLERANCES)


def maps() -> tuple[np.ndarray, np.ndarray]:
    """What was found and what is there; a structure touches the edge of the scan."""
    found, there = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    found[3:9, 4:15, 2:9], there[2:9, 5:17, 2:8] = 1, 1
    found[10:, 0:9, 5:], there[11:, 0:8, 4:] = 2, 2
    return found, there


def scored(found, there, *, known=STRUCTURES):
    return score_case(
        found, there, structures=STRUCTURES, spacing=SPACING, tolerances=TOLERANCES, known=known
    )


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy")  # of MONAI itself
@pytest.mark.parametrize(("value", "name"), [(1, "liver"), (2, "spleen")])
def test_scores_of_a_structure_are_those_of_whole_volumes(value, name):
    found, there = maps()
    score = scored(found, there)[name]
    a, b = found == value, there == value
    masks = [torch.from_numpy(mask)[None, None] for mask in (a, b)]
    hd95 = compute_hausdorff_distance(
        *masks, include_background=True, percentile=95, spacing=SPACING
    )
    nsd = compute_surface_dice(*masks, [TOLERANCES[name]], include_background=True, spacing=SPACING)
    assert score["dice"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert score["nsd"] == pytest.approx(nsd.item())
    assert score["hd95"] == pytest.approx(hd95.item())


def test_spacing_and_tolerance_count_along_their_axes():
    found, there = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    found[5:9, 8:12, 4:8], there[6:10, 8:12, 4:8] = 1, 1  # apart by one slice of 3 mm
    assert scored(found, there)["liver"]["hd95"] == pytest.approx(3.0)
    assert scored(found, found)["liver"] == {"dice": 1.0, "nsd": 1.0, "hd95": 0.0}
    found[:] = 0
    found[6:10, 9:13, 4:8] = 1  # by one row of 0.8 mm, within the tolerance of 2
    assert scored(found, there)["liver"]["hd95"] == pytest.approx(0.8)
    assert scored(found, there)["liver"]["nsd"] == 1.0


def test_what_is_in_neither_map_is_not_counted_and_what_is_in_one_scores_worst():
    found, there = maps()
    worst = {"dice": 0.0, "nsd": 0.0, "hd95": math.hypot(17 * 3.0, 22 * 0.8, 13 * 1.2)}
    assert scored(found, there)["cyst"] is None
    for one in (found, there):
        changed = one.copy()
        changed[0, 0, 0] = 3
        pair = (changed, there) if one is found else (found, changed)
        assert scored(*pair)["cyst"] == worst


def test_what_nobody_looked_for_is_not_counted():
    found, there = maps()
    assert scored(found, there, known=("spleen",))["liver"] is None
    assert scored(found, there, known=("spleen",))["spleen"] is not None


def cases_of(values: dict[str, list[float | None]]) -> dict:
    return {
        case: {
            name: None if dice is None else {"dice": dice, "nsd": dice / 2, "hd95": 10 * dice}
            for name, dice in zip(STRUCTURES, dices, strict=True)
        }
        for case, dices in values.items()
    }


def test_means_are_over_cases_and_then_over_structures():
    cases = cases_of({"a": [0.8, 0.5, None], "b": [0.6, None, None], "c": [0.7, None, None]})
    found = summarise(cases, structures=STRUCTURES, bootstrap=200, seed=3)
    assert found["structures"]["liver"] == {
        "dice": pytest.approx(0.7), "nsd": pytest.approx(0.35), "hd95": pytest.approx(7.0),
        "cases": 3,
    }  # fmt: skip
    assert found["structures"]["spleen"]["cases"] == 1
    nothing = {"dice": None, "nsd": None, "hd95": None}
    assert found["structures"]["cyst"] == nothing | {"cases": 0}
    assert found["mean"]["dice"] == pytest.approx((0.7 + 0.5) / 2)
    assert found["intervals"]["structures"]["cyst"] == nothing


def test_intervals_hold_the_mean_narrow_with_more_cases_and_come_again_from_the_seed():
    dices = np.random.default_rng(0).normal(0.7, 0.1, 200)

    def interval(count: int, *, seed: int = 1) -> list[float]:
        values = {f"c{n}": [dice, None, None] for n, dice in enumerate(dices[:count])}
        found = summarise(cases_of(values), structures=STRUCTURES, bootstrap=500, seed=seed)
        low, high = found["intervals"]["mean"]["dice"]
        assert low < found["mean"]["dice"] < high
        return [low, high]

    few, many = interval(8), interval(200)
    assert many[1] - many[0] < few[1] - few[0]
    # 1.96 standard errors to each side.
    assert many[1] - many[0] == pytest.approx(2 * 1.96 * 0.1 / math.sqrt(200), rel=0.2)
    assert interval(8) == few != interval(8, seed=2)


def test_a_single_case_has_no_interval():
    found = summarise(
        cases_of({"a": [0.8, 0.5, None]}), structures=STRUCTURES, bootstrap=50, seed=0
    )
    assert found["intervals"]["mean"] == {"dice": None, "nsd": None, "hd95": None}


def test_classes_are_scored_by_accuracy_balanced_accuracy_and_area():
    targets = np.array([0, 0, 0, 1])
    scores = np.array([0.1, 0.2, 0.6, 0.55])  # of the second class
    found = summarise_classes(np.stack([1 - scores, scores], 1), targets, bootstrap=100, seed=0)
    assert found["mean"]["accuracy"] == 0.75
    assert found["mean"]["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["mean"]["auc"] == pytest.approx(2 / 3)  # of three pairs two are in order
    low, high = found["intervals"]["mean"]["auc"]
    assert 0 <= low <= 2 / 3 <= high <= 1


def test_of_more_than_two_classes_the_area_is_the_mean_of_each_against_the_rest():
    targets = np.array([0, 1, 2, 0, 1, 2])
    perfect = np.eye(3)[targets]
    assert summarise_classes(perfect, targets, bootstrap=20, seed=0)["mean"] == {
        "accuracy": 1.0, "balanced_accuracy": 1.0, "auc": 1.0,
    }  # fmt: skip
    blind = np.full((6, 3), 1 / 3)
    assert summarise_classes(blind, targets, bootstrap=20, seed=0)["mean"]["auc"] == 0.5
