"""Targets of classification: a CSV with the columns case_id and class."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping

from glmae_ray.errors import UserError
from glmae_ray.paths import read_file, to_place
from glmae_ray.structures import shown

_COLUMNS = ("case_id", "class")


def read_targets(location: str) -> dict[str, str]:
    """Case id to class; other columns are ignored.

    Raises:
        UserError: There is no such file, a column or value is missing, or a case has two classes.
    """
    raw = read_file(to_place(location))
    if raw is None:
        raise UserError(f"targets: {location} does not exist; a CSV with columns case_id and class")
    try:
        rows = [*csv.DictReader(io.StringIO(raw.decode("utf-8-sig")))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"targets: {location} is no CSV ({error})") from None
    has = [*rows[0]] if rows else []
    if missing := [name for name in _COLUMNS if name not in has]:
        found = ", ".join(map(str, has)) or "no rows"
        line = f"targets: {location} has no column {' and '.join(missing)}; it has {found}"
        raise UserError(line)
    targets: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        case, name = ((row[column] or "").strip() for column in _COLUMNS)
        if not case or not name:
            raise UserError(f"targets: {location}, line {number}: case_id or class is empty")
        if targets.setdefault(case, name) != name:
            raise UserError(f"targets: {location}, line {number}: {case} has two classes")
    return targets


def classes_to_learn(
    train: Iterable[str], few: Iterable[str], val: Iterable[str], *, targets: Mapping[str, str]
) -> tuple[str, ...]:
    """The classes of all training cases, numbers by size, words by alphabet.

    Args:
        train: Ids of all training cases.
        few: Of those that few labels leave.
        val: Of the held-out ones.
        targets: Case id to class.

    Raises:
        UserError: There is one class, or one that no training case shows.
    """
    every, left, held_out = ({targets[case] for case in part} for part in (train, few, val))
    if len(every) < 2:
        raise UserError(f"targets: all training cases are of the class {shown(every)}")
    if odd := sorted((every | held_out) - left):
        line = f"targets: {shown(odd)}: the class of no training case"
        raise UserError(f"{line}; choose other cases, or raise label_fraction or label_cases")
    are_numbers = all(name.isdecimal() for name in every)
    return tuple(sorted(every, key=int if are_numbers else str))
