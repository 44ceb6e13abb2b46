"""Sliding-window segmentation in bounded memory: scores become planes while windows go on.

Windows lie over a scan in rows, from its first plane to its last. Only the planes that a row still
reaches are held as scores, a slab as deep as one window; planes that it has passed are averaged,
handed on and forgotten. Values are those of MONAI's `sliding_window_inference` with Gaussian
weights.

Letters: B windows, C channels, K outputs, ZYX voxels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data.utils import compute_importance_map
from numpy.typing import NDArray
from torch import Tensor

from glmae_ray.config_base import Size
from glmae_ray.config_finetune import CropsConfig, InferenceConfig
from glmae_ray.scans import Scan
from glmae_ray.seeing import Learned, see
from glmae_ray.straight import Plane

Predict = Callable[[Tensor], Tensor]  # windows_BCZYX float32 -> scores_BKZYX of the same sides

_SIGMA = 0.125  # of the Gaussian weights, in window sides; MONAI's default


def segment(
    scan: Scan,
    predict: Predict,
    *,
    crops: CropsConfig,
    inference: InferenceConfig,
    learned: Learned | None = None,
    device: torch.device | str = "cpu",
    probabilities: NDArray[np.float32] | None = None,
) -> NDArray[np.uint8]:
    """Label every voxel of a scan, on its own grid, with the output of the highest score.

    Windows see it in `crops.spacing`, or as it lies if it lies as what was learned from does;
    scores, not labels, come back to its own grid, plane by plane.

    Args:
        scan: The scan.
        predict: Scores of windows; at most 256 outputs.
        crops: Side and spacing of windows.
        inference: Their overlap, and how many at a time.
        learned: How the scans lay that the network was trained on; None: as this one.
        device: Of the network, and of the scores while they are added up.
        probabilities: (K, Z, Y, X), such as a memory-mapped file, that takes the mean scores.

    Returns:
        uint8 (Z, Y, X), numbers of outputs.
    """
    seen = see(scan, crops, learned)
    windows = Windows(crops.size, inference.overlap, inference.batch)
    labels = np.empty(scan.shape, np.uint8)
    for where, scores in seen.brought_back(mean_scores(seen.scan, predict, windows, device=device)):
        labels[where] = _highest(scores).cpu().numpy()
        if probabilities is not None:
            probabilities[:, *where] = scores.cpu().numpy()
    return labels


def classify(
    array: NDArray[Any],
    row: Mapping[str, Any],
    predict: Predict,
    *,
    crops: CropsConfig,
    inference: InferenceConfig,
    learned: Learned | None = None,
    device: torch.device | str = "cpu",
) -> NDArray[np.float64]:
    """Probabilities (classes,) of a case: the mean over windows that cover its foreground box.

    Args:
        array: (C, Z, Y, X) as stored.
        row: Of the index, with the box.
        predict: Probabilities of windows.
        crops: Side and spacing of windows.
        inference: Their overlap, and how many at a time.
        learned: As of `segment`.
        device: Of the network.
    """
    ends = zip(row["box_start"], row["box_stop"], strict=True)
    box = tuple(slice(start, stop) for start, stop in ends)
    scan = Scan.of(np.ascontiguousarray(array[:, *box]), row, crops)
    windows = Windows(crops.size, inference.overlap, inference.batch)
    return mean_answer(see(scan, crops, learned).scan, predict, windows, device=device)


def _highest(scores: Tensor) -> Tensor:
    """The first output (of K, ...) with the highest score, uint8: `argmax` in a fifth of the time.

    That walks over outputs voxel by voxel, this over voxels output by output.
    """
    best, labels = scores[0], torch.zeros_like(scores[0], dtype=torch.uint8)
    for number, others in enumerate(scores[1:], start=1):
        labels.masked_fill_(others > best, number)
        best = torch.maximum(best, others)
    return labels


@dataclass(frozen=True)
class Windows:
    """How windows lie over a scan.

    Attributes:
        size: (Z, Y, X) in voxels.
        overlap: Of neighbours, as a share of a side.
        batch: How many go through the network at a time.
    """

    size: Size
    overlap: float
    batch: int

    def starts(self, shape: Size) -> list[list[int]]:
        """Where windows begin along Z, Y and X of a scan; before it where it is smaller."""
        return [self._along(side, part) for side, part in zip(shape, self.size, strict=True)]

    def _along(self, side: int, part: int) -> list[int]:
        if side <= part:
            return [-((part - side) // 2)]
        step = max(1, int(part * (1 - self.overlap)))
        return [*range(0, side - part, step), side - part]


@torch.inference_mode()
def mean_scores(
    scan: Scan, predict: Predict, windows: Windows, *, device: torch.device | str = "cpu"
) -> Iterator[Plane]:
    """The weighted means of the scores of all windows, plane after plane along Z, float32."""
    slab = _Slab(windows, scan.shape, device=device)
    for row, z in enumerate(slab.along_z):
        corners = [(z, *corner) for corner in slab.corners]
        for corner, scores_KZYX in _scores(scan, predict, windows, corners, device=device):
            slab.add(corner[1:], scores_KZYX)
        yield from slab.finish(row)


@torch.inference_mode()
def mean_answer(
    scan: Scan, predict: Predict, windows: Windows, *, device: torch.device | str = "cpu"
) -> NDArray[np.float64]:
    """The mean (K,) of one answer a window, as a classifier gives them, all windows alike."""
    corners = list(itertools.product(*windows.starts(scan.shape)))
    answers = [a for _, a in _scores(scan, predict, windows, corners, device=device)]
    return torch.stack(answers).double().mean(0).cpu().numpy()


def _scores(
    scan: Scan,
    predict: Predict,
    windows: Windows,
    corners: Sequence[Sequence[int]],
    *,
    device: torch.device | str,
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Each window's corner, and what the network says of it."""
    for first in range(0, len(corners), windows.batch):
        batch = corners[first : first + windows.batch]
        cuts = np.stack([scan.cut(corner, windows.size) for corner in batch])
        yield from zip(batch, predict(torch.from_numpy(cuts).to(device)), strict=True)


