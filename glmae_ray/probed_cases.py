"""The labelled cases that probes look at: few, spread evenly, the same at every step of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from glmae_ray.config import PretrainConfig
from glmae_ray.config_finetune import FinetuneConfig
from glmae_ray.config_probe import ProbeConfig
from glmae_ray.crops import CropMaker, crop_maker
from glmae_ray.errors import UserError
from glmae_ray.labelled import Labelled, choose_cases
from glmae_ray.store.index import VolumeIndex
from glmae_ray.structures import shown

Task = Literal["segmentation", "classification"]

_CROPS = 4  # of a case, half of them about a structure


class ProbedCases(NamedTuple):
    """Cases of one task.

    Attributes:
        labelled: Who they are, and what is labelled.
        fit: Knows how to cut crops of those to fit on.
        val: Of those to measure on.
    """

    labelled: Labelled
    fit: CropMaker
    val: CropMaker

    def lines(self) -> Iterator[str]:
        """How many there are and of what, and what is odd about them."""
        names = self.labelled.classes or self.labelled.structures
        what = "classes" if self.labelled.classes else "structures"
        yield (
            f"probe: {len(self.labelled.train)} cases to fit on, {len(self.labelled.val)} to "
            f"measure on; {len(names)} {what}: {', '.join(names)}"
        )
        # That crops reach beyond a small scan changes no comparison of one step with another.
        notes = (note for note in self.labelled.notes if not note.startswith("crops.size"))
        yield from (f"probe: {note}" for note in notes)


def probed_cases(cfg: PretrainConfig) -> dict[Task, ProbedCases]:
    """The cases of each task that the run's probes have.

    Raises:
        UserError: There are none, or they do not fit the run.
    """
    probe = cfg.probe
    tasks: list[Task] = ["classification"] if probe.classifies else []
    tasks += ["segmentation"] if "segmentation" in probe.chosen else []
    try:
        return {task: _cases(cfg, task) for task in tasks}
    except UserError as error:
        raise UserError(*(_of_probe(line) for line in error.lines)) from None


def _cases(cfg: PretrainConfig, task: Task) -> ProbedCases:
    finetune = _as_finetuning(cfg, task)
    labelled = _few(choose_cases(finetune), cfg.probe)
    if labelled.channels != cfg.model.channels:
        line = f"store: {finetune.store} has cases of {labelled.channels} channels"
        raise UserError(f"{line}, the encoder takes {cfg.model.channels}")
    fit = crop_maker(finetune, labelled, split="train")
    return ProbedCases(labelled, fit, crop_maker(finetune, labelled, split="val"))


def _as_finetuning(cfg: PretrainConfig, task: Task) -> FinetuneConfig:
    """The finetuning of which a probe is a part: its cases, and crops like local views."""
    probe = cfg.probe
    tree: dict[str, Any] = {
        "store": probe.store or cfg.store,
        "run": cfg.run,
        "init": "none",
        "steps": 1,
        "global_batch": 1,
        "task": task,
        "where": probe.where,
        "val_where": probe.val_where,
        "model": cfg.model,
        "pipeline": cfg.pipeline,
        "augment": {"rotate90": 0.0},
        "crops": {
            "count": _CROPS,
            "size": cfg.views.local_size,
            "spacing": probe.spacing,
            "window": cfg.views.window,
        },
    }
    if task == "classification":
        tree |= {"targets": probe.targets, "head": {"kind": "linear"}}
    else:
        tree |= {"structures": probe.structures}
    return FinetuneConfig.model_validate(tree)


def _few(labelled: Labelled, probe: ProbeConfig) -> Labelled:
    """At most `probe.cases` to fit on and as many to measure on.

    Raises:
        UserError: A class, or a structure that is asked for, is in none of those to fit on.
    """
    train, val = (
        _spread(index, labelled, most=probe.cases) for index in (labelled.train, labelled.val)
    )
    shown_by = _shown_by(train, labelled)
    names = labelled.classes or labelled.structures
    missing = [name for name in names if name not in shown_by]
    if missing and (labelled.classes or probe.structures):
        line = f"cases: the {len(train)} cases to fit on show none of {shown(missing)}"
        raise UserError(f"{line}; take more, of {len(labelled.train)} that there are")
    return dataclasses.replace(
        labelled,
        train=train,
        val=val,
        structures=tuple(name for name in labelled.structures if name in shown_by),
    )


def _spread(index: VolumeIndex, labelled: Labelled, *, most: int) -> VolumeIndex:
    """Every so-manieth case, by class and id."""
    order: Sequence[int] = np.arange(len(index)).tolist()
    if labelled.classes:
        ids = index.case_ids()
        order = sorted(order, key=lambda row: (labelled.targets[ids[row]], row))
    places = np.linspace(0, len(order) - 1, min(len(order), most)).round().astype(int)
    mask = np.zeros(len(index), bool)
    mask[[order[place] for place in places]] = True
    return index.keep(mask)


def _shown_by(index: VolumeIndex, labelled: Labelled) -> set[str]:
    if labelled.classes:
        return {labelled.classes[labelled.targets[case]] for case in index.case_ids()}
    return {name for row in index.records() for name in row["structures"]}


def _of_probe(line: str) -> str:
    """A line of finetuning's with the field's name as it is here."""
    name = line.partition(":")[0].partition(",")[0]
    return f"probe.{line}" if name in ProbeConfig.model_fields else f"probe: {line}"
