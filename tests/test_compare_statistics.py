"""Figures of a comparison: intervals and differences over cases and seeds."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks._compare_statistics import (
    cell_summary,
    difference_summary,
    draw,
    seed_means,
)
from glmae_ray.scores import summarise
from tests.comparisons import NAMES, TIMES, planted, scores, values


def test_a_cell_of_one_seed_is_what_evaluate_says():
    dices = planted(np.random.default_rng(0), seeds=1)
    dices[0, 3, 1] = np.nan
    (one,) = scores(dices)
    theirs = summarise(one, structures=NAMES, bootstrap=TIMES, seed=7)
    ours = cell_summary(values(dices), NAMES, draw(30, 1, times=TIMES, seed=7))
    assert ours["mean"] == pytest.approx(theirs["mean"])
    assert ours["intervals"]["mean"]["dice"] == pytest.approx(theirs["intervals"]["mean"]["dice"])
    for name in NAMES:
        for figure, value in ours["structures"][name].items():
            assert value == pytest.approx(theirs["structures"][name][figure])


def test_figures_are_averaged_over_seeds_and_each_stands_alone_too():
    dices = planted(np.random.default_rng(1))
    found = cell_summary(values(dices), NAMES, draw(30, 3, times=TIMES, seed=0))
    assert found["mean"]["dice"] == pytest.approx(dices.mean())
    assert found["structures"]["spleen"]["nsd"] == pytest.approx(dices[..., 1].mean() / 2)
    alone = [mean["dice"] for mean in seed_means(values(dices))]
    assert alone == pytest.approx(dices.mean(axis=(1, 2)).tolist())


def test_a_planted_difference_is_found_though_people_differ_more_than_arms():
    dices = planted(np.random.default_rng(2))
    draws = draw(30, 3, times=TIMES, seed=0)
    cell = cell_summary(values(dices), NAMES, draws)
    low, high = cell["intervals"]["mean"]["dice"]
    assert high - low > 0.05
    found = difference_summary(values(dices + np.array([0.02, 0.04])), values(dices), NAMES, draws)
    assert found["mean"]["dice"] == pytest.approx(0.03)
    assert found["intervals"]["mean"]["dice"] == pytest.approx([0.03, 0.03])
    assert found["structures"]["liver"]["dice"] == pytest.approx(0.02)
    assert found["mean"]["hd95"] == pytest.approx(-0.03)


def test_what_only_seeds_change_widens_the_interval_of_a_difference():
    dices = planted(np.random.default_rng(3), seeds=4)
    shift = np.array([-0.1, 0.0, 0.1, 0.2])[:, None, None]
    found = difference_summary(
        values(dices + shift), values(dices), NAMES, draw(30, 4, times=TIMES, seed=0)
    )
    low, high = found["intervals"]["mean"]["dice"]
    assert found["mean"]["dice"] == pytest.approx(0.05)
    assert low < -0.02
    assert high > 0.12


def test_intervals_of_differences_hold_the_truth_about_as_often_as_they_say():
    rng, truth, hits, repeats = np.random.default_rng(4), 0.02, 0, 80
    for _ in range(repeats):
        base = planted(rng, seeds=8)
        own = rng.normal(truth, 0.02, (8, 1, 1)) + rng.normal(0, 0.03, (1, 30, 1))
        draws = draw(30, 8, times=100, seed=0)
        found = difference_summary(values(base + own), values(base), NAMES, draws)
        low, high = found["intervals"]["mean"]["dice"]
        hits += low <= truth <= high
    assert 0.85 <= hits / repeats <= 1


def test_seeds_and_cases_are_drawn_independently_of_each_other():
    draws = draw(2, 2, times=4000, seed=0)
    ties = np.corrcoef(draws.cases[:, 0], draws.seeds[:, 0])[0, 1]
    assert abs(ties) < 0.06
    assert (draw(5, 1, times=10, seed=0).seeds == 1).all()
    assert len(draw(1, 3, times=10, seed=0).seeds) == 0


def test_of_one_case_there_are_figures_and_no_intervals():
    dices = np.array([[[0.5, 0.7]], [[0.6, 0.8]]])
    found = cell_summary(values(dices), NAMES, draw(1, 2, times=TIMES, seed=0))
    assert found["mean"]["dice"] == pytest.approx(0.65)
    assert found["intervals"]["mean"]["dice"] is None


# The parts
