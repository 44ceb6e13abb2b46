"""The rates of all ways as bars, a panel for each data set and recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _THEIRS = "#1f77b4", "#b0b0b0"
_BAR_IN, _MARGIN_IN, _WIDTH_IN = 0.26, 0.9, 9.0


def draw_rates(panels: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Write a picture.

    Args:
        panels: Title to rows with `way` and `samples a second` (median, min, max).
        path: The PNG file.
    """
    from matplotlib.figure import Figure

    heights = [_MARGIN_IN + _BAR_IN * len(rows) for rows in panels.values()]
    figure = Figure(figsize=(_WIDTH_IN, sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, rows)
        axis.set_title(title, loc="left", fontsize=10)
    axes[-1].set_xlabel("samples a second: median of the runs, lowest and highest")
    figure.savefig(path, dpi=120)


def _draw_panel(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: row["samples a second"]["median"])
    rates = [row["samples a second"] for row in rows]
    medians = [rate["median"] for rate in rates]
    reach = [
        [rate["median"] - rate["min"] for rate in rates],
        [rate["max"] - rate["median"] for rate in rates],
    ]
    names = [row["way"] for row in rows]
    colours = [_OURS if name.startswith("ours") else _THEIRS for name in names]
    bars = axis.barh(names, medians, color=colours, xerr=reach, ecolor="#404040", capsize=2)
    axis.bar_label(
        bars,
        [f" {median:.0f}" if median >= 100 else f" {median:.3g}" for median in medians],
        fontsize=8,
    )
    axis.margins(x=0.1)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
