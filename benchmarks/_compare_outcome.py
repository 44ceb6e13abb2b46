"""What a comparison found: every cell, every difference, as JSON values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks._compare_cases import Cases
from benchmarks._compare_config import Cell, CompareConfig
from benchmarks._compare_parts import evaluation_of
from benchmarks._compare_statistics import (
    Draws,
    Values,
    cell_summary,
    coverage,
    difference_summary,
    draw,
    seed_means,
    values_of,
)

WEIGHTS = ("last", "best")

Group = tuple[str, float]  # arm and label fraction
Found = dict[str, Any]


def outcome_of(cfg: CompareConfig, cases: Cases, faults: Mapping[str, str]) -> Found:
    """Put together what the parts left.

    Args:
        cfg: The comparison.
        cases: Who is in it.
        faults: Title of a part that failed -> why.

    Returns:
        `cells` and `differences` with the figures of the last weights at their top and those of
        the best under `best`; a cell of which a part failed has `failed`. `cases` were evaluated
        in every cell, `left_out` in some; `covers` says what the intervals are about.
    """
    evaluations = {cell: evaluation_of(cfg, cell).outcome() for cell in cfg.cells}
    there = [found for found in evaluations.values() if found is not None]
    taken, left_out = _cases_of(there)
    settings = cfg.evaluation(cfg.cells[0])
    draws = draw(len(taken), len(cfg.seeds), times=settings.bootstrap, seed=settings.seed)
    values = {
        which: _values(cfg, evaluations, which, taken, cases.structures)
        for which in WEIGHTS
        if which in settings.weights
    }
    return {
        "structures": list(cases.structures),
        "cases": taken,
        "left_out": left_out,
        "cells": [
            _cell(cfg, cases, (arm, fraction), values, draws, taken, faults)
            for fraction in cfg.fractions
            for arm in cfg.arms
        ],
        "differences": list(_differences(cfg, cases, values, draws)),
        "covers": coverage(
            len(taken),
            len(cfg.seeds),
            times=settings.bootstrap,
            one_encoder=not cfg.pretrain_each_seed
            and any(a is not None for a in cfg.arms.values()),
        ),
        "faults": dict(faults),
    }


def _cases_of(evaluations: list[Found]) -> tuple[list[str], list[str]]:
    """Cases that every evaluation has, and those that only some have."""
    sets = [{*found["cases"]} for found in evaluations] or [set()]
    every = set.intersection(*sets)
    failed = {case for found in evaluations for case in found["faults"]}
    return sorted(every), sorted((set.union(*sets) | failed) - every)


def _values(
    cfg: CompareConfig,
    evaluations: Mapping[Cell, Found | None],
    which: str,
    cases: list[str],
    structures: tuple[str, ...],
) -> dict[Group, Values]:
    """Scores of each arm and fraction that is complete."""
    values = {}
    for arm in cfg.arms:
        for fraction in cfg.fractions:
            found = [evaluations[Cell(arm, fraction, seed)] for seed in cfg.seeds]
            if not cases or None in found:
                continue
            reports = [one if which == "last" else one.get(which) for one in found]
            if None not in reports:  # a run may have no best weights
                scores = [report["cases"] for report in reports]
                values[arm, fraction] = values_of(scores, cases, structures)
    return values


def _cell(
    cfg: CompareConfig,
    cases: Cases,
    group: Group,
    values: Mapping[str, Mapping[Group, Values]],
    draws: Draws,
    taken: list[str],
    faults: Mapping[str, str],
) -> Found:
    arm, fraction = group
    head = {"arm": arm, "fraction": fraction, "labelled_cases": list(cases.labelled[fraction])}
    if group not in values["last"]:
        names = [Cell(arm, fraction, seed).name for seed in cfg.seeds]
        titles = [f"{verb} {name}" for name in names for verb in ("finetune", "evaluate")]
        return head | {"failed": {title: faults[title] for title in titles if title in faults}}
    tables = {
        which: cell_summary(found[group], cases.structures, draws)
        | {"seeds": dict(zip(map(str, cfg.seeds), seed_means(found[group]), strict=True))}
        for which, found in values.items()
        if group in found
    }
    dices = values["last"][group][..., 0]
    per_case = {
        case: {
            name: [None if value != value else value for value in dices[:, n, s].tolist()]
            for s, name in enumerate(cases.structures)
        }
        for n, case in enumerate(taken)
    }
    return head | _by_weights(tables) | {"dice_of_seeds": per_case}


def _differences(
    cfg: CompareConfig,
    cases: Cases,
    values: Mapping[str, Mapping[Group, Values]],
    draws: Draws,
) -> Iterator[Found]:
    for fraction in cfg.fractions:
        for arm, baseline in pairs_of(cfg):
            head = {"arm": arm, "against": baseline, "fraction": fraction}
            one, other = (arm, fraction), (baseline, fraction)
            if not {one, other} <= values["last"].keys():
                yield head | {"failed": {}}
                continue
            tables = {
                which: difference_summary(found[one], found[other], cases.structures, draws)
                for which, found in values.items()
                if {one, other} <= found.keys()
            }
            yield head | _by_weights(tables)


def pairs_of(cfg: CompareConfig) -> list[tuple[str, str]]:
    """Arms to hold against each other: each against the baselines before which it does not come."""
    baselines = [name for name in cfg.baselines if name in cfg.arms]
    return [
        (arm, baseline)
        for number, baseline in enumerate(baselines)
        for arm in cfg.arms
        if arm not in baselines[: number + 1]
    ]


def _by_weights(tables: Mapping[str, Found]) -> Found:
    others = {which: table for which, table in tables.items() if which != "last"}
    return tables["last"] | others
