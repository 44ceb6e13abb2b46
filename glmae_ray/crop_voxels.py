"""Boxes and a store become crops: float32 intensities as the network sees them, and labels.

Along each axis a box reaches over so many level-0 voxels as the crop's millimetres take, whole or
not. Intensities come from the coarsest pyramid level that is at least as fine as the crop, resized
as views are; labels are those of the nearest level-0 voxel. What lies outside the scan is air.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from glmae_ray import views
from glmae_ray.blocks import Blocks
from glmae_ray.intensity import Window
from glmae_ray.resizing import axis_taps, resize
from glmae_ray.store.items import NNUNET_LABELS
from glmae_ray.views import Box, Size, choose_level

Outputs = tuple[tuple[int, int], ...]  # value in a label map, output of the network


class Reader(views.Reader, Protocol):
    """What a crop needs of a store, beside what a view does."""

    def read_label_blocks(self, requests: Sequence[tuple[str, str, Box | None]]) -> list[Blocks]:
        """Read boxes (case, map, box in level-0 voxels) as (1, Z, Y, X) blocks of integers."""


@dataclass(frozen=True)
class CropSource:
    """The facts about one case that crops need.

    Attributes:
        case_id: Its id in the store.
        shape: (Z, Y, X) of level 0.
        factors: Level-0 voxels per voxel of each level, (Z, Y, X).
        window: What becomes of its intensities.
        air: float32 (C,), what is outside of it as the network sees it.
        outputs: Value in its label map -> output of the network.
    """

    case_id: str
    shape: Size
    factors: tuple[Size, ...]
    window: Window
    air: NDArray[np.float32]
    outputs: Outputs


def cut_images(
    reader: Reader, source: CropSource, boxes: NDArray[np.float64], out: NDArray[np.float32]
) -> None:
    """Cut crops out of a scan; all boxes are read together.

    Args:
        reader: The store.
        source: The case.
        boxes: (V, 2, 3): start and stop along Z, Y, X in level-0 voxels.
        out: (V, C, Z, Y, X).
    """
    size = out.shape[2:]
    requests, cuts = [], []
    for box, crop in zip(boxes, out, strict=True):
        axes, level = _axes(box, source.shape, size), choose_level(box, size, source.factors)
        if any(axis.is_padded(side) for axis, side in zip(axes, size, strict=True)):
            crop[...] = source.air[:, None, None, None]
        if any(axis.is_empty for axis in axes):
            continue
        taps = [
            axis_taps(np.array([axis.start, axis.stop]), factor, length, len(axis.nearest))
            for axis, factor, length in zip(axes, source.factors[level], source.shape, strict=True)
        ]
        within = tuple(t.start for t in taps), tuple(t.stop for t in taps)
        requests.append((source.case_id, level, within))
        cuts.append((crop[:, *(axis.inside for axis in axes)], taps))
    for blocks, (inside, taps) in zip(reader.read_blocks(requests), cuts, strict=True):
        voxels = np.empty(inside.shape, np.float32)
        resize(blocks, taps, voxels, code=source.window.codes)
        inside[...] = voxels


def cut_labels(
    reader: Reader, source: CropSource, boxes: NDArray[np.float64], out: NDArray[np.uint8]
) -> None:
    """Cut the same crops out of the label map, as outputs of the network.

    Args:
        reader: The store.
        source: The case.
        boxes: (V, 2, 3): start and stop along Z, Y, X in level-0 voxels.
        out: (V, Z, Y, X).
    """
    out[...] = 0
    requests, cuts = [], []
    for box, crop in zip(boxes, out, strict=True):
        axes = _axes(box, source.shape, out.shape[1:])
        if any(axis.is_empty for axis in axes):
            continue
        start = tuple(int(axis.nearest[0]) for axis in axes)
        stop = tuple(int(axis.nearest[-1]) + 1 for axis in axes)
        requests.append((source.case_id, NNUNET_LABELS, (start, stop)))
        cuts.append((crop[tuple(axis.inside for axis in axes)], [axis.nearest for axis in axes]))
    table = _output_table(source.outputs)
    for blocks, (inside, places) in zip(reader.read_label_blocks(requests), cuts, strict=True):
        blocks.pick(places, table, inside)


def read_outputs(reader: Reader, case_id: str, outputs: Outputs) -> NDArray[np.uint8]:
    """The whole label map of a case, (Z, Y, X), as outputs of the network.

    Args:
        reader: The store.
        case_id: The case.
        outputs: Value in the label map, output of the network.
    """
    (blocks,) = reader.read_label_blocks([(case_id, NNUNET_LABELS, None)])
    label = np.empty(blocks.shape, np.uint8)
    blocks.pick([np.arange(side) for side in blocks.shape], _output_table(outputs), label)
    return label


def _output_table(outputs: Outputs) -> NDArray[np.uint8]:
    """What each value of a label map is for the network, (65536,); negative ones from the end."""
    table = np.zeros(2**16, np.uint8)
    for value, output in outputs:
        table[value] = output
    return table


class _Axis(NamedTuple):
    """Where the voxels of a crop lie along one axis of the scan."""

    inside: slice  # those whose centre is inside
    start: float  # of these in level-0 voxels
    stop: float
    nearest: NDArray[np.int64]  # level-0 voxel that holds the centre of each

    @property
    def is_empty(self) -> bool:
        return not len(self.nearest)

    def is_padded(self, side: int) -> bool:
        return len(self.nearest) < side


def _axes(box: NDArray[np.float64], shape: Size, size: Sequence[int]) -> list[_Axis]:
    return [_axis(*box[:, n].tolist(), length=shape[n], side=size[n]) for n in range(3)]


def _axis(start: float, stop: float, *, length: int, side: int) -> _Axis:
    step = (stop - start) / side
    centres = start + (np.arange(side) + 0.5) * step
    first, last = np.searchsorted(centres, [0, length]).tolist()
    nearest = np.floor(centres[first:last]).astype(np.int64)
    return _Axis(slice(first, last), start + first * step, start + last * step, nearest)
