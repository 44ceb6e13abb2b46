"""Statistics: the box round the tissue, and robust intensities, against plain NumPy."""

import numpy as np
import pytest

from glmae_ray.store.statistics import foreground_box, intensities, label_counts


def body(shape=(1, 20, 24, 28)):
    """Air with a body in coarse voxels z 5-12, y 3-20, x 9-25."""
    array = np.full(shape, -1000, np.int16)
    array[:, 5:12, 3:20, 9:25] = 40
    return array


@pytest.mark.parametrize(("modality", "scale"), [("CT", 1), ("ct", 1), ("MR", 3), ("T1", 0.01)])
def test_the_box_holds_the_tissue_in_level_0_voxels(modality, scale):
    coarse = (body() * scale).astype(np.float32)
    box = foreground_box(coarse, factor=(2, 4, 4), shape=(39, 94, 112), modality=modality)
    assert box == ((10, 12, 36), (24, 80, 100))


def test_a_box_ends_where_the_volume_ends():
    coarse = np.full((1, 20, 24, 28), 40, np.int16)
    box = foreground_box(coarse, factor=(2, 4, 4), shape=(39, 94, 112), modality="CT")
    assert box == ((0, 0, 0), (39, 94, 112))


def test_tissue_in_any_channel_counts():
    coarse = body((2, 20, 24, 28))
    coarse[0] = -1000
    box = foreground_box(coarse, factor=(1, 1, 1), shape=(20, 24, 28), modality="CT")
    assert box == ((5, 3, 9), (12 + 1, 20, 25))  # 7 slices grow to 8


def test_air_alone_gives_the_whole_volume():
    coarse = np.full((1, 9, 10, 11), -1024, np.int16)
    box = foreground_box(coarse, factor=(4, 4, 4), shape=(33, 37, 41), modality="CT")
    assert box == ((0, 0, 0), (33, 37, 41))


@pytest.mark.parametrize("place", [0, 5, 18])
def test_a_speck_grows_to_eight_voxels_inside_the_volume(place):
    coarse = np.full((1, 19, 19, 19), -1024, np.int16)
    coarse[0, place, place, place] = 100
    start, stop = foreground_box(coarse, factor=(1, 1, 1), shape=(19, 19, 19), modality="CT")
    assert [high - low for low, high in zip(start, stop, strict=True)] == [8, 8, 8]
    assert all(0 <= low <= place < high <= 19 for low, high in zip(start, stop, strict=True))


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_intensities_of_each_channel_agree_with_numpy_inside_the_box(dtype):
    array = np.random.default_rng(3).normal(100, 400, (2, 19, 23, 29)).astype(dtype)
    array[1] += 1000
    array[:, :2] = -3000
    found = intensities(array, ((2, 3, 4), (18, 20, 29)))

    for channel, inside in enumerate(array[:, 2:18, 3:20, 4:29].astype(np.float64)):
        assert found["minimum"][channel] == inside.min()
        assert found["maximum"][channel] == inside.max()
        assert found["mean"][channel] == pytest.approx(inside.mean(), rel=1e-6)
        assert found["std"][channel] == pytest.approx(inside.std(), rel=1e-6)
        for name, percent in (("p0_5", 0.5), ("p50", 50), ("p99_5", 99.5)):
            assert found[name][channel] == np.percentile(inside, percent, method="lower")


def test_intensities_reach_to_both_ends_of_int16():
    array = np.array([-32768, -1, 0, 32767], np.int16).repeat(150).reshape(1, 10, 5, 12)
    found = intensities(array, ((0, 0, 0), (10, 5, 12)))
    assert (found["minimum"], found["maximum"], found["p50"]) == ([-32768], [32767], [-1])
    assert found["mean"] == [-0.5]


def test_one_value_in_the_box_is_every_percentile():
    found = intensities(np.full((1, 9, 10, 11), -7, np.int16), ((1, 1, 1), (9, 9, 9)))
    assert [found[name] for name in ("minimum", "p0_5", "p50", "p99_5", "maximum")] == [[-7]] * 5
    assert found["std"] == [0]


def test_intensities_of_planes_too_large_to_count_at_once():
    array = np.random.default_rng(5).integers(-1024, 3000, (1, 3, 400, 401)).astype(np.int16)
    found = intensities(array, ((0, 0, 0), (3, 400, 401)))
    assert found["mean"] == [pytest.approx(array.mean(), rel=1e-9)]
    assert found["p99_5"] == [np.percentile(array, 99.5, method="lower")]


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(np.uint8, 0, 256), (np.int16, -300, 4000), (np.uint8, 0, 1)]
)
def test_labels_are_counted_without_the_background(dtype, low, high):
    label = np.random.default_rng(2).integers(low, high, (11, 40, 31)).astype(dtype)
    label[:, :20] = 0
    values, counts = np.unique(label[label != 0], return_counts=True)
    assert label_counts(label) == dict(zip(values.tolist(), counts.tolist(), strict=True))
