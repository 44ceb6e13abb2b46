"""Sliding windows against MONAI's, on grids of unequal sides; memory, and other spacings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from nibabel.eulerangles import euler2mat
from scipy import ndimage

from glmae_ray.config_finetune import CropsConfig, InferenceConfig
from glmae_ray.intensity import Window
from glmae_ray.scans import STRAIGHT, Scan, tilt_deg
from glmae_ray.seeing import Learned, see
from glmae_ray.sliding import Windows, mean_scores, segment

AIR = np.zeros(1, np.float32)
MM = Learned((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), 0.0)


def window(channels: int = 1, *, clips: bool = True) -> Window:
    return Window(np.tile((-175.0, 250.0), (channels, 1)), clips)


def scan_of(shape, *, spacing=(3.0, 0.9, 1.1), channels=1, seed=0) -> Scan:
    rng = np.random.default_rng(seed)
    array = rng.integers(-300, 400, (channels, *shape)).astype(np.int16)
    return Scan(array, spacing, window(channels), np.zeros(channels, np.float32))


def network(outputs: int, *, channels=1, seed=0) -> torch.nn.Module:
    """Sees its neighbourhood and the edges of its window, as a segmenter does."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv3d(channels, outputs, (3, 5, 3), padding="same"), torch.nn.Softmax(dim=1)
    ).requires_grad_(False)


