"""`glmae predict`: scans in files or a store into label maps on each scan's own grid.

A scan that does not fit the run, or cannot be read, is refused with a reason and the others go on.
The same command again does what is missing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

from glmae_ray.config_finetune import PredictConfig
from glmae_ray.errors import UserError
from glmae_ray.jobs import dicom_seg
from glmae_ray.jobs.case_workers import Failed, over_cases
from glmae_ray.jobs.ingest_tasks import read_headers
from glmae_ray.jobs.predict_inputs import Case, FileCase, StoreCase, why_unfit
from glmae_ray.jobs.predict_outputs import Outputs
from glmae_ray.jobs.predict_worker import Predictor, Refused, Todo
from glmae_ray.jobs.progress import with_progress
from glmae_ray.jobs.ray_session import ray_session
from glmae_ray.jobs.segmenting import Segmenter
from glmae_ray.jobs.subject_salt import subject_salt
from glmae_ray.paths import publish, to_place
from glmae_ray.store.index import VolumeIndex
from glmae_ray.store.sources import DICOM, Sources, discover

_NAMED = 20  # refused scans that are printed one by one

Refusals = dict[str, str]  # source -> reason


def run(cfg: PredictConfig) -> None:
    """Predict on every scan, and end with the line that people and scripts read.

    Raises:
        UserError: The run cannot be loaded, the source holds no scan, OUT is not a place for its
            predictions, or not one scan could be predicted on.
    """
    segmenter = Segmenter(cfg.run, cfg.weights, inference=cfg.inference)
    outputs = Outputs(cfg.out)
    with ExitStack() as stack:
        # Ray starts when there is work for it: seconds that a second look should not cost.
        start_ray = cache(lambda: stack.enter_context(ray_session(cfg.ray)))
        cases, refused = _cases(cfg, segmenter, start_ray=start_ray)
        todo = _pending(cases, _made_by(cfg, segmenter), outputs)
        there = len(cases) - len(todo)
        if there:
            print(f"{there} of {len(cases)} scans have their predictions in {outputs.folder}")
        if todo:
            start_ray()
        failed = _predict(todo, cfg)
    refused |= failed
    _tell(refused, outputs)
    if segmenter.classifies:
        _write_classes(cases, outputs)
    done = len(todo) - len(failed)
    print(f"predicted {done}, already there {there}, refused {len(refused)}")
    if done == there == 0:
        raise UserError(f"source: no scan could be predicted on; see {outputs.folder}/refused.csv")


def _predict(todo: Sequence[Todo], cfg: PredictConfig) -> Refusals:
    refused = {}
    taken = over_cases(Predictor, cfg, todo=todo, workers=cfg.workers) if todo else iter(())
    for one, outcome in with_progress(taken, len(todo), what="predict"):
        if isinstance(outcome, Refused):
            refused[one.case.source] = outcome.reason
        elif isinstance(outcome, Failed):
            refused[one.case.source] = f"{one.case.source}: {outcome.reason}"
        elif outcome.note:
            print(outcome.note, flush=True)
    return refused


def _cases(
    cfg: PredictConfig, segmenter: Segmenter, *, start_ray: Any
) -> tuple[list[Case], Refusals]:
    """The scans that fit the run, and why others do not."""
    refused: Refusals = {}
    found: list[Case] = []
    if cfg.source is not None:
        look = partial(read_headers, salt=subject_salt(), start_ray=start_ray)
        sources = discover(cfg.source, read_headers=look)
        _keep_apart(cfg, sources)
        refused |= {place: error.message for place, error in sources.rejected.items()}
        found += _file_cases(cfg, segmenter, sources)
    else:
        found += _store_cases(cfg)
    fitting = []
    for case in found:
        if reason := why_unfit(case, segmenter.facts):
            refused[case.source] = f"{case.source}: {reason}"
        else:
            fitting.append(case)
    return fitting, refused


def _file_cases(cfg: PredictConfig, segmenter: Segmenter, sources: Sources) -> Iterator[FileCase]:
    known: list[str] = segmenter.facts["modality"]
    of_run = known[0] if len(known) == 1 else None
    silent = [item for item in sources.items if item.modality is None]
    if silent and cfg.modality is None and of_run is not None:
        print(f"modality: {len(silent)} scans do not say theirs and are taken for {of_run}")
    series = {item.case_id for item in sources.items if item.channels[0].reader == DICOM}
    if segmenter.classifies:
        series = set()
    elif series and not dicom_seg.is_installed():
        print("no DICOM-SEG of DICOM scans: it needs highdicom; pip install 'glmae-ray[dicom]'")
        series = set()
    for item in sources.items:
        modality = cfg.modality or item.modality or of_run
        yield FileCase(item, modality, dicom_seg=item.case_id in series)


def _store_cases(cfg: PredictConfig) -> list[StoreCase]:
    assert cfg.store is not None
    index = VolumeIndex.read(cfg.store)
    if cfg.where is not None:
        index = index.where(cfg.where, field="where")
    if not len(index):
        chosen = f" for which {cfg.where!r} holds" if cfg.where else ""
        raise UserError(f"store: {cfg.store} has no case{chosen}")
    cases = [StoreCase(cfg.store, row) for row in index.records()]
    reshaped = [case.case_id for case in cases if case.is_reshaped]
    if reshaped:
        names = ", ".join(reshaped[:3])
        print(f"{len(reshaped)} cases are in the store's grid, not their file's ({names})")
    return cases


def _keep_apart(cfg: PredictConfig, sources: Sources) -> None:
    """Refuse an OUT among the scans: label maps would replace them, or be taken for them later."""
    out, source = str(to_place(cfg.out)), str(to_place(str(cfg.source)))
    places = [place for item in sources.items for place in item.locations]
    if out.startswith(f"{source}/") or any(place.startswith(f"{out}/") for place in places):
        raise UserError(f"out: {cfg.out} is among the scans of {cfg.source}; name another folder")


def _made_by(cfg: PredictConfig, segmenter: Segmenter) -> dict[str, Any]:
    """What makes the outputs what they are, beside the scan."""
    facts = segmenter.facts
    return {
        "run": cfg.run,
        "weights": cfg.weights,
        "step": facts["step"],
        "segmenter": segmenter.digest(),
        "inference": segmenter.inference.model_dump(mode="json"),
        "probabilities": cfg.probabilities and not segmenter.classifies,
    }


def _pending(cases: Sequence[Case], made_by: Mapping[str, Any], outputs: Outputs) -> list[Todo]:
    """Cases without a prediction of this kind.

    Raises:
        UserError: There are predictions of another network.
    """
    todo = []
    for case in cases:
        wanted = {**made_by, "stamp": case.stamp, "dicom_seg": case.dicom_seg}
        kept = (outputs.record(case.case_id) or {}).get("made_by")
        if kept is not None and kept.get("segmenter") != wanted["segmenter"]:
            other = f"{kept.get('run')}, {kept.get('weights')} weights, step {kept.get('step')}"
            line = f"out: {outputs.folder} has predictions of another network ({other})"
            raise UserError(f"{line}; name another folder, or remove them")
        if kept is None or {**kept, "run": made_by["run"]} != wanted:
            todo.append(Todo(case, wanted))
    return todo


def _tell(refused: Refusals, outputs: Outputs) -> None:
    for reason in list(refused.values())[:_NAMED]:
        print(f"refused: {reason}")
    if len(refused) > _NAMED:
        print(f"refused: {len(refused) - _NAMED} more, in refused.csv")
    rows = [("source", "reason"), *sorted(refused.items())]
    publish(outputs.folder / "refused.csv", _csv(rows))


def _write_classes(cases: Sequence[Case], outputs: Outputs) -> None:
    """All records of a classifier as one table."""
    records = [record for case in cases if (record := outputs.record(case.case_id))]
    if records:
        names = [*records[0]["probabilities"]]
        rows = [[r["case"], r["class"], *(r["probabilities"][n] for n in names)] for r in records]
        publish(outputs.folder / "classes.csv", _csv([("case_id", "class", *names), *rows]))


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
