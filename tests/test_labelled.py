"""Which labelled cases a run uses, what it knows of each, and what it refuses in a line."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from glmae_ray.config_finetune import FinetuneConfig
from glmae_ray.config_loading import load
from glmae_ray.errors import UserError
from glmae_ray.labelled import Labelled, choose_cases
from glmae_ray.store.index import VolumeIndex
from glmae_ray.structures import label_values, unknown_structures
from tests.store.test_index import record

NAMES = {"background": 0, "liver": 1, "spleen": 2, "kidney": 3}


def case(name: str, *, names: dict[str, int] | None = None, **change):
    """A row of a data set that names `NAMES`."""
    options = {"label_names": json.dumps(NAMES if names is None else names)}
    return record(name, **{"structures": {"liver": 70, "spleen": 7}, "annotated": None,
                           "options": options, **change})  # fmt: skip


def people(count: int, *, start: int = 0) -> list[dict]:
    """People with two scans each; the last one is held out."""
    rows = [
        case(f"p{n:03d}{scan}", subject=f"p{n:03d}", split="train")
        for n in range(start, start + count)
        for scan in "ab"
    ]
    return [*rows, case("v0", split="val")]


def choose(store, rows: list[dict] | None, *words: str) -> Labelled:
    if rows is not None:
        VolumeIndex.from_records(rows).write(store)
    given = [f"store={store}", "run=r", "init=e", "steps=1", "global_batch=1", "crops.size=[9,8,7]"]
    return choose_cases(load(FinetuneConfig, [*given, *words]))


def refusal(store, rows: list[dict], *words: str) -> str:
    with pytest.raises(UserError) as caught:
        choose(store, rows, *words)
    (line,) = caught.value.lines
    return line


def test_all_that_is_there_is_learned_in_the_order_of_its_values(tmp_path):
    rows = [case("a"), case("b", structures={"kidney": 3}), case("v", split="val")]
    labelled = choose(tmp_path, rows)
    assert labelled.structures == ("liver", "spleen", "kidney")
    assert (labelled.outputs, labelled.channels, labelled.modalities) == (4, 1, ("CT",))
    assert labelled.train.case_ids() == ["a", "b"]
    assert labelled.val.case_ids() == ["v"]
    assert choose(tmp_path, None, "structures=[kidney,liver]").structures == ("kidney", "liver")


def test_a_smaller_part_of_the_people_is_inside_every_larger_one(tmp_path):
    rows = people(40)
    sets = [
        set(choose(tmp_path, rows, f"label_fraction={share}").train.case_ids())
        for share in (0.001, 0.125, 0.25, 0.5, 1.0)
    ]
    assert [len(part) for part in sets] == [2, 10, 20, 40, 80]
    assert all(few < more for few, more in itertools.pairwise(sets))
    assert all({f"{name[:4]}a", f"{name[:4]}b"} <= part for part in sets for name in part)
    assert choose(tmp_path, rows, "label_fraction=0.125").val.case_ids() == ["v0"]
    counted = [set(choose(tmp_path, rows, f"label_cases={n}").train.case_ids()) for n in (3, 10)]
    assert [len(part) for part in counted] == [3, 10]
    assert counted[0] < counted[1] == sets[1]


def test_the_part_depends_on_the_seed_and_on_nobody_else(tmp_path):
    rows = people(40)
    part = choose(tmp_path, rows, "label_fraction=0.25").train.case_ids()
    random.Random(0).shuffle(rows)
    strangers = [case(f"x{n}", subject=f"x{n}", split="test") for n in range(9)]
    assert choose(tmp_path, rows + strangers, "label_fraction=0.25").train.case_ids() == part
    others = choose(tmp_path, rows, "label_fraction=0.25", "seed=1").train.case_ids()
    assert set(others) != set(part)
    # Of the same people, whoever joins them, the order stays.
    more = choose(tmp_path, rows + people(40, start=40)[:-1], "label_fraction=0.25")
    joined = [name for name in more.train.case_ids() if name < "p040"]
    assert set(joined) <= set(part) or set(part) <= set(joined)


def test_what_nobody_looked_for_is_not_known(tmp_path):
    structures = ("liver", "spleen", "kidney")
    assert unknown_structures(case("a"), structures) == []  # nobody says: all that has a name
    partial = case("b", annotated=["spleen"])
    assert unknown_structures(partial, structures) == ["kidney"]  # the liver is in the map
    fewer = case("c", names={"liver": 1, "spleen": 2})
    assert unknown_structures(fewer, structures) == ["kidney"]
    nameless = record("d", structures={"1": 8}, annotated=None, options={})
    assert unknown_structures(nameless, ("1", "2")) == []
    rows = [case("a", structures={"kidney": 1}), partial, fewer, case("v", split="val")]
    labelled = choose(tmp_path, rows, "augment.rotate90=0")
    assert labelled.as_dict()["unknown"] == {"b": ["kidney"], "c": ["kidney"]}
    (note,) = labelled.notes
    assert "in 2 of 3 training cases some may be unlabelled: kidney in 2" in note


def test_values_have_the_names_of_each_cases_own_data_set():
    assert label_values(case("a")) == {"liver": 1, "spleen": 2, "kidney": 3}
    other = case("b", names={"background": 0, "spleen": 6}, structures={"spleen": 5, "9": 2})
    assert label_values(other) == {"spleen": 6, "9": 9}
    assert label_values(record("c", structures={"7": 3}, options={})) == {"7": 7}


@pytest.mark.parametrize(
    ("change", "words", "line"),
    [
        ({"structures": {"9": 4}}, (), "case b: its label map holds 9, which its data set does no"),
        ({}, ("structures=[liver,gall]",), "structures: gall: in none of the 2 training cases; th"),
        (
            {},
            ("where=split == 'x'",),
            "where: \"split == 'x'\" selects no case; the store has 2 tr",
        ),
        ({}, ("val_where=split == 'x'",), "val_where: \"split == 'x'\" selects no case; the store"),
        ({}, ("where=spilt == 'x'",), "where: \"spilt == 'x'\" is wrong: there is no column spilt"),
        ({"channels": 2}, (), "where, val_where: cases differ in channels: a has 1, b has 2; na"),
        ({}, ("label_cases=3",), "label_cases: 3 is more than the 2 there are"),
    ],
)
def test_what_cannot_be_learned_is_refused_in_a_line(tmp_path, change, words, line):
    rows = [case("a"), case("b", **change), case("v", split="val")]
    assert refusal(tmp_path, rows, *words).startswith(line)


def test_a_structure_that_few_labels_leave_out_is_named(tmp_path):
    rows = [*people(8), case("rare", structures={"kidney": 1})]
    line = refusal(tmp_path, rows, "label_cases=1", "seed=1")
    assert line.startswith("structures: kidney: in none of the 1 cases that few labels leave")


def test_cases_without_a_label_map_are_left_out_and_told(tmp_path):
    bare = {"structures": {}, "annotated": None}
    rows = [case("a"), case("b", **bare), case("v", split="val")]
    labelled = choose(tmp_path, rows)
    assert labelled.train.case_ids() == ["a"]
    assert "where: 1 of 2 cases have no label map and are left out: b" in labelled.notes
    empty = case("c", structures={}, annotated=["liver"])  # somebody looked, and there was none
    assert choose(tmp_path, [*rows, empty]).train.case_ids() == ["a", "c"]
    line = refusal(tmp_path, [case("b", **bare), case("v", split="val")])
    assert "selects 1 cases, none of which has a label map (b)" in line


def test_notes_tell_of_padding_of_shared_people_and_of_turns(tmp_path):
    rows = [case("a", shape=[30, 40, 50]), case("v", split="val", shape=[8, 40, 50])]
    notes = choose(tmp_path, rows, "val_where=split != 'test'", "crops.spacing=3").notes
    assert "val_where: 1 people may be trained on too (a); its figures then flatter" in notes
    padded = "1 of 2 held-out cases are smaller along some axis and are padded with air: v"
    assert f"crops.size: {padded}" in notes
    assert "augment.rotate90: a plane of 8 by 7 is turned by 180 degrees only" in notes


def test_classes_come_from_a_table_and_numbers_are_sorted_as_such(tmp_path):
    table = tmp_path / "classes.csv"
    table.write_text("case_id,class,age\na,10,1\nb,9,2\nv,9,3\nstranger,4,4\n")
    words = ["task=classification", f"targets={table}", "head.kind=linear"]
    rows = [case("a"), case("b"), case("c"), case("v", split="val", structures={})]
    labelled = choose(tmp_path, rows, *words)
    assert labelled.classes == ("9", "10")
    assert labelled.targets == {"a": 1, "b": 0, "v": 0}
    assert (labelled.outputs, labelled.structures) == (2, ())
    assert any("1 of 3 cases have no row in" in note for note in labelled.notes)
    assert json.loads(json.dumps(labelled.as_dict()))["classes"] == ["9", "10"]
    for text, line in (
        ("case_id,klass\na,1\n", "has no column class; it has case_id, klass"),
        ("case_id,class\na,1\na,2\n", "line 3: a has two classes"),
        ("case_id,class\na,\n", "line 2: case_id or class is empty"),
        ("case_id,class\na,1\nb,1\nv,1\n", "all training cases are of the class 1"),
        ("case_id,class\na,1\nb,2\nv,3\n", "targets: 3: the class of no training case"),
    ):
        table.write_text(text)
        assert line in refusal(tmp_path, rows, *words)
    table.unlink()
    assert "does not exist" in refusal(tmp_path, rows, *words)
