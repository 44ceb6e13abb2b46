"""Which cases of an index a run's passes show, and with which weights, as `sampling` says."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glmae_ray.config_data import SamplingConfig
from glmae_ray.errors import UserError
from glmae_ray.expressions import columns
from glmae_ray.store.index import SCHEMA, VolumeIndex

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen cases in the order in which a plan counts them.

    Attributes:
        index: The N cases.
        weights: (N,), finite, not negative, not all 0; None: all alike.
    """

    index: VolumeIndex
    weights: NDArray[np.float64] | None

    def digest(self) -> str:
        """SHA-256 over what a plan is made of: ids, foreground boxes and weights, in order."""
        parts = ["\n".join(self.index.case_ids()).encode(), self.index.boxes().tobytes()]
        if self.weights is not None:
            parts.append(self.weights.tobytes())
        return hashlib.sha256(b"\0".join(parts)).hexdigest()


def columns_to_select(sampling: SamplingConfig) -> set[str]:
    """Columns of the index that `select_cases` needs.

    Raises:
        ValueError: An expression is not one; a checked config has no such.
    """
    named = set().union(*(columns(expression) for _, expression in sampling.expressions))
    # One that does not exist cannot be read; `select_cases` says so.
    return {"case_id", "split", "modality", *(named & set(SCHEMA.names))}


def select_cases(index: VolumeIndex, sampling: SamplingConfig) -> Selection:
    """Choose the cases for which `where` holds, and weigh them.

    Args:
        index: With at least the columns of `columns_to_select`.
        sampling: The run's section.

    Raises:
        UserError: An expression is wrong, or nothing is left; every mistake, a line each.
    """
    chosen, *others = _masks(index, sampling)
    if not chosen.any():
        raise UserError(nothing_chosen(index, sampling.where, field="sampling.where"))
    index = index.keep(chosen)
    if not others:
        return Selection(index, None)
    others = [mask[chosen] for mask in others]
    split = len(sampling.weights)
    weights = np.ones(len(index))
    with np.errstate(over="ignore"):  # what has become infinite is told below
        for mask, factor in zip(others[:split], sampling.weights.values(), strict=True):
            weights[mask] *= factor
    if not 0 < weights.max() < math.inf:
        line = f"the largest weight of the {len(index)} chosen cases is {weights.max():g}"
        raise UserError(f"sampling.weights: {line}; it has to be above 0 and finite")
    if sampling.shares:
        shares = dict(zip(sampling.shares, others[split:], strict=True))
        weights = _shared(weights, shares, sampling=sampling, index=index)
    return Selection(index, weights)


def nothing_chosen(index: VolumeIndex, where: str, *, field: str) -> str:
    """The line for an expression that holds for no case of an index with `split`, `modality`."""
    kinds = Counter(zip(index.column("split"), index.column("modality"), strict=True))
    there = ", ".join(f"{count} {' '.join(kind)}" for kind, count in sorted(kinds.items()))
    return f"{field}: {where!r} selects no case; the store has {there or 'none'}"


def _masks(index: VolumeIndex, sampling: SamplingConfig) -> list[Mask]:
    """For which cases each expression holds, in the order of `sampling.expressions`."""
    masks: list[Mask] = []
    lines: list[str] = []
    for field, expression in sampling.expressions:
        try:
            masks.append(index.matches(expression, field=field))
        except UserError as error:
            lines += error.lines
    if lines:
        raise UserError(*lines)
    return masks


def _shared(
    weights: NDArray[np.float64],
    shares: Mapping[str, Mask],
    *,
    sampling: SamplingConfig,
    index: VolumeIndex,
) -> NDArray[np.float64]:
    """Weights (N,) that give the cases of each share together what the share states."""
    lines = _share_mistakes(weights, shares, index)
    if lines:
        raise UserError(*lines)
    shared = np.empty_like(weights)
    for expression, mask in shares.items():
        # The exact sum: NumPy's depends on the machine in its last bits.
        shared[mask] = weights[mask] * (sampling.shares[expression] / math.fsum(weights[mask]))
    return shared


def _share_mistakes(
    weights: NDArray[np.float64], shares: Mapping[str, Mask], index: VolumeIndex
) -> list[str]:
    lines = [
        f"sampling.shares: {expression!r} holds for no chosen case with a weight above 0"
        for expression, mask in shares.items()
        if not weights[mask].any()
    ]
    matched = np.sum(list(shares.values()), axis=0)
    for wrong, what in ((matched == 0, "none"), (matched > 1, "several")):
        if wrong.any():
            example = index.at(int(np.argmax(wrong)))["case_id"]
            lines.append(
                f"sampling.shares: {np.count_nonzero(wrong)} of {len(index)} chosen cases, such "
                f"as {example}, match {what} of the expressions; each has to match exactly one"
            )
    return lines