def by_monai(scan: Scan, predict, windows: Windows) -> torch.Tensor:
    image = torch.from_numpy(scan.array.astype(np.float32))[None]
    image = ((image + 175) / 425).clip(0, 1)
    return sliding_window_inference(
        image, windows.size, windows.batch, predict, overlap=windows.overlap, mode="gaussian"
    )[0]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize(
    "shape", [(37, 29, 41), (16, 12, 20), (9, 40, 13), (50, 7, 11), (33, 12, 21)]
)
def test_mean_scores_are_those_of_monai(shape, overlap):
    scan, windows, predict = scan_of(shape), Windows((16, 12, 20), overlap, 3), network(4)
    numbers, planes = zip(*mean_scores(scan, predict, windows), strict=True)
    assert numbers == tuple(range(shape[0]))
    expected = by_monai(scan, predict, windows)
    torch.testing.assert_close(torch.stack(planes, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_a_scan_is_labelled_with_the_highest_mean_and_probabilities_are_the_means():
    scan, predict = scan_of((21, 18, 33), channels=2), network(3, channels=2)
    crops, inference = CropsConfig(size=(8, 12, 10)), InferenceConfig(overlap=0.4, batch=2)
    kept = np.empty((3, *scan.shape), np.float32)
    labels = segment(scan, predict, crops=crops, inference=inference, probabilities=kept)
    expected = by_monai(scan, predict, Windows((8, 12, 10), 0.4, 2))
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, expected.argmax(0).numpy())
    np.testing.assert_allclose(kept, expected.numpy(), atol=1e-5)


def test_every_window_goes_through_the_network_once():
    scan, windows = scan_of((37, 29, 41)), Windows((16, 12, 20), 0.5, 4)
    sizes = []

    def predict(windows_BCZYX):
        sizes.append(tuple(windows_BCZYX.shape))
        return windows_BCZYX

    list(mean_scores(scan, predict, windows))
    z, y, x = windows.starts(scan.shape)
    assert sum(size[0] for size in sizes) == len(z) * len(y) * len(x)
    assert {size[1:] for size in sizes} == {(1, 16, 12, 20)}


def test_planes_come_while_windows_go_on_and_no_later_row_changes_them():
    scan, windows = scan_of((40, 7, 9)), Windows((8, 7, 9), 0.5, 1)
    seen = []

    def predict(windows_BCZYX):
        seen.append(len(windows_BCZYX))
        return windows_BCZYX

    rows_seen = {z: len(seen) for z, _ in mean_scores(scan, predict, windows)}
    assert rows_seen == {z: min(z // 4 + 1, 9) for z in range(40)}


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (6.0, 2.0, 2.0)])
def test_scores_come_back_from_another_spacing_to_the_own_grid(spacing):
    shape, own = (19, 34, 27), (3.0, 0.9, 1.1)
    array = np.full((1, *shape), -175, np.int16)
    array[0, 4:14, 9:25, 6:21] = 250
    scan = Scan(array, own, window(), AIR)
    crops = CropsConfig(size=(12, 16, 12), spacing=spacing)

    def predict(windows_BCZYX):
        return torch.cat([1 - windows_BCZYX, windows_BCZYX], dim=1)

    labels = segment(scan, predict, crops=crops, inference=InferenceConfig())
    truth = array[0] > 0
    dice = 2 * (truth & (labels == 1)).sum() / (truth.sum() + (labels == 1).sum())
    assert labels.shape == shape
    assert dice > 0.93
    # Nothing is shifted: the centre of what was found is that of what is there.
    centres = [np.argwhere(mask).mean(axis=0) for mask in (truth, labels == 1)]
    np.testing.assert_allclose(*centres, atol=0.2)


def test_a_scan_resampled_to_its_own_spacing_is_itself():
    scan = scan_of((19, 34, 27))
    assert scan.resampled((3.1, 0.9, 1.1)) is scan or scan.resampled((3.0, 0.9, 1.1)) is scan
    other = scan.resampled((1.5, 1.8, 1.1))
    assert other.shape == (38, 17, 27)
    np.testing.assert_allclose(other.spacing, (1.5, 1.8, 1.1))


def test_what_lies_around_a_small_scan_is_its_air_in_the_units_of_the_network():
    array = np.array([[[[10, 20]]]], np.int16)
    row = {"modality": "MR", "spacing": [1, 1, 1], "minimum": [10.0], "mean": [0.0], "std": [10.0]}
    row["affine"] = np.diag([1.0, 1, 1, 1])[[2, 1, 0, 3]].ravel()
    scan = Scan.of(array, row, CropsConfig(intensity="zscore"))
    np.testing.assert_allclose(scan.cut((0, -1, -1), (1, 2, 4)), [[[[1, 1, 1, 1], [1, 1, 2, 1]]]])


def turned(degrees: float) -> np.ndarray:
    """Axes of a scan that was turned about all three of the patient's."""
    matrix = euler2mat(*np.deg2rad([degrees, -degrees / 2, degrees / 3]))
    return matrix[:, ::-1]


@pytest.mark.parametrize("degrees", [4, 25])
def test_scores_of_a_straightened_scan_come_back_to_every_voxel_of_its_own(degrees):
    scan = replace(scan_of((14, 19, 23), spacing=(2.5, 0.8, 1.0)), axes=turned(degrees))
    straight_mm = Learned((0.5, 1.1, 1.1), (2.0, 1.4, 1.4), 0.0)
    seen = see(scan, CropsConfig(), straight_mm)
    assert seen.straight is not None
    assert seen.scan.axes is STRAIGHT
    np.testing.assert_allclose(seen.scan.spacing, (2, 1.1, 1.1), rtol=0.1)
    rng = np.random.default_rng(0)
    scores = rng.random((3, *seen.scan.shape)).astype(np.float32)
    found = np.full((3, *scan.shape), np.nan, np.float32)
    times = np.zeros(scan.shape, int)
    planes = ((z, torch.from_numpy(scores[:, z])) for z in range(seen.scan.shape[0]))
    for where, part in seen.brought_back(planes):
        found[:, *where] = part.numpy()
        times[where] += 1
    np.testing.assert_array_equal(times, 1)
    # The middles of both are the same point; from there every voxel has its place in mm.
    index = np.indices(scan.shape).reshape(3, -1)
    mm = turned(degrees) @ ((index.T - (np.array(scan.shape) - 1) / 2) * scan.spacing).T
    place = (mm[::-1].T / seen.scan.spacing + (np.array(seen.scan.shape) - 1) / 2).T
    slack = (np.array(seen.scan.shape) * seen.scan.spacing - extent(scan)) / 2
    place -= (slack / seen.scan.spacing)[:, None]  # the last voxels may reach further than the scan
    expected = [ndimage.map_coordinates(k, place, order=1, mode="nearest") for k in scores]
    np.testing.assert_allclose(found.reshape(3, -1), expected, atol=2e-4)


def extent(scan: Scan) -> np.ndarray:
    """Of a scan along the patient's Z, Y, X, in mm."""
    return (np.abs(scan.axes) @ (np.array(scan.shape) * scan.spacing))[::-1]


def test_an_oblique_copy_gets_the_labels_of_the_scan():
    """A ball and a bar, sampled on straight axes and on ones at 20 degrees and in finer voxels."""

    def sample(shape, spacing, axes):
        index = np.indices(shape).reshape(3, -1).T
        x, y, z = axes @ ((index - (np.array(shape) - 1) / 2) * spacing).T
        ball = np.hypot(np.hypot(x - 6, y), z) < 8
        bar = (np.abs(x + 9) < 4) & (np.abs(y) < 12) & (np.abs(z) < 5)
        hu = np.select([ball, bar], [200, -150], 25).reshape(1, *shape)
        return Scan(hu.astype(np.int16), spacing, window(), np.float32([200 / 425]), axes)

    def predict(windows):
        values = windows[:, 0] * 425 - 175
        return torch.stack([-(values - hu).abs() for hu in (25, -150, 200)], dim=1)

    crops, inference = CropsConfig(size=(16, 24, 24)), InferenceConfig()
    for axes in (STRAIGHT, turned(20)):
        scan = sample((44, 48, 60), (0.8, 0.8, 0.8), axes)
        room = np.full((3, *scan.shape), np.nan, np.float32)
        labels = segment(
            scan,
            predict,
            crops=crops,
            inference=inference,
            learned=MM,
            probabilities=room,
        )
        truth = np.select([scan.array[0] == -150, scan.array[0] == 200], [1, 2], 0)
        assert np.isfinite(room).all()
        for value in (1, 2):
            both = ((labels == value) & (truth == value)).sum()
            assert 2 * both / ((labels == value).sum() + (truth == value).sum()) > 0.9, value


def test_padding_around_a_turned_scan_is_left_out_and_is_background():
    scan = scan_of((12, 14, 16), spacing=(1.0, 1.0, 1.0))
    plain = replace(scan, axes=turned(20))
    sides = np.array(plain.shape)
    padded = np.full((1, *(sides + 8)), -77, np.int16)
    padded[:, 5:-3, 4:-4, 2:-6] = plain.array
    there = replace(plain, array=padded)
    whole, without = (see(of, CropsConfig(), MM).scan.shape for of in (plain, there))
    # Half a voxel at both ends, which a tool may have mixed with padding, along three axes.
    assert all(0 < had - has <= 2 for had, has in zip(whole, without, strict=True))

    def shown(windows):
        return torch.cat([torch.full_like(windows, 0.4), windows], dim=1)

    room = np.full((2, *padded.shape[1:]), np.nan, np.float32)
    sliding = {"crops": CropsConfig(size=(8, 8, 8)), "inference": InferenceConfig()}
    labels = segment(there, shown, **sliding, learned=MM, probabilities=room)
    assert np.isfinite(room).all()
    assert labels[5:-3, 4:-4, 2:-6].any()
    corners = np.ix_(range(2), (0, -1), (0, -1), (0, -1))
    np.testing.assert_array_equal(room[corners][0], 1)
    np.testing.assert_array_equal(room[corners][1], 0)
    uniform = replace(plain, array=np.full_like(plain.array, 5))
    assert min(see(uniform, CropsConfig(), MM).scan.shape) > 1


@pytest.mark.parametrize("step_mm", [0.5, 0.8, 1.0])
def test_a_turned_copy_within_padding_is_shown_as_the_scan_is(step_mm):
    """The same voxels at the same places, with no rim of padding; resampled as ITK does it."""
    shape, rng = (18, 26, 20), np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(0, 1, shape), 1.5)
    voxels = (40 + 150 * smooth / smooth.std()).clip(-170, 245).astype(np.float32)
    scan = Scan(voxels[None], (1.0, 1.0, 1.0), window(), AIR)

    axes = turned(10)
    sides = np.ceil(1.5 * np.array(shape) / step_mm).astype(int)
    own_mm = (np.indices(sides).reshape(3, -1).T - (sides - 1) / 2) * step_mm
    place = (own_mm @ (STRAIGHT.T @ axes).T + (np.array(shape) - 1) / 2).T
    copied = ndimage.map_coordinates(voxels, place, order=3, mode="nearest")
    is_outside = (np.abs(place.T - (np.array(shape) - 1) / 2) > np.array(shape) / 2).any(1)
    copied[is_outside] = -175
    copy = Scan(copied.reshape(1, *sides), (step_mm,) * 3, window(), AIR, axes)

    seen = see(copy, CropsConfig(), MM).scan
    assert seen.shape == shape
    off = np.abs(seen.array[0] - scan.window.apply(scan.array)[0])
    inner = off[2:-2, 2:-2, 2:-2]
    assert np.quantile(inner, 0.95) < 0.06
    # A rim of padding would be off by 0.5 of the window.
    faces = [np.take(off, end, axis).mean() for axis in range(3) for end in (0, -1)]
    assert max(faces) < 0.2, faces


def test_what_was_learned_from_is_left_as_it_lies():
    learned = Learned((1.0, 0.8, 0.8), (5.0, 1.0, 1.0), 10.0)
    for degrees, spacing in ((0, (3.0, 0.9, 0.9)), (8, (5.2, 0.78, 1.0))):
        scan = replace(scan_of((9, 8, 7), spacing=spacing), axes=turned(degrees))
        assert see(scan, CropsConfig(), learned).scan is scan
    assert see(scan, CropsConfig(), None).scan is scan
    assert tilt_deg(STRAIGHT) == 0
    assert learned.nearest((0.5, 0.9, 3.0)) == (1.0, 0.9, 1.0)
