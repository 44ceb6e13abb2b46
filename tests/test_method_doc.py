"""docs/method.md names code, tests and values: each has to exist and to be the default."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from glmae_ray.config import PretrainConfig
from glmae_ray.config_finetune import FinetuneConfig
from glmae_ray.config_train import TrainConfig

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs/method.md"
GRADES = {"V": "first-hand|abstract|figure|Table|checkpoint", "L": "lineage", "D": "ours"}


class Row(NamedTuple):
    section: str
    item: str
    grade: str
    source: str
    value: str
    field: str
    code: str
    test: str


def table_rows() -> list[list[str]]:
    """Section and cells of every row of a table, without heads and rules."""
    section, rows = "", []
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if cells[0] not in ("item", "trap") and not set(cells[0]) <= {"-"}:
                rows.append([section, *cells])
    return rows


ITEMS = [Row(*row) for row in table_rows() if len(row) == len(Row._fields)]
TRAPS = [row[1:] for row in table_rows() if len(row) == 3]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """What a module defines: functions, classes, constants, and methods as `Class.method`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
    return frozenset(found)


def exists(reference: str, *, under: str) -> bool:
    path, _, name = reference.partition("::")
    file = ROOT / under / path
    return file.exists() and name in names_in(file)


def test_the_document_has_every_section_and_all_nine_traps():
    text = DOCUMENT.read_text()
    for section in ("Views", "Network", "Loss", "Training", "Downstream", "Traps"):
        assert f"\n## {section}" in text
    assert len(ITEMS) > 60
    assert len(TRAPS) == 9
    assert all(len(row) in (3, len(Row._fields)) for row in table_rows())


@pytest.mark.parametrize("row", ITEMS, ids=lambda row: row.item)
def test_every_item_has_a_grade_with_its_kind_of_source(row):
    assert row.grade in GRADES
    assert re.search(GRADES[row.grade], row.source)


@pytest.mark.parametrize("row", ITEMS, ids=lambda row: row.item)
def test_every_name_of_code_and_test_exists(row):
    for reference in quoted(row.code):
        assert exists(reference, under="glmae_ray"), reference
    for reference in quoted(row.test):
        assert exists(reference, under="tests"), reference
    pinned = bool(quoted(row.test)) and bool(quoted(row.code))
    assert pinned or row.test == "whoever ingests them chooses; not shipped"


@pytest.mark.parametrize("row", [row for row in ITEMS if row.field], ids=lambda row: row.item)
def test_every_value_is_the_default(row):
    (field,), (value,) = quoted(row.field), quoted(row.value)
    kind = FinetuneConfig if row.section == "Downstream" else PretrainConfig
    assert default(kind, field) == yaml.safe_load(value)


def default(kind: type[TrainConfig], field: str) -> Any:
    whole = {"store": "none", "run": "none", "init": "x", "steps": 1, "global_batch": 1}
    given = kind.model_validate(whole)
    found = functools.reduce(getattr, field.split("."), given)
    return list(found) if isinstance(found, tuple) else found


def test_no_default_of_the_method_is_left_out():
    """Every field of views, model and loss, and what the optimizer has of them."""
    named = {name for row in ITEMS if row.section != "Downstream" for name in quoted(row.field)}
    given = PretrainConfig(store="none", run="none", steps=1, global_batch=1)
    not_method = {
        "model.preset",
        "model.channels",
        "model.compile",
        "model.activation_checkpointing",
        "optim.rewind_after",
    }
    for section in ("views", "model", "loss", "optim"):
        fields = {f"{section}.{name}" for name in type(getattr(given, section)).model_fields}
        assert fields - named - not_method == set()


@pytest.mark.parametrize("row", TRAPS, ids=lambda row: row[0])
def test_every_trap_has_a_test_that_exists(row):
    references = quoted(row[1])
    assert references
    for reference in references:
        assert exists(reference, under="tests"), reference
