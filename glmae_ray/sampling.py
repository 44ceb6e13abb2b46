"""The plan: sample number -> case, boxes of its views, mask seeds; pure, so any machine agrees."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from glmae_ray.config_data import ViewsConfig
from glmae_ray.passes import Passes, unit, words_of

KINDS = ("global", "local")
_WORDS_PER_VIEW = 5  # scale, position along Z, Y, X, mask seed


class ViewDraw(NamedTuple):
    """The views of one kind of one sample."""

    boxes: np.ndarray  # int64 (V, 2, 3): start and stop along Z, Y, X in level-0 voxels
    mask_seeds: np.ndarray  # int64 (V,), not negative


@dataclass(frozen=True, eq=False)
class Plan:
    """What each sample of a run is made of; the cases come as `Passes` shows them.

    A view's crop takes one share of every axis of the case's foreground box (decision: ours) and
    lies anywhere in it; local views are not nested in global ones (both verified: the paper's
    method figure).

    Attributes:
        seed: The run's seed.
        foreground: int64 (N, 2, 3) foreground boxes of the cases, level-0 voxels.
        views: How many views of a kind, and their shares of the box.
        weights: See `Passes`.
    """

    seed: int
    foreground: np.ndarray
    views: ViewsConfig
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check the weights.

        Raises:
            ValueError: See `Passes`.
        """
        Passes(self.seed, len(self.foreground), self.weights)

    @functools.cached_property
    def passes(self) -> Passes:
        """Which case each sample shows."""
        return Passes(self.seed, len(self.foreground), self.weights)

    def case(self, number: int) -> int:
        """See `Passes`."""
        return self.passes.case(number)

    def substitute(self, number: int, attempt: int) -> int:
        """See `Passes`."""
        return self.passes.substitute(number, attempt)

    def draw(
        self, number: int, kind: str, *, attempt: int = 0, case: int | None = None
    ) -> ViewDraw:
        """Boxes and mask seeds of the views of one kind of sample `number`.

        Args:
            number: The sample.
            kind: `global` or `local`.
            attempt: Above 0, other boxes, for views that came out as air; the seeds stay.
            case: Row of the case; None: that of the plan.
        """
        low, high = getattr(self.views, f"{kind}_scale")
        start, stop = self.foreground[self.case(number) if case is None else case]
        words = self._view_words(number, kind, attempt=attempt)
        shares = low + (high - low) * unit(words[:, :1])
        sides = np.maximum(1, np.rint(shares * (stop - start)).astype(np.int64))
        room = stop - start - sides + 1
        first = start + (unit(words[:, 1:4]) * room).astype(np.int64)
        seeds = (self._view_words(number, kind) if attempt else words)[:, 4] >> 1
        return ViewDraw(np.stack([first, first + sides], axis=1), seeds.astype(np.int64))

    def _view_words(self, number: int, kind: str, *, attempt: int = 0) -> np.ndarray:
        """Words of the views of one kind, uint64 (V, 5)."""
        count = getattr(self.views, f"{kind}_count") * _WORDS_PER_VIEW
        words = words_of(self.seed, KINDS.index(kind), number, count, attempt=attempt)
        return words.reshape(-1, _WORDS_PER_VIEW)