class _Slab:
    """Sums of weighted scores in the planes that a row of windows reaches."""

    def __init__(self, windows: Windows, shape: Size, *, device: torch.device | str) -> None:
        self.along_z, *across = windows.starts(shape)
        self.corners = list(itertools.product(*across))  # (y, x) of the windows of a row
        self._shape, self._size = shape, windows.size
        self._origin = across[0][0], across[1][0]  # before the scan where it is smaller
        weight_ZYX = compute_importance_map(
            windows.size, mode="gaussian", sigma_scale=_SIGMA, device=device
        )
        self._weight_ZYX = weight_ZYX
        sides = (max(pair) for pair in zip(windows.size[1:], shape[1:], strict=True))
        self._row_ZYX = weight_ZYX.new_zeros(windows.size[0], *sides)  # weights of one row
        for corner in self.corners:
            self._row_ZYX[self._place(corner)] += weight_ZYX
        self._sums_KZYX = weight_ZYX.new_zeros(0)

    def add(self, corner: Sequence[int], scores_KZYX: Tensor) -> None:
        """Add one window of the current row."""
        if not len(self._sums_KZYX):  # how many outputs there are shows here
            self._sums_KZYX = self._row_ZYX.new_zeros(len(scores_KZYX), *self._row_ZYX.shape)
        self._sums_KZYX[:, *self._place(corner)].addcmul_(scores_KZYX.float(), self._weight_ZYX)

    def finish(self, row: int) -> Iterator[Plane]:
        """The planes that no later row reaches; the others move up."""
        sums_KZYX, depth, z = self._sums_KZYX, self._size[0], self.along_z[row]
        is_last = row + 1 == len(self.along_z)
        passed = depth if is_last else self.along_z[row + 1] - z
        pairs = zip(self._origin, self._shape[1:], strict=True)
        inside = tuple(slice(-first, side - first) for first, side in pairs)
        for n in range(passed):
            if 0 <= z + n < self._shape[0]:
                offsets = (z + n - start for start in self.along_z[: row + 1])
                reached = [self._row_ZYX[offset] for offset in offsets if offset < depth]
                total_YX = torch.stack(reached).sum(0)
                yield z + n, (sums_KZYX[:, n] / total_YX)[:, *inside]
        for n in range(depth - passed):  # plane by plane: the two ranges may overlap
            sums_KZYX[:, n] = sums_KZYX[:, n + passed]
        sums_KZYX[:, depth - passed :] = 0

    def _place(self, corner: Sequence[int]) -> tuple[slice, slice, slice]:
        """Where a window lies in the slab."""
        y, x = (
            slice(at - first, at - first + part)
            for at, first, part in zip(corner, self._origin, self._size[1:], strict=True)
        )
        return slice(None), y, x
