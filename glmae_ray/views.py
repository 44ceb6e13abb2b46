"""Boxes and a store become views: fixed-shape int16 arrays, anti-aliased, the same on any machine.

A box is read from the coarsest pyramid level that is fine enough for the view, all boxes of a
sample together, and resized along one axis after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from glmae_ray.blocks import Blocks
from glmae_ray.resizing import Code, Taps, axis_taps, resize

Size = tuple[int, int, int]
Box = Sequence[Sequence[int]]  # start and stop along Z, Y, X

# Views of floating-point cases span these codes between the ends of their window.
_CODES = (-32767.0, 32767.0)


class Reader(Protocol):
    """What a view needs of a store."""

    def read_blocks(self, requests: Sequence[tuple[str, int, Box]]) -> list[Blocks]:
        """Read boxes (case, level, box in that level's voxels) as (C, Z, Y, X) blocks."""


@dataclass(frozen=True)
class Source:
    """The facts about one case that view making needs.

    Attributes:
        case_id: Its id in the store.
        shape: (Z, Y, X) of level 0.
        factors: Level-0 voxels per voxel of each level, (Z, Y, X).
        is_integer: Whether its intensities are whole numbers.
        window: float64 (C, 2), the intensities that become 0 and 1.
        tissue: float64 (C,), the intensity that air does not exceed.
    """

    case_id: str
    shape: Size
    factors: tuple[Size, ...]
    is_integer: bool
    window: NDArray[np.float64]
    tissue: NDArray[np.float64]

    @property
    def codes(self) -> list[Code]:
        """How each channel's intensities become int16; none: as they are."""
        if self.is_integer:
            return []
        first, last = _CODES
        scales = [(last - first) / (high - low) for low, high in self.window]
        return [
            Code(low, high, scale, first - low * scale)
            for (low, high), scale in zip(self.window.tolist(), scales, strict=True)
        ]

    @property
    def coded_window(self) -> NDArray[np.float64]:
        """The window in the units of the views, (C, 2)."""
        return self.window if self.is_integer else np.tile(_CODES, (len(self.window), 1))

    def is_air(self, view: NDArray[np.int16]) -> bool:
        """Whether a view (C, Z, Y, X) shows nothing but air in every channel."""
        limits = self.tissue
        if not self.is_integer:
            pairs = zip(self.tissue, self.codes, strict=True)
            limits = np.array([value * code.scale + code.shift for value, code in pairs])
        return bool((view.max(axis=(1, 2, 3)) <= limits).all())


class Cut(NamedTuple):
    """One view to make: where it lies, and the array (C, Z, Y, X) int16 that takes it."""

    box: NDArray[np.int64]  # (2, 3): start and stop along Z, Y, X in level-0 voxels
    out: NDArray[np.int16]


def make_views(reader: Reader, source: Source, cuts: Sequence[Cut], *, level_share: float) -> None:
    """Cut views out of a case and resize them; all boxes are read together.

    Integer cases keep their intensities; floating-point ones are spread over the int16 range, so
    that `source.coded_window` is what becomes 0 and 1.

    Args:
        reader: The store.
        source: The case.
        cuts: The views, of any sizes.
        level_share: See `choose_level`.
    """
    levels = [choose_level(cut.box, cut.out.shape[1:], source.factors, level_share) for cut in cuts]
    taps = [_taps(cut, source, level) for cut, level in zip(cuts, levels, strict=True)]
    boxes = [(tuple(t.start for t in axes), tuple(t.stop for t in axes)) for axes in taps]
    requests = [(source.case_id, level, box) for level, box in zip(levels, boxes, strict=True)]
    codes = source.codes
    for blocks, axes, cut in zip(reader.read_blocks(requests), taps, cuts, strict=True):
        resize(blocks, axes, cut.out, code=codes)


def choose_level(
    box: NDArray[Any], size: Sequence[int], factors: tuple[Size, ...], share: float = 1.0
) -> int:
    """Coarsest level on which a box has enough voxels along every axis.

    Args:
        box: (2, 3): start and stop along Z, Y, X in level-0 voxels.
        size: What becomes of it, voxels along Z, Y, X.
        factors: Level-0 voxels per voxel of each level.
        share: How many voxels of the level are enough for one of the result.
    """
    sides, needed = box[1] - box[0], share * np.array(size)
    enough = [level for level, factor in enumerate(factors) if np.all(sides >= factor * needed)]
    return max(enough, default=0)


def _taps(cut: Cut, source: Source, level: int) -> list[Taps]:
    return [
        axis_taps(
            cut.box[:, axis],
            source.factors[level][axis],
            source.shape[axis],
            cut.out.shape[1 + axis],
        )
        for axis in range(3)
    ]
