"""Structures of label maps: their values, who looked for them where, which ones a run learns.

Labels may be partial. A structure is known in a case where its voxels are in the label map, or
where somebody looked for it (`annotated` of the index); where nobody says what was looked for, all
that the case's label map can name was. In a case in which it is not known, background may hide it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from glmae_ray.errors import UserError

Row = Mapping[str, Any]  # of the index, with at least `COLUMNS`

COLUMNS = {"case_id", "structures", "annotated", "options"}
_NAMED = 5  # in a line


def has_label_map(row: Row) -> bool:
    """Whether a case has a label map: ingest says of each what was annotated."""
    return bool(row["structures"]) or row["annotated"] is not None


def label_values(row: Row) -> dict[str, int]:
    """Structure name to value in a case's label map, without background.

    A value that occurs and has no name goes by its number.
    """
    named = _declared(row)
    numbers = {name: int(name) for name in row["structures"] if name not in named}
    return {name: value for name, value in (named | numbers).items() if value != 0}


def outputs_of(row: Row, structures: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Values in a case's label map, each with the output of a network that knows `structures`.

    Output 0 is background, n the structure number n - 1; a structure that the map cannot name has
    no pair.
    """
    values = label_values(row)
    pairs = enumerate(structures, start=1)
    return tuple((values[name], output) for output, name in pairs if name in values)


def unknown_structures(row: Row, structures: Sequence[str]) -> list[str]:
    """Those of some structures that may be in a case without being in its label map."""
    looked_for = row["annotated"]
    if looked_for is None:
        looked_for = _declared(row) or structures  # a map that names nothing may hold anything
    return [name for name in structures if name not in looked_for and name not in row["structures"]]


def structures_to_learn(
    train: Sequence[Row], few: Sequence[Row], *, asked_for: tuple[str, ...] | None
) -> tuple[str, ...]:
    """Those that are asked for, else all that training cases have, by value and name.

    Args:
        train: All training cases: what is learned does not depend on how many labels are left.
        few: Those that few labels leave.
        asked_for: `structures` of the config.

    Raises:
        UserError: There are none at all, or one is in no case.
    """
    values = {
        name: value
        for row in train
        for name, value in label_values(row).items()
        if row["structures"].get(name)
    }
    there = sorted(values, key=lambda name: (values[name], name))
    if not there:
        raise UserError(f"structures: the label maps of all {len(train)} training cases are empty")
    if odd := [name for name in asked_for or () if name not in values]:
        line = f"structures: {shown(odd)}: in none of the {len(train)} training cases"
        raise UserError(f"{line}; there are {', '.join(there)}")
    names = asked_for or tuple(there)
    present = {name for row in few for name in row["structures"]}
    if absent := [name for name in names if name not in present]:
        line = f"structures: {shown(absent)}: in none of the {len(few)} cases that few labels leave"
        raise UserError(f"{line}; take more, another seed, or state structures without it")
    return names


def refuse_unnamed(rows: Iterable[Row]) -> None:
    """Refuse label maps with values that their data set does not declare, where it declares any.

    Raises:
        UserError: For the first.
    """
    for row in rows:
        declared = _declared(row)
        if declared and (odd := [name for name in row["structures"] if name not in declared]):
            names = ", ".join(f"{value} {name}" for name, value in declared.items())
            line = f"case {row['case_id']}: its label map holds {', '.join(odd)}"
            raise UserError(f"{line}, which its data set does not name ({names}); correct one")


def notes_on(structures: Sequence[str], train: Sequence[Row], val: Sequence[Row]) -> Iterator[str]:
    """What a person should read: labels that are partial, structures that are not learned."""
    gaps = [unknown_structures(row, structures) for row in train]
    if any(gaps):
        counts = Counter(name for names in gaps for name in names)
        parts = ", ".join(f"{name} in {counts[name]}" for name in structures if counts[name])
        line = f"in {sum(map(bool, gaps))} of {len(train)} training cases some may be unlabelled"
        yield f"structures: {line}: {parts}"
    there = {name for row in (*train, *val) for name in row["structures"]}
    if others := sorted(there - {*structures}):
        yield f"structures: {shown(others)}: in label maps, and background in this run"


def shown(names: Iterable[str]) -> str:
    """The first few, and how many more."""
    names = [*names]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(islice(names, _NAMED)) + more


def _declared(row: Row) -> dict[str, int]:
    """What the data set of a case calls the values of its label map, background included."""
    named: dict[str, int] = json.loads(row["options"].get("label_names", "{}"))
    return named
