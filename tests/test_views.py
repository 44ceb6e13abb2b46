"""Views against torch's resize, and the facts that make them trustworthy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glmae_ray.views import Source, axis_taps, choose_level, make_views, resize

FACTORS = ((1, 1, 1), (1, 2, 2), (2, 4, 4))


class Pyramid:
    """A store in memory: block means of one volume, anisotropic levels."""

    def __init__(self, volume: np.ndarray) -> None:
        self.volume = volume
        self.asked: list[tuple[int, int]] = []

    def read_many(self, requests):
        crops = []
        for _, level, (start, stop) in requests:
            self.asked.append((level, int(np.prod(np.subtract(stop, start)))))
            box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
            crops.append(self.level(level)[(slice(None), *box)])
        return crops

    def level(self, number: int) -> np.ndarray:
        fz, fy, fx = FACTORS[number]
        c, z, y, x = self.volume.shape
        blocks = self.volume.reshape(c, z // fz, fz, y // fy, fy, x // fx, fx)
        mean = blocks.mean(axis=(2, 4, 6))
        is_integer = np.issubdtype(self.volume.dtype, np.integer)
        return np.rint(mean).astype(self.volume.dtype) if is_integer else mean


def smooth_volume(dtype: type = np.int16) -> np.ndarray:
    z, y, x = np.meshgrid(*(np.arange(side) for side in (24, 40, 32)), indexing="ij")
    waves = 400 * np.sin(z / 5) + 300 * np.cos(y / 7 + 1) + 200 * np.sin(x / 6 + z / 9)
    return np.stack([waves, waves[::-1]]).astype(dtype)


def source(window: tuple[float, float] = (-1000.0, 1000.0)) -> Source:
    return Source("a", (24, 40, 32), FACTORS, np.array([window]))


def views_of(volume: np.ndarray, *boxes: list[list[int]], size: tuple[int, int, int]) -> np.ndarray:
    return make_views(Pyramid(volume), source(), np.array(boxes), size=size)[0]


def test_a_box_of_the_target_size_comes_back_voxel_for_voxel():
    volume = smooth_volume()
    view = views_of(volume, [[3, 5, 7], [13, 25, 15]], size=(10, 20, 8))[0]
    assert view.dtype == np.int16
    assert np.array_equal(view, volume[:, 3:13, 5:25, 7:15])


@pytest.mark.parametrize("size", [(48, 80, 64), (31, 47, 53)])
def test_enlarging_the_whole_volume_equals_torchs_trilinear(size):
    volume = smooth_volume()
    view = views_of(volume, [[0, 0, 0], [24, 40, 32]], size=size)[0]
    expected = F.interpolate(torch.tensor(volume)[None].float(), size=size, mode="trilinear")[0]
    assert np.abs(view - expected.numpy()).max() <= 0.51  # rounding to a HU


def test_shrinking_equals_torchs_antialiased_filter_axis_by_axis():
    volume = np.random.default_rng(0).normal(size=(1, 24, 40, 32)).astype(np.float32)
    sizes = (17, 23, 21)
    taps = [
        axis_taps(np.array([0, side]), 1, side, out)
        for side, out in zip((24, 40, 32), sizes, strict=True)
    ]
    ours = resize(volume, taps)
    step = torch.tensor(volume)
    for axis in (1, 2, 3):  # torch has the filter in 2-D only
        flat = step.movedim(axis, -1).flatten(0, 2)[None, None]
        out = F.interpolate(
            flat, size=(flat.shape[2], sizes[axis - 1]), mode="bilinear", antialias=True
        )
        rest = [side for number, side in enumerate(step.shape) if number != axis]
        step = out[0, 0].reshape(*rest, sizes[axis - 1]).movedim(-1, axis)
    np.testing.assert_allclose(ours, step.numpy(), atol=2e-5)


def test_the_coarsest_level_that_keeps_the_target_size_is_read():
    def level(*sides: int) -> int:
        return choose_level(np.array([[0, 0, 0], sides]), FACTORS, (8, 8, 8))

    assert level(8, 8, 8) == 0
    assert level(8, 16, 16) == 1
    assert level(16, 32, 32) == 2
    assert level(15, 40, 32) == 1  # one axis too short for level 2
    assert level(4, 4, 4) == 0


def test_every_level_puts_the_anatomy_in_the_same_place():
    z, y, x = np.meshgrid(*(np.arange(side) for side in (24, 40, 32)), indexing="ij")
    ramp = (40 * z + 20 * y + 30 * x)[None].astype(np.int16)  # any symmetric filter keeps a ramp
    box = np.array([[4, 4, 2], [22, 37, 30]])
    for size in ((18, 33, 28), (17, 16, 14), (9, 8, 7), (5, 3, 4)):
        pyramid = Pyramid(ramp)
        view = make_views(pyramid, source(), box[None], size=size)[0][0, 0]
        at = [
            box[0][a] + (np.arange(size[a]) + 0.5) * (box[1] - box[0])[a] / size[a] - 0.5
            for a in range(3)
        ]
        places = np.meshgrid(*at, indexing="ij")
        expected = 40 * places[0] + 20 * places[1] + 30 * places[2]
        inner = (slice(1, -1),) * 3
        # Sampled filters are not quite centred: a twentieth of the level's voxel on each axis.
        slack = 0.05 * np.dot(FACTORS[pyramid.asked[0][0]], (40, 20, 30))
        assert np.abs(view - expected)[inner].max() <= slack + 0.51


def test_only_the_box_and_a_rim_are_read():
    pyramid = Pyramid(smooth_volume())
    boxes = np.array([[[2, 2, 2], [10, 10, 10]], [[5, 20, 9], [13, 28, 17]]])
    make_views(pyramid, source(), boxes, size=(8, 8, 8))
    assert all(voxels <= 10**3 for _, voxels in pyramid.asked)


def test_floating_point_cases_span_the_int16_codes_between_the_ends_of_their_window():
    volume = smooth_volume(np.float32) / 1000
    window = (-0.5, 0.6)
    boxes = np.array([[[0, 0, 0], [24, 40, 32]]])
    views, codes = make_views(Pyramid(volume), source(window), boxes, size=(24, 40, 32))
    low, high = codes[0]
    restored = (views[0] - low) / (high - low) * 1.1 - 0.5
    np.testing.assert_allclose(restored, volume.clip(*window), atol=2e-5)


def test_intensities_never_leave_the_range_of_the_source():
    volume = np.random.default_rng(0).integers(-32768, 32767, (1, 24, 40, 32)).astype(np.int16)
    views = views_of(volume, [[1, 2, 3], [14, 31, 30]], [[0, 0, 0], [5, 5, 5]], size=(16, 9, 20))
    assert views.shape == (2, 1, 16, 9, 20)
    assert views.min() >= volume.min()
    assert views.max() <= volume.max()
