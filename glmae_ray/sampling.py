"""The plan: sample number -> case, boxes of its views, mask seeds; pure, so any machine agrees.

Everything comes from raw words of the counter-based Philox generator, whose output is fixed by
its definition; NumPy's distributions may change between versions and are not used.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from glmae_ray.config import ViewsConfig

KINDS = ("global", "local")
_WORDS_PER_VIEW = 5  # scale, position along Z, Y, X, mask seed
_ORDER_STREAM = len(KINDS)


class ViewDraw(NamedTuple):
    """The views of one kind of one sample."""

    boxes: np.ndarray  # int64 (V, 2, 3): start and stop along Z, Y, X in level-0 voxels
    mask_seeds: np.ndarray  # int64 (V,), not negative


@dataclass(frozen=True)
class Plan:
    """What each sample of a run is made of.

    Each pass over the cases is a new permutation of them; sample n is number n % N of pass
    n // N. A view's crop takes one share of every axis of the case's foreground box and lies
    anywhere in it; local views are not nested in global ones (METHOD.md, Views).

    Attributes:
        seed: The run's seed.
        foreground: int64 (N, 2, 3) foreground boxes of the cases, level-0 voxels.
        views: How many views of a kind, and their shares of the box.
    """

    seed: int
    foreground: np.ndarray
    views: ViewsConfig

    def case(self, number: int) -> int:
        """Row of the case that sample `number` shows."""
        cases = len(self.foreground)
        return int(_permutation(self.seed, number // cases, cases)[number % cases])

    def draw(self, number: int, kind: str) -> ViewDraw:
        """Boxes and mask seeds of the views of one kind of sample `number`."""
        count = getattr(self.views, f"{kind}_count")
        low, high = getattr(self.views, f"{kind}_scale")
        words = _words(self.seed, KINDS.index(kind), number, count * _WORDS_PER_VIEW)
        words = words.reshape(count, _WORDS_PER_VIEW)
        start, stop = self.foreground[self.case(number)]
        shares = low + (high - low) * _unit(words[:, :1])
        sides = np.maximum(1, np.rint(shares * (stop - start)).astype(np.int64))
        room = stop - start - sides + 1
        first = start + (_unit(words[:, 1:4]) * room).astype(np.int64)
        return ViewDraw(np.stack([first, first + sides], axis=1), (words[:, 4] >> 1).astype(int))


def _words(seed: int, stream: int, number: int, count: int) -> np.ndarray:
    """`count` 64-bit words that belong to (seed, stream, number) alone."""
    generator = np.random.Philox(key=[seed, stream], counter=[0, number, 0, 0])
    return generator.random_raw(count)


def _unit(words: np.ndarray) -> np.ndarray:
    """The upper 53 bits as float64 in [0, 1)."""
    return (words >> 11) * 2.0**-53


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, number: int, cases: int) -> np.ndarray:
    """The order of the cases in pass `number`, (cases,)."""
    return np.argsort(_words(seed, _ORDER_STREAM, number, cases), kind="stable")
