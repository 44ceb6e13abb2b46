"""Pictures of a search as matplotlib figures: which fields matter, and what good trials share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROW_IN = 0.45
_TICKS = 5


def draw_importance(shares: Mapping[str, float], *, title: str) -> Figure:
    """A bar for each field, the longest on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + _ROW_IN * len(shares)), layout="constrained")
    axis = figure.subplots()
    ordered = sorted(shares.items(), key=lambda pair: pair[1])
    axis.barh([name for name, _ in ordered], [share for _, share in ordered])
    axis.set(xlabel="share", title=title, xlim=(0, 1))
    return figure


def draw_parallel(
    columns: Mapping[str, Sequence[Any]], figure_of: Sequence[float], *, logs: set[str]
) -> Figure:
    """A line a trial through its value of each field, coloured by its figure.

    Args:
        columns: Field -> value of each trial.
        figure_of: Of each trial; more is better, and the best is drawn last.
        logs: Fields with a logarithmic axis.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 2 * len(columns), 4.5), layout="constrained")
    axis = figure.subplots()
    places = []
    for at, (name, values) in enumerate(columns.items()):
        place, ticks = _scale(values, is_log=name in logs)
        places.append(place)
        axis.axvline(at, color="0.7", zorder=0)
        for height, text in ticks:
            axis.annotate(text, (at, height), xytext=(4, 0), textcoords="offset points", fontsize=8)
    low, high = min(figure_of), max(figure_of)
    norm, colours = Normalize(low, high if high > low else low + 1e-9), colormaps["viridis"]
    for number in np.argsort(figure_of):
        line = [place[number] for place in places]
        axis.plot(range(len(line)), line, color=colours(norm(figure_of[number])), marker="o")
    axis.set_xticks(range(len(columns)), list(columns))
    axis.set_yticks([])
    axis.margins(x=0.15)
    figure.colorbar(ScalarMappable(norm, colours), ax=axis, label="held-out Dice")
    return figure


def _scale(
    values: Sequence[Any], *, is_log: bool
) -> tuple[NDArray[np.float64], list[tuple[float, str]]]:
    """Heights from 0 to 1, and what is written at some of them."""
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        words = sorted({str(value) for value in values})
        heights = np.linspace(0, 1, len(words)) if len(words) > 1 else np.array([0.5])
        at = dict(zip(words, heights.tolist(), strict=True))
        return np.array([at[str(value)] for value in values]), [(at[word], word) for word in words]
    numbers = np.asarray(values, np.float64)
    shown = np.log(numbers) if is_log else numbers
    low, high = float(shown.min()), float(shown.max())
    if low == high:
        return np.full(len(shown), 0.5), [(0.5, f"{numbers[0]:.3g}")]
    heights = np.linspace(0, 1, _TICKS)
    marks = low + heights * (high - low)
    texts = [f"{mark:.3g}" for mark in (np.exp(marks) if is_log else marks)]
    return (shown - low) / (high - low), list(zip(heights.tolist(), texts, strict=True))
