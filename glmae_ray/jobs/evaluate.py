"""`glmae evaluate`: a finetuned run against the labels of a split, for the last and best weights.

`RUN/evaluation.json` has the means of the first of the weights at its top, those of others under
their names; `RUN/evaluation.csv` has a line for each case, structure and weights. What an empty
structure counts is said in `glmae_ray/scores.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glmae_ray.config_finetune import EvaluateConfig
from glmae_ray.errors import UserError
from glmae_ray.jobs.case_workers import over_cases
from glmae_ray.jobs.evaluate_text import as_csv, class_lines, score_lines
from glmae_ray.jobs.evaluate_worker import Evaluated, Evaluator, tolerances
from glmae_ray.jobs.progress import with_progress
from glmae_ray.jobs.ray_session import ray_session
from glmae_ray.jobs.segmenting import Segmenter
from glmae_ray.models.segmenter_files import Which
from glmae_ray.paths import publish, read_file, to_place
from glmae_ray.scores import summarise, summarise_classes
from glmae_ray.store.index import VolumeIndex
from glmae_ray.structures import has_label_map
from glmae_ray.targets import read_targets

_NAMED = 20  # cases that failed and are printed one by one

Row = Mapping[str, Any]
Report = dict[str, Any]


def run(cfg: EvaluateConfig) -> None:
    """Evaluate every case; write and print what came out.

    Raises:
        UserError: The run has no weights, the split no labelled case, or not one of them could be
            evaluated.
    """
    segmenters = _segmenters(cfg)
    first = next(iter(segmenters.values()))
    if odd := [name for name in cfg.tolerances_mm if name not in first.names]:
        known = ", ".join(first.names)
        raise UserError(f"tolerances_mm: {', '.join(odd)}: no structure of the run ({known})")
    targets = _targets(cfg, first.names) if first.classifies else {}
    rows = _rows(cfg, first, targets)
    done: dict[str, Evaluated] = {}
    faults: dict[str, str] = {}
    with ray_session(cfg.ray):
        taken = over_cases(Evaluator, cfg, [*segmenters], todo=rows, workers=cfg.workers)
        for row, outcome in with_progress(taken, len(rows), what="evaluate"):
            case = row["case_id"]
            if isinstance(outcome, Evaluated):
                done[case] = outcome
            else:
                faults[case] = f"case {case}: {outcome.reason}"
    for reason in list(faults.values())[:_NAMED]:
        print(f"not evaluated: {reason}")
    if not done:
        line = f"store: none of {len(rows)} cases could be evaluated"
        raise UserError(f"{line}; the first: {next(iter(faults.values()))}")
    done = dict(sorted(done.items()))
    reports = {
        which: _classes_report(cfg, segmenter, which, done, targets)
        if segmenter.classifies
        else _scores_report(cfg, segmenter, which, done)
        for which, segmenter in segmenters.items()
    }
    _write(cfg, reports, done, faults)
    tell = class_lines if first.classifies else score_lines
    print(*tell(reports), sep="\n")
    print(f"evaluated {len(done)}, failed {len(faults)}: {to_place(cfg.run) / 'evaluation.json'}")


def _segmenters(cfg: EvaluateConfig) -> dict[Which, Segmenter]:
    """The networks of all weights that the run has; says which it has not."""
    found: dict[Which, Segmenter] = {}
    reasons: list[str] = []
    for which in dict.fromkeys(cfg.weights):
        try:
            found[which] = Segmenter(cfg.run, which, inference=cfg.inference)
        except UserError as error:
            reasons += error.lines
    if not found:
        raise UserError(*reasons)
    for reason in reasons:
        print(f"left out: {reason}")
    return found


def _targets(cfg: EvaluateConfig, classes: Sequence[str]) -> dict[str, int]:
    """Case id -> number of its class, from the CSV that is named here or in the run's config."""
    location = cfg.targets
    if location is None:
        config = json.loads(read_file(to_place(cfg.run) / "config.json") or b"{}")
        location = config.get("targets")
    if location is None:
        raise UserError("targets: is missing, and the run does not say; a CSV of case_id and class")
    targets = read_targets(location)
    return {case: classes.index(name) for case, name in targets.items() if name in classes}


