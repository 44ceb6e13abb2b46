"""The plan: sample number -> case, boxes of its views, mask seeds; pure, so any machine agrees.

Everything comes from raw words of the counter-based Philox generator, whose output is fixed by
its definition, and from whole numbers; NumPy's distributions may change between versions and are
not used.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from glmae_ray.config_data import ViewsConfig

KINDS = ("global", "local")
_WORDS_PER_VIEW = 5  # scale, position along Z, Y, X, mask seed
# Streams of the generator; those of the views are numbered as KINDS.
_ORDER_STREAM, _SUBSTITUTE_STREAM = len(KINDS), len(KINDS) + 1
_WORD = 2**64 - 1


class ViewDraw(NamedTuple):
    """The views of one kind of one sample."""

    boxes: np.ndarray  # int64 (V, 2, 3): start and stop along Z, Y, X in level-0 voxels
    mask_seeds: np.ndarray  # int64 (V,), not negative


@dataclass(frozen=True, eq=False)
class Plan:
    """What each sample of a run is made of; no look-up takes longer because there are more cases.

    A pass has as many samples as there are cases; sample n is at place n % N of pass n // N, and
    each pass has an order of its own. Without weights a pass shows every case once. With weights
    it shows each as often as its weight is worth, N w / sum(w) times, rounded down or up, by an
    offset of the pass, so that in the long run the shares are exact. A view's crop takes one share
    of every axis of the case's foreground box (decision: ours) and lies anywhere in it; local views
    are not nested in global ones (both verified: the paper's method figure).

    Attributes:
        seed: The run's seed.
        foreground: int64 (N, 2, 3) foreground boxes of the cases, level-0 voxels.
        views: How many views of a kind, and their shares of the box.
        weights: float (N,), finite, not negative, not all 0; None: all alike.
    """

    seed: int
    foreground: np.ndarray
    views: ViewsConfig
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check the weights.

        Raises:
            ValueError: They are not one a case, negative, not finite, or all 0.
        """
        weights = self.weights
        if weights is None:
            return
        if weights.shape != (len(self.foreground),):
            raise ValueError(f"weights {weights.shape} for {len(self.foreground)} cases")
        if not (weights >= 0).all() or not 0 < weights.max() < math.inf:
            raise ValueError("weights have to be finite and not negative, at least one above 0")

    def case(self, number: int) -> int:
        """Row of the case that sample `number` shows; pinned, as is all below."""
        cases = len(self.foreground)
        pass_number, place = divmod(int(number), cases)
        offset, *keys = _pass_words(self.seed, pass_number, 1 + _rounds(cases))
        slot = _shuffled(place, cases, keys)
        if self.weights is None:
            return slot
        # Slot s stands at unit (offset + s total) / N of the cases' units laid end to end.
        total = int(self._ends[-1])
        return self._case_at((_below(offset, total) + slot * total) // cases)

    def substitute(self, number: int, attempt: int) -> int:
        """Row of the case that stands in where that of sample `number` cannot be read.

        By weight among the others; the same case where no other has any weight.

        Args:
            number: The sample.
            attempt: 1 for the first that stands in, 2 where that cannot be read either, ...
        """
        own = self.case(number)
        begin, end, total = own, own + 1, len(self.foreground)
        if self.weights is not None:
            begin = int(self._ends[own - 1]) if own else 0
            end, total = int(self._ends[own]), int(self._ends[-1])
        others = total - (end - begin)
        if others == 0:
            return own
        word = int(_words(self.seed, _SUBSTITUTE_STREAM, number, 1, attempt=attempt)[0])
        unit = _below(word, others)
        return self._case_at(unit if unit < begin else unit + end - begin)

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
        shares = low + (high - low) * _unit(words[:, :1])
        sides = np.maximum(1, np.rint(shares * (stop - start)).astype(np.int64))
        room = stop - start - sides + 1
        first = start + (_unit(words[:, 1:4]) * room).astype(np.int64)
        seeds = (self._view_words(number, kind) if attempt else words)[:, 4] >> 1
        return ViewDraw(np.stack([first, first + sides], axis=1), seeds.astype(np.int64))

    def _view_words(self, number: int, kind: str, *, attempt: int = 0) -> np.ndarray:
        """Words of the views of one kind, uint64 (V, 5)."""
        count = getattr(self.views, f"{kind}_count") * _WORDS_PER_VIEW
        words = _words(self.seed, KINDS.index(kind), number, count, attempt=attempt)
        return words.reshape(-1, _WORDS_PER_VIEW)

    def _case_at(self, unit: int) -> int:
        """Row of the case that holds a unit of weight; without weights each holds one."""
        if self.weights is None:
            return unit
        return int(np.searchsorted(self._ends, unit, side="right"))

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """Where each case's units of weight end, int64 (N,)."""
        assert self.weights is not None
        return np.cumsum(_whole(self.weights))


def _words(seed: int, stream: int, number: int, count: int, *, attempt: int = 0) -> np.ndarray:
    """`count` 64-bit words that belong to (seed, stream, number, attempt) alone."""
    generator = np.random.Philox(key=[seed, stream], counter=[0, number, attempt, 0])
    return generator.random_raw(count)


@functools.lru_cache(maxsize=4)
def _pass_words(seed: int, number: int, count: int) -> list[int]:
    """The words of pass `number`."""
    return _words(seed, _ORDER_STREAM, number, count).tolist()


def _unit(words: np.ndarray) -> np.ndarray:
    """The upper 53 bits as float64 in [0, 1)."""
    return (words >> 11) * 2.0**-53


def _below(word: int, bound: int) -> int:
    """A word as a whole number in [0, bound)."""
    return (word * bound) >> 64


def _shuffled(place: int, cases: int, keys: list[int]) -> int:
    """Where a permutation of range(cases) takes a place; the keys pick the permutation.

    Black and Rogaway, Ciphers with Arbitrary Finite Domains (2002): a Feistel network on a grid of
    at least as many cells, walked until it comes out inside. The grid has less than one row too
    many, so that for all but a few cases the first step does.
    """
    high_side, low_side = _grid(cases)
    while True:
        high, low = divmod(place, low_side)
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            high = (high + _splitmix(even, low)) % high_side
            low = (low + _splitmix(odd, high)) % low_side
        place = high * low_side + low
        if place < cases:
            return place


def _grid(cases: int) -> tuple[int, int]:
    """Sides of the smallest nearly square grid with a cell for every case."""
    high_side = math.isqrt(cases - 1) + 1
    return high_side, -(-cases // high_side)


def _rounds(cases: int) -> int:
    """Rounds after which every order of any two cases is equally likely to 1 in a million.

    Two rounds shrink what is left of the first order by about the grid's shorter side; eight are
    the least.
    """
    halvings = max(1, min(_grid(cases)).bit_length() - 1)
    return 2 * max(4, -(-20 // halvings))


def _splitmix(key: int, number: int) -> int:
    """Output `number` of the generator SplitMix64 with the state `key`.

    Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators (2014); the constants are
    those of the authors' C code, from Stafford's variant 13 of MurmurHash3's finaliser.
    """
    word = (key + (number + 1) * 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def _whole(weights: np.ndarray) -> np.ndarray:
    """Weights as whole numbers int64 (N,) whose sum is below 2^62; none above 0 becomes 0.

    The factor is a power of two, so that whole weights keep their proportions exactly.
    """
    spare = 62 - len(weights).bit_length()
    _, exponent = np.frexp(weights.max())
    whole = np.rint(np.ldexp(weights, spare - exponent)).astype(np.int64)
    return np.where(weights > 0, np.maximum(whole, 1), 0)
