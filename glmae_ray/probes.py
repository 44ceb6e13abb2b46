"""Probes: how well labels follow from the features of a frozen encoder, by three simple readers.

Cosine kNN and logistic regression tell the class of a scan from one vector; a linear map tells the
labels of voxels from the token of their patch. None of them changes the features.

Letters: N scans or tokens, E features, K structures, P voxels of a patch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Of DINO's evaluation (Caron et al., arXiv 2104.14294), after Wu et al., arXiv 1805.01978.
_TEMPERATURE = 0.07
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of each feature's variance; our decision, as folds are
_FOLDS = 4
_BINS = 50  # between 0 and 1, at which a map is cut
_LEAST = 1e-6  # of a standard deviation: features that are alike everywhere stay 0


class Scale(NamedTuple):
    """Mean and deviation of each feature, (E,), over what a probe is fitted on.

    A mean of tokens has a large part that all scans share; beside it every cosine would be 1.
    """

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, features_NE: Tensor) -> Scale:
        """That of some features."""
        return cls(features_NE.mean(0), features_NE.std(0, correction=0).clamp_min(_LEAST))

    def __call__(self, features_NE: Tensor) -> Tensor:
        """Features of mean 0 and deviation 1."""
        return (features_NE - self.mean) / self.deviation


def knn(train_NE: Tensor, class_N: Tensor, val_ME: Tensor, *, neighbours: int) -> Tensor:
    """The class, int64 (M,), that the most alike scans vote for, each exp(cosine / 0.07).

    Args:
        train_NE: Scaled features.
        class_N: Their classes, int64.
        val_ME: Scaled features of others.
        neighbours: That vote; all where there are fewer.
    """
    likeness_MN = F.normalize(val_ME, dim=1) @ F.normalize(train_NE, dim=1).T
    value, place = likeness_MN.topk(min(neighbours, len(train_NE)), dim=1)
    votes = value.new_zeros(len(val_ME), int(class_N.max()) + 1)
    return votes.scatter_add_(1, class_N[place], (value / _TEMPERATURE).exp()).argmax(1)


def logistic(train_NE: Tensor, class_N: Tensor, val_ME: Tensor) -> Tensor:
    """The class, int64 (M,), by multinomial logistic regression with an L2 penalty of C = 1.

    Args:
        train_NE: Scaled features.
        class_N: Their classes, int64.
        val_ME: Scaled features of others.
    """
    weight = train_NE.new_zeros(train_NE.shape[1], int(class_N.max()) + 1, requires_grad=True)
    bias = train_NE.new_zeros(weight.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        entropy = F.cross_entropy(train_NE @ weight + bias, class_N, reduction="sum")
        total = entropy + weight.square().sum() / 2
        total.backward()
        return total

    solver.step(loss)
    with torch.no_grad():
        return (val_ME @ weight + bias).argmax(1)


class Tokens(NamedTuple):
    """The tokens of one case's crops, and what is labelled there.

    Attributes:
        features_NE: Float.
        label_NP: uint8, of voxels of each token's patch: 0 or the number of a structure.
        known_K: bool, of each structure, the first being number 1: whether its absence counts.
    """

    features_NE: Tensor
    label_NP: Tensor
    known_K: Tensor


class TokenProbe:
    """A linear map from a token to each structure in the voxels of its patch, and where to cut it.

    Ridge regression in closed form, one for each structure, over the cases in which it is known. A
    voxel belongs to it where the map is above a cut: most voxels are background, so that half
    would find next to nothing. Penalty and cut are those of the best Dice on cases which a map
    was not fitted on, over four parts of the cases.
    """

    def __init__(self, cases: Sequence[Tokens]) -> None:
        """Fit; structures that no case shows are left out."""
        self._scale = Scale.of(torch.cat([case.features_NE for case in cases]))
        self._maps, self._cuts = {}, dict[int, float]()
        for number in range(1, 1 + len(cases[0].known_K)):
            knowing = _knowing(cases, number)
            if any((case.label_NP == number).any() for case in knowing):
                self._maps[number], self._cuts[number] = self._fit(knowing, number)

    def _fit(self, cases: Sequence[Tokens], number: int) -> tuple[Tensor, float]:
        """The map of a structure, and its cut."""
        parts = [cases[first::_FOLDS] for first in range(min(_FOLDS, len(cases)))]
        sums = [_Sums.of(self._pairs(part, number)) for part in parts]
        whole = _Sums.total(sums)
        # A single case has no other to be held against.
        others = [whole.without(part) for part in sums] if len(sums) > 1 else sums
        best = 0.0, _RIDGES[-1], 0.5
        for ridge in _RIDGES:
            maps = [other.solve(ridge) for other in others]
            values = (
                (inputs @ own, true)
                for part, own in zip(parts, maps, strict=True)
                for inputs, true in self._pairs(part, number)
            )
            dice, cut = _best_cut(values)
            best = max(best, (dice, ridge, cut))
        _, ridge, cut = best
        return whole.solve(ridge), cut

    def dice(self, cases: Sequence[Tokens]) -> dict[int, float]:
        """Dice of each structure over all voxels of some cases, by its number.

        Without those that were left out, or that no case shows in which they are known.
        """
        found = {}
        for number, cut in self._cuts.items():
            pairs = [
                (inputs @ self._maps[number] > cut, true)
                for inputs, true in self._pairs(_knowing(cases, number), number)
            ]
            there = sum(int(true.sum()) for _, true in pairs)
            if there:
                both = sum(int((said & true).sum()) for said, true in pairs)
                found[number] = 2 * both / (there + sum(int(said.sum()) for said, _ in pairs))
        return found

    def _pairs(self, cases: Iterable[Tokens], number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each case scaled features and a constant, float64 (N, E + 1), and what to find."""
        for case in cases:
            inputs = F.pad(self._scale(case.features_NE), (0, 1), value=1.0).double()
            yield inputs, case.label_NP == number