def _rows(cfg: EvaluateConfig, segmenter: Segmenter, targets: Mapping[str, int]) -> Sequence[Row]:
    """The labelled cases of the split, by id; says how many others there are."""
    index = VolumeIndex.read(cfg.store)
    wanted = f"split == {cfg.split!r}" if cfg.where is None else cfg.where
    every = index.where(wanted, field="where").records()
    if segmenter.classifies:
        rows: list[Row] = [row for row in every if row["case_id"] in targets]
        what = "a class that the run knows"
    else:
        rows, what = [row for row in every if has_label_map(row)], "a label map"
    if not rows:
        found = f"{len(every)} cases, none with {what}" if every else "no case"
        raise UserError(f"store: {cfg.store} has {found} where {wanted}")
    if len(rows) < len(every):
        print(f"{len(every) - len(rows)} of {len(every)} cases have not {what} and are left out")
    return rows


def _scores_report(
    cfg: EvaluateConfig, segmenter: Segmenter, which: Which, done: Mapping[str, Evaluated]
) -> Report:
    cases = {case: one.scores[which] for case, one in done.items()}
    summary = summarise(cases, structures=segmenter.names, bootstrap=cfg.bootstrap, seed=cfg.seed)
    return _head(segmenter, which) | {
        "mean": summary["mean"],
        "structures": summary["structures"],
        "cases": cases,
        "intervals": summary["intervals"],
        "tolerances_mm": tolerances(cfg, segmenter.names),
    }


def _classes_report(
    cfg: EvaluateConfig,
    segmenter: Segmenter,
    which: Which,
    done: Mapping[str, Evaluated],
    targets: Mapping[str, int],
) -> Report:
    names = segmenter.names
    shares = np.array([one.probabilities[which] for one in done.values()])
    numbers = np.array([targets[case] for case in done])
    summary = summarise_classes(shares, numbers, bootstrap=cfg.bootstrap, seed=cfg.seed)
    cases = {
        case: {
            "class": names[targets[case]],
            "predicted": names[int(np.argmax(one.probabilities[which]))],
            "probabilities": dict(zip(names, one.probabilities[which], strict=True)),
        }
        for case, one in done.items()
    }
    return _head(segmenter, which) | {
        "mean": summary["mean"],
        "classes": {name: int((numbers == n).sum()) for n, name in enumerate(names)},
        "cases": cases,
        "intervals": summary["intervals"],
    }


def _head(segmenter: Segmenter, which: Which) -> Report:
    """What was evaluated."""
    inference = segmenter.inference.model_dump(mode="json")
    return {"weights": which, "step": segmenter.facts["step"], "inference": inference}


def _write(
    cfg: EvaluateConfig,
    reports: Mapping[Which, Report],
    done: Mapping[str, Evaluated],
    faults: Mapping[str, str],
) -> None:
    """Leave evaluation.json, evaluation.csv and three pictures in the run folder."""
    place = to_place(cfg.run)
    (_, first), *others = reports.items()
    about = cfg.model_dump(mode="json", include={"store", "split", "where", "bootstrap", "seed"})
    whole = first | dict(others) | {"faults": dict(faults), "evaluated": about}
    publish(place / "evaluation.json", json.dumps(whole, indent=2) + "\n")
    publish(place / "evaluation.csv", as_csv(reports))
    for name, case in _chosen(first).items():
        if done[case].picture:
            publish(place / "pictures" / f"evaluation_{name}.png", done[case].picture)


def _chosen(report: Report) -> dict[str, str]:
    """The cases with the worst, the middle and the best mean Dice."""
    means = {
        case: float(np.mean(dices))
        for case, scores in report["cases"].items()
        if (dices := [s["dice"] for s in scores.values() if isinstance(s, dict) and "dice" in s])
    }
    ordered = sorted(means, key=lambda case: means[case])
    if not ordered:
        return {}
    return {"worst": ordered[0], "median": ordered[len(ordered) // 2], "best": ordered[-1]}
