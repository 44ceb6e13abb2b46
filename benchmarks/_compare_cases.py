"""Who is trained on and who is tested, seen before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks._compare_config import Cell, CompareConfig
from glmae_ray.config_data import SamplingConfig
from glmae_ray.errors import UserError
from glmae_ray.labelled import choose_cases
from glmae_ray.store.index import VolumeIndex
from glmae_ray.store.selection import select_cases
from glmae_ray.structures import has_label_map, shown


@dataclass(frozen=True)
class Cases:
    """What the store has for a comparison.

    Attributes:
        fingerprint: Of the store.
        structures: In the order of the table.
        labelled: Label fraction -> cases that finetuning has labels of, under each seed.
        tested: Cases of the evaluation.
    """

    fingerprint: str
    structures: tuple[str, ...]
    labelled: dict[float, tuple[int, ...]]
    tested: int


def check_cases(cfg: CompareConfig) -> Cases:
    """See that every run has its cases, and that nobody who is tested is trained on.

    Raises:
        UserError: What is wrong; nothing was written.
    """
    index = VolumeIndex.read(cfg.store)
    arm = next(iter(cfg.arms))
    choices = {
        (fraction, seed): choose_cases(cfg.finetuning(Cell(arm, fraction, seed)))
        for fraction in cfg.fractions
        for seed in cfg.seeds
    }
    tested = _tested(cfg, index)
    people = _people(tested)
    lines = [
        _overlap(
            f"arms.{arm}: sampling.where", people, _people(select_cases(index, sampling).index)
        )
        for arm, sampling in _samplings(cfg).items()
    ]
    first = next(iter(choices.values()))
    trained = {name for choice in choices.values() for name in _people(choice.train)}
    lines += [
        _overlap("finetune.where", people, trained),
        _overlap("finetune.val_where", people, _people(first.val)),
    ]
    if wrong := [line for line in lines if line]:
        raise UserError(*wrong)
    return Cases(
        index.fingerprint(),
        first.structures,
        {f: tuple(len(choices[f, s].train) for s in cfg.seeds) for f in cfg.fractions},
        len(tested),
    )


def _samplings(cfg: CompareConfig) -> dict[str, SamplingConfig]:
    seed = cfg.seeds[0]
    return {
        arm: cfg.pretraining(arm, seed).sampling
        for arm, changes in cfg.arms.items()
        if changes is not None
    }


def _tested(cfg: CompareConfig, index: VolumeIndex) -> VolumeIndex:
    wanted = str(cfg.evaluation(cfg.cells[0]).where)
    found = index.where(wanted, field="evaluate.where")
    mask = [has_label_map(row) for row in found.records()]
    if not any(mask):
        raise UserError(f"evaluate.where: {wanted!r} selects {len(found)} cases, none labelled")
    return found.keep(np.array(mask))


def _people(index: VolumeIndex) -> set[str]:
    return {*index.column("subject")}


def _overlap(field: str, tested: set[str], others: set[str]) -> str | None:
    both = sorted(tested & others)
    if not both:
        return None
    return f"{field}: {len(both)} people are tested on too ({shown(both)}); leave them out"
