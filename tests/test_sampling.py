"""The plan: pure, fair, and the same whoever asks in whatever order."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from glmae_ray.config_data import ViewsConfig
from glmae_ray.passes import _whole
from glmae_ray.sampling import Plan

VIEWS = ViewsConfig(global_count=2, local_count=3)


def make_plan(cases: int = 7, seed: int = 5, weights: list[float] | None = None) -> Plan:
    rng = np.random.default_rng(0)
    start = rng.integers(0, 30, (cases, 3))
    stop = start + rng.integers(9, 90, (cases, 3))
    array = None if weights is None else np.array(weights, dtype=float)
    return Plan(seed, np.stack([start, stop], axis=1), VIEWS, array)


def order(plan: Plan, number: int) -> list[int]:
    """The cases of pass `number`."""
    cases = len(plan.foreground)
    return [plan.case(number * cases + place) for place in range(cases)]


def is_uniform(observed, *, freedom: int, scale: float = 1.0) -> bool:
    """Chi-square within three deviations of its mean; a plan gives the same at every run."""
    counts = np.asarray(observed, dtype=float)
    chi_square = scale * ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return chi_square < freedom + 3 * (2 * freedom) ** 0.5


@given(st.integers(1, 300), st.integers(0, 2**63), st.integers(0, 2**40))
def test_every_pass_shows_every_case_once(cases, seed, number):
    assert sorted(order(make_plan(cases, seed), number)) == list(range(cases))


@pytest.mark.parametrize("cases", [1, 2, 3, 4, 9, 10, 65536, 65537, 100_000])
def test_every_pass_shows_every_case_once_around_full_grids(cases):
    assert sorted(order(make_plan(cases), 3)) == list(range(cases))


def test_passes_and_seeds_each_have_an_order_of_their_own():
    orders = [order(make_plan(50, seed), number) for seed in (5, 6) for number in range(3)]
    for one, other in itertools.combinations(orders, 2):
        # Two independent orders agree in one place on average.
        assert np.equal(one, other).sum() < 7


@pytest.mark.parametrize("cases", [2, 3, 7, 12])
def test_every_case_is_equally_likely_at_every_place_and_behind_every_other(cases):
    plan = make_plan(cases)
    orders = np.array([order(plan, number) for number in range(3000)])
    places, behind, next_pass = np.zeros((3, cases, cases))
    np.add.at(places, (np.arange(cases), orders), 1)
    np.add.at(behind, (orders[:, 0], orders[:, 1]), 1)
    np.add.at(next_pass, (orders[:-1, -1], orders[1:, 0]), 1)
    # A pass adds one to each row and column: cells vary less than if they were independent.
    assert is_uniform(places, freedom=(cases - 1) ** 2, scale=1 - 1 / cases)
    assert is_uniform(behind[~np.eye(cases, dtype=bool)], freedom=cases * (cases - 1) - 1)
    assert is_uniform(next_pass, freedom=cases**2 - 1)


def test_all_orders_of_a_few_cases_are_equally_likely():
    plan = make_plan(cases=4)
    counts = Counter(tuple(order(plan, number)) for number in range(4800))
    assert len(counts) == 24
    assert is_uniform(list(counts.values()), freedom=23)


def test_a_case_of_many_is_anywhere_in_the_next_pass():
    plan, cases = make_plan(cases=100_000), 100_000
    first, second = (np.argsort(order(plan, number)) / cases for number in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.015
    neighbours = np.corrcoef(first[:-1], first[1:])[0, 1]
    assert abs(neighbours) < 0.015
    table, _, _ = np.histogram2d(first, second, bins=20)
    assert is_uniform(table, freedom=19**2)


_WEIGHTS = st.lists(
    st.one_of(st.just(0.0), st.integers(1, 9).map(float), st.floats(1e-6, 1e6)),
    min_size=1,
    max_size=40,
)


@given(_WEIGHTS, st.integers(0, 2**40))
def test_a_pass_shows_each_case_as_often_as_its_weight_is_worth(weights, number):
    assume(any(weights))
    plan = make_plan(len(weights), weights=weights)
    shown = np.bincount(order(plan, number), minlength=len(weights))
    expected = np.array(weights) / sum(weights) * len(weights)
    assert shown.sum() == len(weights)
    assert (shown[np.array(weights) == 0] == 0).all()
    # Within rounding of the weights to whole numbers, far below a sample in a million passes.
    assert (shown >= np.floor(expected - 1e-9)).all()
    assert (shown <= np.ceil(expected + 1e-9)).all()


@given(st.floats(1e-300, 1e300), st.integers(1, 50), st.integers(0, 2**40))
def test_equal_weights_show_every_case_once(weight, cases, number):
    plan = make_plan(cases, weights=[weight] * cases)
    assert order(plan, number) == order(make_plan(cases), number)


def test_in_the_long_run_the_shares_are_those_of_the_weights():
    weights = [3, 0, 1, 0.25, 0.01, 7.5]
    plan = make_plan(6, weights=weights)
    shown = np.bincount([plan.case(number) for number in range(6 * 3000)], minlength=6)
    assert shown / shown.sum() == pytest.approx(np.array(weights) / sum(weights), abs=1e-3)
    assert shown[4] > 0


@given(_WEIGHTS)
def test_whole_weights_keep_their_proportions_and_leave_room(weights):
    assume(any(weights))
    whole = _whole(np.array(weights))
    assert sum(whole.tolist()) < 2**62
    assert ((whole > 0) == (np.array(weights) > 0)).all()
    factor = int(whole.max()) / max(weights)
    assert whole.tolist() == pytest.approx(np.multiply(weights, factor).tolist(), abs=1, rel=1e-15)
    assert factor == 2.0 ** np.log2(factor).round()


def test_weights_that_are_none_are_refused():
    for wrong in ([1.0], [-1.0, 2.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]):
        with pytest.raises(ValueError, match="weights"):
            make_plan(2, weights=wrong)


@given(st.integers(0, 2**40), st.integers(1, 5), st.sampled_from([None, [1, 0, 4, 0.5, 0, 2, 3]]))
def test_another_case_with_a_weight_stands_in(number, attempt, weights):
    plan = make_plan(weights=weights)
    row = plan.substitute(number, attempt)
    assert row != plan.case(number)
    assert weights is None or weights[row] > 0
    assert row == make_plan(weights=weights).substitute(number, attempt)


def test_stand_ins_follow_the_weights_of_the_others():
    weights = np.array([2, 0, 4, 1, 1])
    plan = make_plan(5, weights=weights.tolist())
    numbers = [number for number in range(9000) if plan.case(number) == 2]
    shown = np.bincount([plan.substitute(number, 1) for number in numbers], minlength=5)
    others = np.where(np.arange(5) == 2, 0, weights)
    assert shown / shown.sum() == pytest.approx(others / others.sum(), abs=0.03)
    assert {plan.substitute(number, 1) for number in range(99)} == {0, 2, 3, 4}
    assert any(plan.substitute(number, 1) != plan.substitute(number, 2) for number in range(9))


def test_where_no_other_case_has_a_weight_nothing_else_stands_in():
    assert make_plan(1).substitute(8, 1) == 0
    assert make_plan(3, weights=[0, 1, 0]).substitute(8, 1) == 1


def test_another_attempt_moves_the_boxes_and_keeps_the_seeds():
    plan = make_plan()
    draws = [plan.draw(12, "local", attempt=attempt) for attempt in range(4)]
    for one, other in itertools.combinations(draws, 2):
        assert (one.boxes != other.boxes).any(axis=(1, 2)).all()
        assert np.array_equal(one.mask_seeds, other.mask_seeds)


def test_a_draw_for_another_case_lies_in_the_foreground_of_that_case():
    plan = make_plan()
    for row in range(7):
        start, stop = plan.foreground[row]
        boxes = plan.draw(12, "global", case=row).boxes
        assert (boxes[:, 0] >= start).all()
        assert (boxes[:, 1] <= stop).all()
    own = plan.draw(12, "global", case=plan.case(12))
    assert np.array_equal(own.boxes, plan.draw(12, "global").boxes)


def test_a_pickled_plan_is_the_same_plan():
    plan = make_plan(weights=[1, 2, 3, 4, 5, 6, 7])
    before = order(plan, 1)
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(plan, protocol=5, buffer_callback=buffers.append)
    copy = pickle.loads(data, buffers=[bytes(buffer) for buffer in buffers])  # read-only
    assert order(copy, 1) == before
    assert np.array_equal(copy.draw(9, "local").boxes, plan.draw(9, "local").boxes)


def test_a_sample_does_not_depend_on_what_was_asked_before():
    forward = [make_plan().draw(n, "local") for n in range(20)]
    plan = make_plan()
    backward = [plan.draw(n, "local") for n in reversed(range(20))]
    for one, other in zip(forward, reversed(backward), strict=True):
        assert np.array_equal(one.boxes, other.boxes)
        assert np.array_equal(one.mask_seeds, other.mask_seeds)


def test_the_plan_is_pinned_so_that_a_new_version_continues_an_old_run():
    plan, many = make_plan(), make_plan(cases=1000)
    assert order(plan, 0) == PINNED_ORDER
    assert [many.case(n) for n in range(4999, 5004)] == PINNED_CASES
    assert order(make_plan(weights=[1, 2, 0, 0.3, 5, 1, 1]), 2) == PINNED_WEIGHTED_ORDER
    assert [plan.substitute(12, attempt) for attempt in range(1, 6)] == PINNED_SUBSTITUTES
    draw = plan.draw(12, "global", case=5)
    assert draw.boxes.tolist() == PINNED_BOXES
    assert draw.mask_seeds.tolist() == PINNED_SEEDS
    assert plan.draw(12, "global", case=5, attempt=1).boxes.tolist() == PINNED_OTHER_BOXES


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


PINNED_ORDER = [6, 3, 5, 4, 1, 2, 0]
PINNED_CASES = [946, 379, 39, 361, 957]
PINNED_WEIGHTED_ORDER = [3, 4, 0, 4, 5, 4, 1]
PINNED_SUBSTITUTES = [2, 0, 2, 5, 2]
PINNED_BOXES = [[[21, 23, 33], [31, 44, 63]], [[24, 20, 16], [36, 46, 54]]]
PINNED_SEEDS = [5137268158431292583, 618454876623438608]
PINNED_OTHER_BOXES = [[[22, 18, 18], [35, 48, 60]], [[23, 26, 21], [33, 49, 53]]]
