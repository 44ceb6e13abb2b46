"""Views against torch's resize, and the facts that make them trustworthy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glmae_ray.blocks import Blocks
from glmae_ray.resizing import axis_taps, resize
from glmae_ray.views import Cut, Source, choose_level, make_views

FACTORS = ((1, 1, 1), (1, 2, 2), (2, 4, 4))


class Pyramid:
    """A store in memory: block means of one volume, anisotropic levels."""

    def __init__(self, volume: np.ndarray) -> None:
        self.volume = volume
        self.asked: list[tuple[int, int]] = []

    def read_blocks(self, requests):
        crops = []
        for _, level, (start, stop) in requests:
            self.asked.append((level, int(np.prod(np.subtract(stop, start)))))
            box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
            crops.append(Blocks.whole(self.level(level)[(slice(None), *box)]))
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


def source(window: tuple[float, float] = (-1000.0, 1000.0), *, is_integer: bool = True) -> Source:
    windows = np.tile(window, (2, 1))
    return Source("a", (24, 40, 32), FACTORS, is_integer, windows, np.array([-500.0, -500.0]))


def views_of(
    volume: np.ndarray | Pyramid, *boxes, size, case: Source | None = None, level_share: float = 1.0
) -> np.ndarray:
    pyramid = volume if isinstance(volume, Pyramid) else Pyramid(volume)
    views = np.empty((len(boxes), len(pyramid.volume), *size), np.int16)
    cuts = [Cut(np.array(box), view) for box, view in zip(boxes, views, strict=True)]
    make_views(pyramid, case or source(), cuts, level_share=level_share)
    return views


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
    ours = np.empty((1, *sizes), np.float32)
    resize(Blocks.whole(volume), taps, ours)
    step = torch.tensor(volume)
    for axis in (1, 2, 3):  # torch has the filter in 2-D only
        flat = step.movedim(axis, -1).flatten(0, 2)[None, None]
        out = F.interpolate(
            flat, size=(flat.shape[2], sizes[axis - 1]), mode="bilinear", antialias=True
        )
        rest = [side for number, side in enumerate(step.shape) if number != axis]
        step = out[0, 0].reshape(*rest, sizes[axis - 1]).movedim(-1, axis)
    np.testing.assert_allclose(ours, step.numpy(), atol=2e-5)


def test_the_coarsest_level_that_is_fine_enough_is_read():
    def level(*sides: int, share: float = 1.0) -> int:
        cut = Cut(np.array([[0, 0, 0], sides]), np.empty((1, 8, 8, 8), np.int16))
        return choose_level(cut.box, cut.out.shape[1:], FACTORS, share)

    assert level(8, 8, 8) == 0
    assert level(8, 16, 16) == 1
    assert level(16, 32, 32) == 2
    assert level(15, 40, 32) == 1  # one axis too short for level 2
    assert level(4, 4, 4) == 0
    assert level(12, 40, 32, share=0.75) == 2
    assert level(11, 40, 32, share=0.75) == 1


def test_every_level_puts_the_anatomy_in_the_same_place():
    z, y, x = np.meshgrid(*(np.arange(side) for side in (24, 40, 32)), indexing="ij")
    ramp = np.stack([40 * z + 20 * y + 30 * x] * 2).astype(
        np.int16
    )  # any symmetric filter keeps a ramp
    box = np.array([[4, 4, 2], [22, 37, 30]])
    for size in ((18, 33, 28), (17, 16, 14), (9, 8, 7), (5, 3, 4)):
        pyramid = Pyramid(ramp)
        view = views_of(pyramid, box, size=size)[0, 0]
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
    views_of(pyramid, [[2, 2, 2], [10, 10, 10]], [[5, 20, 9], [13, 28, 17]], size=(8, 8, 8))
    assert all(voxels <= 10**3 for _, voxels in pyramid.asked)


def test_floating_point_cases_span_the_int16_codes_between_the_ends_of_their_window():
    volume = smooth_volume(np.float32) / 1000
    window = (-0.5, 0.6)
    case = source(window, is_integer=False)
    views = views_of(volume, [[0, 0, 0], [24, 40, 32]], size=(24, 40, 32), case=case)
    low, high = case.coded_window[0]
    restored = (views[0] - low) / (high - low) * 1.1 - 0.5
    np.testing.assert_allclose(restored, volume.clip(*window), atol=2e-5)


def test_intensities_never_leave_the_range_of_the_source():
    volume = np.random.default_rng(0).integers(-32768, 32767, (2, 24, 40, 32)).astype(np.int16)
    views = views_of(volume, [[1, 2, 3], [14, 31, 30]], [[0, 0, 0], [5, 5, 5]], size=(16, 9, 20))
    assert views.shape == (2, 2, 16, 9, 20)
    assert views.min() >= volume.min()
    assert views.max() <= volume.max()


def test_a_view_is_air_where_no_channel_exceeds_the_tissue_threshold():
    case = source((-0.5, 0.5), is_integer=False)
    thin = Source("a", case.shape, FACTORS, True, case.window, np.array([-500.0, 40.0]))
    view = np.full((2, 4, 5, 6), -900, np.int16)
    assert thin.is_air(view)
    view[1, 2, 3, 4] = 41
    assert not thin.is_air(view)
    codes = Source("a", case.shape, FACTORS, False, case.window, np.array([0.0, 0.0]))
    assert codes.is_air(np.zeros((2, 4, 5, 6), np.int16))
    assert not codes.is_air(np.ones((2, 4, 5, 6), np.int16))


def reference(crop: np.ndarray, taps: list) -> np.ndarray:
    """The resize in NumPy, an operation at a time, in the order of the compiled one."""
    planes = crop.astype(np.float32)
    for axis in (1, 2, 0):
        shape = [1, 1, 1]
        shape[axis] = -1
        terms = [
            planes.take(index, axis=axis) * weight.reshape(shape)
            for index, weight in zip(taps[axis].index, taps[axis].weight, strict=True)
        ]
        planes = terms[0]
        for term in terms[1:]:
            planes = planes + term
    return planes


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_the_compiled_resize_equals_numpys_arithmetic_to_the_last_bit(dtype):
    volume = np.random.default_rng(1).normal(0, 900, (61, 47, 83)).astype(dtype)
    for box, size in (
        ([[3, 0, 7], [60, 40, 80]], (25, 33, 19)),
        ([[0, 5, 9], [12, 20, 31]], (31, 16, 40)),
        ([[0, 0, 0], [61, 47, 83]], (61, 20, 160)),
    ):
        taps = [
            axis_taps(np.array(box)[:, axis], 1, volume.shape[axis], size[axis])
            for axis in range(3)
        ]
        crop = volume[tuple(slice(t.start, t.stop) for t in taps)]
        out = np.empty((1, *size), np.float32)
        resize(Blocks.whole(crop[None]), taps, out)
        assert np.array_equal(out[0].view(np.uint32), reference(crop, taps).view(np.uint32))
