"""VolumeIndex: a row a case, the same from whichever side it is read; splits; quarantine."""

import hashlib
import json
import os
import pickle

import numpy as np
import pyarrow as pa
import pytest

from glmae_ray.errors import UserError
from glmae_ray.store.index import (
    QUARANTINE_SCHEMA,
    SCHEMA,
    VolumeIndex,
    assign_split,
    read_quarantine,
    write_quarantine,
)


def record(case_id, **change):
    row = {
        "case_id": case_id,
        "subject": case_id,
        "split": "train",
        "modality": "CT",
        "channels": 1,
        "shape": [30, 40, 50],
        "spacing": [3.0, 0.9, 0.8],
        "affine": [float(n) for n in range(16)],
        "source_affine": [float(-n) for n in range(16)],
        "source_shape": [50, 40, 30],
        "dtype": "int16",
        **{name: [1.5] for name in ("minimum", "maximum", "p0_5", "p50", "p99_5", "mean", "std")},
        "box_start": [1, 2, 3],
        "box_stop": [29, 30, 31],
        "factors": [[1, 1, 1], [1, 2, 2], [1, 4, 4]],
        "structures": {"spleen": 7, "liver": 70},
        "annotated": ["spleen", "liver", "kidney"],
        "filled": 0,
        "acquisition": {"KVP": "120"},
        "source": f"/scans/{case_id}.nii",
        "source_hash": "s" + case_id,
        "source_stamp": "t" + case_id,
        "voxel_hash": "v" + case_id,
        "reader": "nifti",
        "ingest_version": 1,
        "options": {"modality": "CT"},
    }
    assert row.keys() == set(SCHEMA.names)
    return {**row, **change}


def test_rows_come_back_from_disk_and_from_json(tmp_path):
    rows = [record("a"), record("b", structures={})]
    VolumeIndex.from_records(json.loads(json.dumps(rows))).write(tmp_path)
    index = VolumeIndex.read(tmp_path)
    assert index.records() == rows
    assert index.row("b") == rows[1]
    assert len(index) == 2
    with pytest.raises(KeyError):
        index.row("c")


def test_the_file_does_not_depend_on_the_order_of_arrival(tmp_path):
    rows = [record(name) for name in "cab"]
    rows[1]["structures"] = dict(reversed(rows[1]["structures"].items()))
    for folder, order in (("one", rows), ("two", rows[::-1])):
        (tmp_path / folder).mkdir()
        VolumeIndex.from_records(order).write(tmp_path / folder)
    one, two = ((tmp_path / name / "index.parquet").read_bytes() for name in ("one", "two"))
    assert one == two
    assert VolumeIndex.read(tmp_path / "one").case_ids() == ["a", "b", "c"]


def test_columns_come_as_numpy():
    index = VolumeIndex.from_records([record("a"), record("b", box_start=[4, 5, 6])])
    np.testing.assert_array_equal(
        index.boxes(), [[[1, 2, 3], [29, 30, 31]], [[4, 5, 6], [29, 30, 31]]]
    )
    assert index.boxes().dtype == np.int64
    np.testing.assert_array_equal(index.factors()[1], [[1, 1, 1], [1, 2, 2], [1, 4, 4]])
    np.testing.assert_array_equal(index.shapes(), [[30, 40, 50]] * 2)
    np.testing.assert_array_equal(index.spacings(), [[3.0, 0.9, 0.8]] * 2)


def test_columns_of_a_selection_are_those_of_its_rows():
    rows = [record(name, box_start=[n, n, n]) for n, name in enumerate("abcd")]
    rows[2]["split"] = "val"
    rows[3] |= {"split": "val", "modality": "MR"}
    index = VolumeIndex.from_records(rows)
    assert index.select(split="val").case_ids() == ["c", "d"]
    assert index.select(split="val", modality="MR").boxes()[0, 0].tolist() == [3, 3, 3]
    assert index.select(split="val").factors().shape == (2, 3, 3)
    empty = index.select(split="test")
    assert (len(empty), empty.boxes().shape, empty.factors().shape[0]) == (0, (0, 2, 3), 0)


def test_the_fingerprint_changes_with_voxels_and_splits_only():
    rows = [record("a"), record("b")]
    plain = VolumeIndex.from_records(rows).fingerprint()
    assert VolumeIndex.from_records([rows[0], {**rows[1], "source": "x"}]).fingerprint() == plain
    for change in ({"voxel_hash": "x"}, {"split": "val"}, {"case_id": "c"}):
        index = VolumeIndex.from_records([rows[0], {**rows[1], **change}])
        assert index.fingerprint() != plain


