"""The plan: pure, fair, and the same whoever asks in whatever order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmae_ray.config_data import ViewsConfig
from glmae_ray.sampling import Plan

VIEWS = ViewsConfig(global_count=2, local_count=3)


def make_plan(cases: int = 7, seed: int = 5) -> Plan:
    rng = np.random.default_rng(0)
    start = rng.integers(0, 30, (cases, 3))
    stop = start + rng.integers(9, 90, (cases, 3))
    return Plan(seed=seed, foreground=np.stack([start, stop], axis=1), views=VIEWS)


def test_every_pass_shows_every_case_once_in_an_order_of_its_own():
    plan = make_plan(cases=50)
    passes = [[plan.case(number) for number in range(p * 50, p * 50 + 50)] for p in range(3)]
    assert all(sorted(order) == list(range(50)) for order in passes)
    assert passes[0] != passes[1] != passes[2]


def test_a_sample_does_not_depend_on_what_was_asked_before():
    forward = [make_plan().draw(n, "local") for n in range(20)]
    plan = make_plan()
    backward = [plan.draw(n, "local") for n in reversed(range(20))]
    for one, other in zip(forward, reversed(backward), strict=True):
        assert np.array_equal(one.boxes, other.boxes)
        assert np.array_equal(one.mask_seeds, other.mask_seeds)


def test_the_plan_is_pinned_so_that_a_new_version_continues_an_old_run():
    plan = make_plan()
    draw = plan.draw(12, "global")
    assert [plan.case(n) for n in range(7)] == PINNED_ORDER
    assert draw.boxes.tolist() == PINNED_BOXES
    assert draw.mask_seeds.tolist() == PINNED_SEEDS


@given(st.integers(0, 2**40), st.sampled_from(["global", "local"]), st.integers(0, 2**32))
def test_views_lie_in_the_foreground_and_take_the_stated_share_of_each_axis(number, kind, seed):
    plan = make_plan(seed=seed)
    start, stop = plan.foreground[plan.case(number)]
    boxes = plan.draw(number, kind).boxes
    assert boxes.shape == (2 if kind == "global" else 3, 2, 3)
    assert (boxes[:, 0] >= start).all()
    assert (boxes[:, 1] <= stop).all()
    low, high = getattr(VIEWS, f"{kind}_scale")
    sides, whole = boxes[:, 1] - boxes[:, 0], stop - start
    assert (sides >= np.floor(low * whole)).all()
    assert (sides <= np.ceil(high * whole)).all()
    # One draw for all axes: the shares differ by rounding to a voxel only.
    assert (np.ptp(sides / whole, axis=1) <= 1 / whole.min()).all()


def test_seeds_kinds_and_numbers_all_change_the_draw():
    plan, other = make_plan(), make_plan(seed=6)
    seeds = {
        plan.draw(3, "global").mask_seeds[0],
        plan.draw(3, "local").mask_seeds[0],
        plan.draw(4, "global").mask_seeds[0],
        other.draw(3, "global").mask_seeds[0],
    }
    assert len(seeds) == 4
    assert all(seed >= 0 for seed in seeds)


def test_scales_and_positions_are_uniform():
    plan = Plan(seed=0, foreground=np.array([[[0, 0, 0], [1000, 900, 800]]]), views=VIEWS)
    boxes = np.concatenate([plan.draw(number, "local").boxes for number in range(3000)])
    shares = (boxes[:, 1] - boxes[:, 0])[:, 0] / 1000
    assert shares.mean() == pytest.approx(0.375, abs=0.004)
    assert shares.std() == pytest.approx(0.25 / 12**0.5, abs=0.002)
    room = np.array([1000, 900, 800]) - (boxes[:, 1] - boxes[:, 0])
    places = boxes[:, 0] / room
    assert places.mean(axis=0) == pytest.approx([0.5] * 3, abs=0.015)
    assert np.corrcoef(places.T)[np.triu_indices(3, 1)] == pytest.approx([0] * 3, abs=0.05)


PINNED_ORDER = [3, 5, 2, 1, 0, 6, 4]
PINNED_BOXES = [[[21, 23, 33], [31, 44, 63]], [[24, 20, 16], [36, 46, 54]]]
PINNED_SEEDS = [5137268158431292583, 618454876623438608]
