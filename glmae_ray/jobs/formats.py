"""The formats of an export: which of them fit, and what writes each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from glmae_ray.config import ExportFormat
from glmae_ray.errors import UserError


@dataclass(frozen=True)
class Prepared:
    """Weights that were loaded and checked, so that only writing is left.

    Attributes:
        lines: What to tell before anything is written.
        facts: Of the weights.
        writers: By format, what writes it and gives the paths of its files below the folder of the
            export, the most important one first.
    """

    lines: list[str]
    facts: dict[str, Any]
    writers: dict[ExportFormat, Callable[[], list[str]]]


def fitting(
    asked: Iterable[ExportFormat] | None,
    *,
    known: Iterable[ExportFormat],
    obstacles: Mapping[ExportFormat, str],
) -> tuple[list[ExportFormat], list[str]]:
    """The formats to write, each once, and a line for each that is left out.

    Args:
        asked: None: every one of `known` without an obstacle.
        known: In the order in which they are written.
        obstacles: Why a format does not fit.

    Raises:
        UserError: One that was asked for does not fit.
    """
    if asked is None:
        lines = [f"{name}: left out: {reason}" for name, reason in obstacles.items()]
        return [name for name in known if name not in obstacles], lines
    chosen = list(dict.fromkeys(asked))
    if lines := [f"formats: {n} does not fit: {obstacles[n]}" for n in chosen if n in obstacles]:
        raise UserError(*lines)
    return chosen, []