def test_the_fingerprint_is_that_of_the_sorted_lines(monkeypatch):
    # Ids that sort differently with and without what follows them; one beyond ASCII.
    names = ["b", "a", "a b", "a\x01", "a-1", "ä", "\U0001f600", "\uffee"]
    rows = [record(name, voxel_hash="v" * number) for number, name in enumerate(names)]
    index = VolumeIndex.from_records(rows)
    lines = sorted(f"{row['case_id']}\t{row['voxel_hash']}\ttrain" for row in rows)
    expected = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert index.fingerprint() == expected
    monkeypatch.setattr("glmae_ray.store.index._LINES_AT_ONCE", 3)
    assert index.fingerprint() == expected
    assert VolumeIndex(pa.concat_tables([index.rows[5:], index.rows[:5]])).fingerprint() == expected
    assert VolumeIndex.from_records([]).fingerprint() == hashlib.sha256(b"").hexdigest()


def test_some_columns_are_read_alone_and_look_the_same(tmp_path):
    rows = [record("a"), record("b", split="val", structures={})]
    VolumeIndex.from_records(rows).write(tmp_path)
    index = VolumeIndex.read(tmp_path, columns={"structures", "case_id", "box_start", "box_stop"})
    assert index.rows.column_names == ["case_id", "box_start", "box_stop", "structures"]
    assert index.at(0) == {name: rows[0][name] for name in index.rows.column_names}
    assert index.row("b")["structures"] == {}
    np.testing.assert_array_equal(index.boxes(), VolumeIndex.read(tmp_path).boxes())
    assert index.records() == [index.at(0), index.at(1)]
    with pytest.raises(ValueError, match="nothing"):
        VolumeIndex.read(tmp_path, columns=["nothing"])


def test_a_row_is_looked_up_by_its_position_in_any_table():
    rows = [record(name, std=[n + 0.5] * (n + 1), annotated=None) for n, name in enumerate("abcde")]
    index = VolumeIndex.from_records(rows)
    cut = VolumeIndex(pa.concat_tables([index.rows[:2], index.rows[2:]]))
    for position, row in enumerate(rows):
        assert index.at(position) == cut.at(position) == row
    with pytest.raises(IndexError):
        index.at(5)


def test_a_selection_leaves_the_other_rows_behind_when_it_travels():
    rows = [record(f"{number:04}") for number in range(2000)]
    index = VolumeIndex.from_records(rows)
    whole = len(pickle.dumps(index))
    for few in (
        index.keep(np.arange(2000) % 500 == 0),
        index.where("case_id in ['0000', '0500', '1000', '1500']", field="where"),
    ):
        few._positions, few.at(0)  # what is remembered stays here
        assert len(pickle.dumps(few)) < 25_000 < whole / 20
        assert pickle.loads(pickle.dumps(few)).records() == rows[::500]
    assert len(index.keep(np.zeros(2000, bool))) == 0


def test_the_buffers_of_a_large_index_travel_out_of_band():
    index = VolumeIndex.from_records([record(f"{number:04}") for number in range(2000)])
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(index, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 20_000
    assert pickle.loads(data, buffers=buffers).records() == index.records()


def test_a_store_without_an_index_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        VolumeIndex.read(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="has no index"):
        VolumeIndex.read(tmp_path / "file")


def test_a_failed_write_leaves_the_old_index(tmp_path, monkeypatch):
    VolumeIndex.from_records([record("a")]).write(tmp_path)

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        VolumeIndex.from_records([]).write(tmp_path)
    assert VolumeIndex.read(tmp_path).case_ids() == ["a"]


def test_quarantine_rows_come_back_sorted(tmp_path):
    assert read_quarantine(tmp_path) == []
    rows = [dict.fromkeys(QUARANTINE_SCHEMA.names, name) for name in "ba"]
    write_quarantine(tmp_path, rows)
    assert read_quarantine(tmp_path) == rows[::-1]


def test_splits_follow_the_shares_and_stay():
    people = [f"person {n}" for n in range(5000)]
    splits = [assign_split(person, (0.8, 0.1, 0.1)) for person in people]
    shares = [splits.count(name) / len(people) for name in ("train", "val", "test")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    assert splits == [assign_split(person, (0.8, 0.1, 0.1)) for person in people]
    assert {assign_split(person, (0, 0, 1)) for person in people} == {"test"}
    assert assign_split("kbp_001", (0.8, 0.1, 0.1)) == "train"  # today, and on any machine
