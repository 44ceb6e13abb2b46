"""An evaluation for people and spreadsheets: tables on the screen, and lines of CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from glmae_ray.jobs.text import table
from glmae_ray.scores import CLASS_FIGURES, FIGURES

Report = Mapping[str, Any]

_TITLES = {"dice": "Dice", "nsd": "NSD", "hd95": "HD95 mm"}


def score_lines(reports: Mapping[Any, Report]) -> list[str]:
    """A table a set of weights: structures, then the mean, each figure with its interval."""
    lines = []
    for report in reports.values():
        ends = report["intervals"]
        rows = [
            [name, *_cells(values, ends["structures"][name], FIGURES), str(values["cases"])]
            for name, values in report["structures"].items()
        ]
        mean = ["mean", *_cells(report["mean"], ends["mean"], FIGURES), str(len(report["cases"]))]
        head = [_title(report), *_TITLES.values(), "cases"]
        lines += table([head, *rows, mean], indent="")
    return lines


def class_lines(reports: Mapping[Any, Report]) -> list[str]:
    """A line a set of weights, each figure with its interval."""
    rows = [
        [_title(report), *_cells(report["mean"], report["intervals"]["mean"], CLASS_FIGURES)]
        for report in reports.values()
    ]
    return table([["", *(name.replace("_", " ") for name in CLASS_FIGURES)], *rows], indent="")


def as_csv(reports: Mapping[Any, Report]) -> str:
    """A line for each case, structure and weights; of classification for each case and weights."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    is_first = True
    for which, report in reports.items():
        if "classes" in report:
            head = ["weights", "case", "class", "predicted", *report["classes"]]
            rows = [
                [which, case, one["class"], one["predicted"], *one["probabilities"].values()]
                for case, one in report["cases"].items()
            ]
        else:
            head = ["weights", "case", "structure", *FIGURES]
            rows = [
                [which, case, name, *((score or {}).get(figure) for figure in FIGURES)]
                for case, scores in report["cases"].items()
                for name, score in scores.items()
            ]
        writer.writerows([head, *rows] if is_first else rows)
        is_first = False
    return text.getvalue()


def _title(report: Report) -> str:
    return f"{report['weights']} weights, step {report['step']}"


def _cells(
    values: Mapping[str, float | None],
    ends: Mapping[str, Sequence[float] | None],
    figures: Sequence[str],
) -> list[str]:
    return [_cell(values[name], ends[name]) for name in figures]


def _cell(value: float | None, ends: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ({ends[0]:.3f} - {ends[1]:.3f})" if ends else "")
