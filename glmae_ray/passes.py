"""Passes: the order in which the samples of a run show cases; pure, so any machine agrees.

Everything comes from raw words of the counter-based Philox generator, whose output is fixed by
its definition, and from whole numbers; NumPy's distributions may change between versions and are
not used.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

# Streams of the generator; 0 and 1 are those of the kinds of view, 4 and 5 those of crops (see
# crop_plan.py).
_ORDER_STREAM, _SUBSTITUTE_STREAM = 2, 3
_WORD = 2**64 - 1


@dataclass(frozen=True, eq=False)
class Passes:
    """Which case each sample of a run shows; no look-up takes longer because there are more cases.

    A pass has as many samples as there are cases; sample n is at place n % N of pass n // N, and
    each pass has an order of its own. Without weights a pass shows every case once. With weights
    it shows each as often as its weight is worth, N w / sum(w) times, rounded down or up, by an
    offset of the pass, so that in the long run the shares are exact.

    Attributes:
        seed: The run's seed.
        cases: How many there are, N.
        weights: float (N,), finite, not negative, not all 0; None: all alike.
    """

    seed: int
    cases: int
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check the weights.

        Raises:
            ValueError: They are not one a case, negative, not finite, or all 0.
        """
        weights = self.weights
        if weights is None:
            return
        if weights.shape != (self.cases,):
            raise ValueError(f"weights {weights.shape} for {self.cases} cases")
        if not (weights >= 0).all() or not 0 < weights.max() < math.inf:
            raise ValueError("weights have to be finite and not negative, at least one above 0")

    def case(self, number: int) -> int:
        """Row of the case that sample `number` shows; pinned, as is all below."""
        pass_number, place = divmod(int(number), self.cases)
        offset, *keys = _pass_words(self.seed, pass_number, 1 + _rounds(self.cases))
        slot = _shuffled(place, self.cases, keys)
        if self.weights is None:
            return slot
        # Slot s stands at unit (offset + s total) / N of the cases' units laid end to end.
        total = int(self._ends[-1])
        return self._case_at((below(offset, total) + slot * total) // self.cases)

    def substitute(self, number: int, attempt: int) -> int:
        """Row of the case that stands in where that of sample `number` cannot be read.

        By weight among the others; the same case where no other has any weight.

        Args:
            number: The sample.
            attempt: 1 for the first that stands in, 2 where that cannot be read either, ...
        """
        own = self.case(number)
        begin, end, total = own, own + 1, self.cases
        if self.weights is not None:
            begin = int(self._ends[own - 1]) if own else 0
            end, total = int(self._ends[own]), int(self._ends[-1])
        others = total - (end - begin)
        if others == 0:
            return own
        word = int(words_of(self.seed, _SUBSTITUTE_STREAM, number, 1, attempt=attempt)[0])
        place = below(word, others)
        return self._case_at(place if place < begin else place + end - begin)

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


def words_of(seed: int, stream: int, number: int, count: int, *, attempt: int = 0) -> np.ndarray:
    """`count` 64-bit words that belong to (seed, stream, number, attempt) alone."""
    generator = np.random.Philox(key=[seed, stream], counter=[0, number, attempt, 0])
    return generator.random_raw(count)


def unit(words: np.ndarray) -> np.ndarray:
    """The upper 53 bits as float64 in [0, 1)."""
    return (words >> 11) * 2.0**-53


def below(word: int, bound: int) -> int:
    """A word as a whole number in [0, bound)."""
    return (word * bound) >> 64


@functools.lru_cache(maxsize=4)
def _pass_words(seed: int, number: int, count: int) -> list[int]:
    """The words of pass `number`."""
    return words_of(seed, _ORDER_STREAM, number, count).tolist()


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
