"""A comparison as dots with intervals: label fractions side by side, a colour for each arm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WIDTH_IN, _HEIGHT_IN = 8.0, 4.0
_GROUP = 0.7  # of the room of a fraction that its arms take


def draw_comparison(found: Mapping[str, Any], path: Path) -> None:
    """Write a picture of the mean Dice of every cell that is complete.

    Args:
        found: Of `_compare_outcome.outcome_of`.
        path: The PNG file.
    """
    from matplotlib.figure import Figure

    fractions = list(dict.fromkeys(cell["fraction"] for cell in found["cells"]))
    arms = list(dict.fromkeys(cell["arm"] for cell in found["cells"]))
    figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(arms):
        cells = [c for c in found["cells"] if c["arm"] == arm and "failed" not in c]
        dices = [cell["mean"]["dice"] for cell in cells]
        ends = [c["intervals"]["mean"]["dice"] or [c["mean"]["dice"]] * 2 for c in cells]
        reach = [
            [dice - low for dice, (low, _) in zip(dices, ends, strict=True)],
            [high - dice for dice, (_, high) in zip(dices, ends, strict=True)],
        ]
        offset = _GROUP * ((number + 0.5) / len(arms) - 0.5)
        places = [fractions.index(cell["fraction"]) + offset for cell in cells]
        axes.errorbar(places, dices, yerr=reach, fmt="o", capsize=3, label=arm)
    axes.set_xticks(range(len(fractions)), [f"{100 * fraction:g} %" for fraction in fractions])
    axes.set_xlabel("of the training people labelled")
    axes.set_ylabel("Dice on the test cases")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