class _Sums(NamedTuple):
    """All that least squares need of inputs X (N, E + 1) and targets Y (N, P).

    Attributes:
        gram: X^T X.
        moment: X^T Y.
        rows: N.
    """

    gram: Tensor
    moment: Tensor
    rows: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> _Sums:
        """Over all pairs."""
        return cls.total([cls(x.T @ x, x.T @ targets.double(), len(x)) for x, targets in pairs])

    @classmethod
    def total(cls, parts: Sequence[_Sums]) -> _Sums:
        """Over all parts."""
        grams, moments, rows = zip(*parts, strict=True)
        return cls(torch.stack(grams).sum(0), torch.stack(moments).sum(0), sum(rows))

    def without(self, part: _Sums) -> _Sums:
        """Over all but a part."""
        return _Sums(self.gram - part.gram, self.moment - part.moment, self.rows - part.rows)

    def solve(self, ridge: float) -> Tensor:
        """The map float64 (E + 1, P); the constant, which is last, costs nothing."""
        penalty = torch.full((len(self.gram),), ridge * self.rows, dtype=self.gram.dtype)
        penalty[-1] = 0
        return torch.linalg.solve(self.gram + penalty.diag(), self.moment)


def _best_cut(values: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """The best Dice over all voxels, of what a map says and what is, and the cut that gives it."""
    inside, outside = torch.zeros(_BINS), torch.zeros(_BINS)
    for value, true in values:
        place = (value * _BINS).long().clamp(0, _BINS - 1)
        inside += place[true].bincount(minlength=_BINS)
        outside += place[~true].bincount(minlength=_BINS)
    above, wrong = (part.flip(0).cumsum(0).flip(0) for part in (inside, outside))
    dice = 2 * above / (above + wrong + inside.sum())
    best, place = dice[1:].max(0)
    return float(best), float(place + 1) / _BINS


def _knowing(cases: Sequence[Tokens], number: int) -> list[Tokens]:
    return [case for case in cases if case.known_K[number - 1]]
