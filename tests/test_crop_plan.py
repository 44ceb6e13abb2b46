"""The plan of crops: balanced, inside the scan, of the stated size in mm, the same anywhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmae_ray.config_finetune import CropsConfig
from glmae_ray.crop_plan import CropPlan, crop_sides, label_points

SHAPES = np.array([[60, 90, 80], [40, 70, 100], [20, 50, 30]])
BOXES = np.stack([SHAPES // 5, SHAPES - SHAPES // 6], axis=1)
SPACINGS = np.array([[3.0, 0.8, 0.8], [1.5, 1.0, 1.2], [5.0, 0.7, 0.9]])


def make_plan(seed: int = 3, **crops) -> CropPlan:
    cfg = CropsConfig(**{"count": 4, "size": (16, 24, 32), **crops})
    return CropPlan(seed, BOXES, SHAPES, crop_sides(SPACINGS, cfg), cfg)


def points_of(*voxels: tuple[int, int, int]) -> list[np.ndarray]:
    """Structures of a voxel each."""
    return [np.array([voxel], np.int32) for voxel in voxels]


def middles(boxes: np.ndarray) -> np.ndarray:
    """The voxel that a crop is centred on."""
    return np.ceil(boxes.mean(axis=1) - 0.5).astype(int)


@pytest.mark.parametrize(("count", "share"), [(4, 0.5), (3, 0.5), (1, 0.25), (2, 1.0), (4, 0.0)])
def test_the_stated_share_of_crops_is_centred_on_a_structure(count, share):
    plan, points = make_plan(count=count, foreground=share), points_of((30, 45, 41))
    boxes = [plan.draw(number, points, case=0).boxes for number in range(120)]
    hits = (middles(np.concatenate(boxes)) == (30, 45, 41)).all(axis=1)
    assert hits.sum() == pytest.approx(share * 120 * count, abs=2)
    assert all(abs(part.sum() - share * count) < 1 for part in np.split(hits, 120))


def test_structures_come_equally_often_whatever_their_size():
    large = np.stack(np.meshgrid(*[np.arange(20, 30)] * 3, indexing="ij"), -1).reshape(-1, 3)
    points = [large.astype(np.int32), *points_of((40, 60, 60), (35, 50, 20))]
    plan = make_plan(foreground=1.0)
    centres = np.concatenate([middles(plan.draw(n, points, case=0).boxes) for n in range(600)])
    small = [(centres == point[0]).all(axis=1).mean() for point in points[1:]]
    assert small == pytest.approx([1 / 3, 1 / 3], abs=0.03)


def test_other_crops_lie_anywhere_in_the_foreground_box():
    plan = make_plan(foreground=0.0, size=(2, 2, 2))
    centres = np.concatenate([middles(plan.draw(n, [], case=0).boxes) for n in range(1500)])
    start, stop = BOXES[0]
    assert (centres.min(axis=0) <= start + 1).all()
    assert (centres.max(axis=0) >= stop - 2).all()
    assert centres.mean(axis=0) == pytest.approx((start + stop - 1) / 2, abs=1)
    assert np.corrcoef(centres.T)[np.triu_indices(3, 1)] == pytest.approx([0] * 3, abs=0.05)


@given(st.integers(0, 2**40), st.integers(0, 2), st.sampled_from([None, (1.5, 1.5, 1.5)]))
def test_crops_lie_within_the_scan_or_about_its_middle(number, case, spacing):
    plan = make_plan(spacing=spacing, size=(32, 48, 40))
    corner = points_of((0, 0, 0), tuple(SHAPES[case] - 1))
    boxes = plan.draw(number, corner, case=case).boxes
    room = SHAPES[case] - (boxes[:, 1] - boxes[:, 0])
    assert ((boxes[:, 0] >= 0) | (room < 0)).all()
    assert ((boxes[:, 1] <= SHAPES[case]) | (room < 0)).all()
    left, right = -boxes[:, 0], boxes[:, 1] - SHAPES[case]
    assert (abs(left - right) <= 2)[room < 0].all()


def test_a_crop_covers_its_size_in_mm():
    plan = make_plan(spacing=(4.0, 2.0, 1.0), size=(4, 8, 16))
    for case, spacing in enumerate(SPACINGS):
        boxes = plan.draw(7, [], case=case).boxes
        sides_mm = (boxes[:, 1] - boxes[:, 0]) * spacing
        np.testing.assert_allclose(sides_mm, np.tile([16, 16, 16], (4, 1)), atol=0.005)


def test_without_a_spacing_and_at_the_scans_own_crops_are_whole_voxels():
    near = SPACINGS[:1] * (1 + 1e-9)  # as an affine gives it
    cfg = CropsConfig(size=(16, 24, 32), spacing=(3.0, 0.8, 0.8))
    assert crop_sides(near, cfg).tolist() == [[16, 24, 32]]
    for number in range(20):
        boxes = make_plan().draw(number, points_of((3, 5, 7)), case=1).boxes
        assert (boxes == boxes.astype(int)).all()


def test_seeds_numbers_and_run_seeds_change_the_draw_and_nothing_else_does():
    points = points_of((10, 20, 30), (30, 20, 10))
    draws = [make_plan(seed).draw(n, points, case=1) for seed in (3, 4) for n in (5, 6)]
    for one, other in itertools.combinations(draws, 2):
        assert (one.boxes != other.boxes).any()
        assert not {*one.seeds.tolist()} & {*other.seeds.tolist()}
    again = make_plan().draw(5, points, case=1)
    assert np.array_equal(again.boxes, draws[0].boxes)
    assert np.array_equal(again.seeds, draws[0].seeds)
    assert len({*again.seeds.tolist()}) == 4


def test_the_plan_is_pinned_so_that_a_new_version_continues_an_old_run():
    draw = make_plan().draw(12, points_of((30, 45, 41), (10, 80, 3)), case=0)
    assert draw.boxes[:, 0].tolist() == PINNED_STARTS
    assert draw.seeds.tolist() == PINNED_SEEDS


def test_points_are_voxels_of_their_structure_spread_over_all_of_it():
    label = np.zeros((21, 30, 40), np.uint8)
    label[2:20, 5:25, 3:33] = 4
    label[1, 1, 1:4] = 2
    few, many = label_points(label, most=64)
    assert few.tolist() == [[1, 1, 1], [1, 1, 2], [1, 1, 3]]
    assert len(many) == len(np.unique(many, axis=0)) == 64
    assert (label[tuple(many.T)] == 4).all()
    assert many.mean(axis=0) == pytest.approx([10.5, 14.5, 17.5], abs=1.5)
    assert np.array_equal(label_points(label, most=64)[1], many)
    assert label_points(np.zeros((3, 4, 5), np.uint8)) == []


PINNED_STARTS = [[8.0, 45.0, 47.0], [2.0, 66.0, 0.0], [32.0, 61.0, 3.0], [22.0, 33.0, 25.0]]
PINNED_SEEDS = [2103316048598726024, 1302277114437522809, 7451669866617260701, 8108454244942371528]
