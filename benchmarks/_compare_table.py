"""A comparison for people and spreadsheets: tables for the screen and for Markdown, and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glmae_ray.jobs.text import table
from glmae_ray.scores import FIGURES

Found = Mapping[str, Any]
Table = list[list[str]]

_COLUMNS = (
    *("arm", "against", "fraction", "weights", "seed", "structure", "figure"),
    *("value", "lower", "upper", "failed"),
)


def screen(found: Found) -> list[str]:
    """Tables with columns that line up, then what they say."""
    lines = []
    for rows in _tables(found):
        lines += [*table(rows, indent=""), ""]
    return [*lines, *_notes(found)]


def markdown(found: Found) -> str:
    """The same, ready to paste."""
    lines = []
    for head, *rows in _tables(found):
        ruler = ["---", *["---:"] * (len(head) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in (head, ruler, *rows)]
        lines.append("")
    for note in _notes(found):
        lines += [note, ""]
    return "\n".join(lines).rstrip() + "\n"


def as_csv(found: Found) -> str:
    """A line for each figure: of a cell, of a difference (`against` is filled), of each seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for one in (*found["cells"], *found["differences"]):
        head = [one["arm"], one.get("against"), one["fraction"]]
        if "failed" in one:
            writer.writerow([*head, *[None] * 7, "failed"])
            continue
        for which in ("last", *(["best"] if "best" in one else [])):
            for line in _csv_lines(one if which == "last" else one[which]):
                writer.writerow([*head, which, *line, None])
    return text.getvalue()


def _csv_lines(one: Found) -> Iterator[list[Any]]:
    """Seed, structure, figure, value, lower, upper."""
    ends = one["intervals"]
    rows = [("mean", one["mean"], ends["mean"])]
    rows += [(name, each, ends["structures"][name]) for name, each in one["structures"].items()]
    for structure, values, limits in rows:
        for figure in FIGURES:
            yield [None, structure, figure, values[figure], *(limits[figure] or (None, None))]
    for seed, values in one.get("seeds", {}).items():
        for figure in FIGURES:
            yield [seed, "mean", figure, values[figure], None, None]


def _tables(found: Found) -> Iterator[Table]:
    names = found["structures"]
    dice = f"Dice, mean of {len(names)}" if len(names) > 1 else "Dice"
    each = names if len(names) > 1 else []
    head = ["arm", "labels", dice, *each, "of each seed", "best weights"]
    yield [head, *([*_head(cell), *_cells(cell, each)] for cell in found["cells"])]
    if found["differences"]:
        head = ["difference in Dice", "labels", dice, *each, "best weights"]
        rows = ([*_head(one), *_cells(one, each)] for one in found["differences"])
        yield [head, *rows]


def _head(one: Found) -> list[str]:
    labels = f"{100 * one['fraction']:g} %"
    if "against" in one:
        return [f"{one['arm']} - {one['against']}", labels]
    counts = "/".join(map(str, dict.fromkeys(one["labelled_cases"])))
    return [one["arm"], f"{labels} ({counts})"]


def _cells(one: Found, structures: Sequence[str]) -> list[str]:
    signed = "against" in one
    if "failed" in one:
        return ["failed", *["-"] * (len(structures) + (1 if signed else 2))]
    ends = one["intervals"]
    cells = [_figure(one["mean"], ends["mean"], signed=signed)]
    cells += [
        _figure(one["structures"][name], ends["structures"][name], signed=signed)
        for name in structures
    ]
    if not signed:
        cells.append(", ".join(_number(mean["dice"]) for mean in one["seeds"].values()))
    best = one.get("best")
    cells.append("-" if best is None else _number(best["mean"]["dice"], signed=signed))
    return cells


def _figure(values: Found, ends: Found, *, signed: bool) -> str:
    text, limits = _number(values["dice"], signed=signed), ends["dice"]
    if limits is None:
        return text
    lower, upper = (_number(limit, signed=signed) for limit in limits)
    return f"{text} ({lower} - {upper})" if not signed else f"{text} ({lower} to {upper})"


def _number(value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def _notes(found: Found) -> Iterator[str]:
    yield (
        "Dice of the weights after the last step. Those of the step that was best on the held-out "
        "cases stand in the last column only."
    )
    yield from found["covers"]
    if found["left_out"]:
        names = ", ".join(found["left_out"])
        yield f"Left out everywhere, because not every cell could evaluate them: {names}."
    for part, why in found["faults"].items():
        yield f"Failed: {part}: {why}"
