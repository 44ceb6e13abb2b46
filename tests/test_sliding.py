"""Sliding windows against MONAI's, on grids of unequal sides; memory, and other spacings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference

from glmae_ray.config_finetune import CropsConfig, InferenceConfig
from glmae_ray.intensity import Window
from glmae_ray.sliding import Scan, Windows, mean_scores, segment

AIR = np.zeros(1, np.float32)


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
    scan = Scan.of(array, row, CropsConfig(intensity="zscore"))
    np.testing.assert_allclose(scan.cut((0, -1, -1), (1, 2, 4)), [[[[1, 1, 1, 1], [1, 1, 2, 1]]]])
