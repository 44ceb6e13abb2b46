"""The labelled cases of a finetuning run: who is trained on, who is held out, to what outputs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from glmae_ray import intensity, structures
from glmae_ray.config_finetune import FinetuneConfig
from glmae_ray.crop_plan import crop_sides
from glmae_ray.errors import UserError
from glmae_ray.expressions import columns
from glmae_ray.store.index import SCHEMA, VolumeIndex
from glmae_ray.store.selection import nothing_chosen
from glmae_ray.structures import shown
from glmae_ray.targets import classes_to_learn, read_targets

_COLUMNS = intensity.COLUMNS | structures.COLUMNS | {
    "subject", "split", "channels", "shape", "spacing", "affine", "factors", "box_start",
    "box_stop",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Labelled:
    """The cases of a run, and what its outputs stand for.

    Attributes:
        structures: Of segmentation, in the order of the outputs behind the background.
        train: Cases to train on.
        val: Cases to validate on.
        classes: Of classification, in the order of the outputs.
        targets: Of classification: case id -> place of its class in `classes`.
        notes: What a person should read of this choice, a line each.
    """

    structures: tuple[str, ...]
    train: VolumeIndex
    val: VolumeIndex
    classes: tuple[str, ...] = ()
    targets: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """Channels of the network's answer: background and structures, or classes."""
        return len(self.classes) or 1 + len(self.structures)

    @property
    def channels(self) -> int:
        """Channels of every case."""
        return int(self.train.column("channels")[0])

    @property
    def modalities(self) -> tuple[str, ...]:
        """Of the training cases, sorted."""
        return tuple(sorted(set(self.train.column("modality"))))

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values, for `RUN/cases.json`."""
        parts = {"train": self.train, "val": self.val}
        unknown = {
            row["case_id"]: gaps
            for index in parts.values()
            for row in index.records()
            if (gaps := structures.unknown_structures(row, self.structures))
        }
        return {
            **{name: index.case_ids() for name, index in parts.items()},
            "subjects": {name: len(_people(index)) for name, index in parts.items()},
            "structures": list(self.structures),
            "unknown": unknown,
            "classes": list(self.classes),
            "targets": dict(self.targets),
            "notes": list(self.notes),
        }


def choose_cases(cfg: FinetuneConfig) -> Labelled:
    """Choose the cases of a run and decide what its outputs stand for.

    A case that `where` or `val_where` selects and that has no label is left out, with a note.

    Raises:
        UserError: There is no index; no case, or no label, where there has to be one; label values
            that nothing names; a structure or class that cannot be learned; two channel counts.
    """
    index = VolumeIndex.read(cfg.store, columns=_columns(cfg))
    targets = read_targets(str(cfg.targets)) if cfg.task == "classification" else None
    notes: list[str] = []
    train, val = (
        _with_labels(index, cfg, name, targets=targets, notes=notes)
        for name in ("where", "val_where")
    )
    _refuse_two_channel_counts(train, val)
    few = few_labels(train, cfg)
    notes += _notes_on_cases(cfg, train, few, val)
    if targets is None:
        rows, few_rows, val_rows = (part.records() for part in (train, few, val))
        structures.refuse_unnamed([*rows, *val_rows])
        names = structures.structures_to_learn(rows, few_rows, asked_for=cfg.structures)
        notes += structures.notes_on(names, few_rows, val_rows)
        return Labelled(names, few, val, notes=tuple(notes))
    ids = [part.case_ids() for part in (train, few, val)]
    classes = classes_to_learn(*ids, targets=targets)
    numbers = {case: classes.index(targets[case]) for case in (*ids[1], *ids[2])}
    return Labelled((), few, val, classes, numbers, tuple(notes))


def few_labels(index: VolumeIndex, cfg: FinetuneConfig) -> VolumeIndex:
    """The training cases that `label_fraction` or `label_cases` leaves.

    People are taken in the order of a hash of (seed, subject), which does not depend on who else
    is there, so that a smaller part is inside every larger one. A fraction is one of people,
    rounded, halves up, one at least.

    Raises:
        UserError: More cases are asked for than there are.
    """
    people = sorted(_people(index), key=lambda subject: _place(subject, cfg.seed))
    if cfg.label_cases is None:
        taken = people[: max(1, math.floor(cfg.label_fraction * len(people) + 0.5))]
        return index.keep(np.isin(index.column("subject"), taken))
    if cfg.label_cases > len(index):
        raise UserError(f"label_cases: {cfg.label_cases} is more than the {len(index)} there are")
    places = {subject: place for place, subject in enumerate(people)}
    order = np.argsort([places[subject] for subject in index.column("subject")], kind="stable")
    mask = np.zeros(len(index), bool)
    mask[order[: cfg.label_cases]] = True
    return index.keep(mask)


def _columns(cfg: FinetuneConfig) -> set[str]:
    named = columns(cfg.where) | columns(cfg.val_where)
    return _COLUMNS | (named & set(SCHEMA.names))  # `where` says which do not exist


def _with_labels(
    index: VolumeIndex,
    cfg: FinetuneConfig,
    name: str,
    *,
    targets: Mapping[str, str] | None,
    notes: list[str],
) -> VolumeIndex:
    """The cases that an expression selects and that have a label map, or a target; notes on others.

    Raises:
        UserError: There are none.
    """
    where = getattr(cfg, name)
    chosen = index.where(where, field=name)
    if not len(chosen):
        raise UserError(nothing_chosen(index, where, field=name))
    rows, what = chosen.records(), "label map" if targets is None else f"row in {cfg.targets}"
    mask = np.array(
        [structures.has_label_map(r) if targets is None else r["case_id"] in targets for r in rows]
    )
    without = [row["case_id"] for row, has in zip(rows, mask, strict=True) if not has]
    if not mask.any():
        line = f"{name}: {where!r} selects {len(rows)} cases, none of which has a {what}"
        raise UserError(f"{line} ({shown(without)}); choose labelled ones")
    if without:
        line = f"{len(without)} of {len(rows)} cases have no {what} and are left out"
        notes.append(f"{name}: {line}: {shown(without)}")
    return chosen.keep(mask)


def _notes_on_cases(
    cfg: FinetuneConfig, train: VolumeIndex, few: VolumeIndex, val: VolumeIndex
) -> Iterator[str]:
    """Tell who is trained on, who is on both sides, and what becomes of crops."""
    if len(few) < len(train):
        people = f"{len(_people(few))} of {len(_people(train))} people"
        cases = f"{len(few)} of {len(train)} training cases, of {people}"
        yield f"few labels: {cases}: {shown(few.case_ids())}"
    if both := sorted(_people(train) & _people(val)):
        line = f"{len(both)} people may be trained on too ({shown(both)})"
        yield f"val_where: {line}; its figures then flatter"
    for name, index in (("training", few), ("held-out", val)):
        small = np.any(index.shapes() < crop_sides(index.spacings(), cfg.crops), axis=1)
        if small.any():
            line = f"{small.sum()} of {len(index)} {name} cases are smaller along some axis"
            ids = shown(index.keep(small).case_ids())
            yield f"crops.size: {line} and are padded with air: {ids}"
    _, *plane = cfg.crops.size
    if cfg.augment.rotate90 and plane[0] != plane[1]:
        yield f"augment.rotate90: a plane of {plane[0]} by {plane[1]} is turned by 180 degrees only"


def _refuse_two_channel_counts(*indices: VolumeIndex) -> None:
    counts: dict[int, str] = {}
    for index in indices:
        for case, channels in zip(index.case_ids(), index.column("channels"), strict=True):
            counts.setdefault(int(channels), case)
    if len(counts) > 1:
        cases = ", ".join(f"{case} has {count}" for count, case in sorted(counts.items()))
        raise UserError(f"where, val_where: cases differ in channels: {cases}; narrow them")


def _people(index: VolumeIndex) -> set[str]:
    return set(index.column("subject"))


def _place(subject: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{subject}".encode(errors="surrogateescape")).digest()
