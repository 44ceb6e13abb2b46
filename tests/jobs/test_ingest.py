"""`glmae ingest` through its door, with Ray."""

import json
import re

import nibabel as nib
import numpy as np
import pytest

from glmae_ray.cli import main
from glmae_ray.store.index import VolumeIndex, read_quarantine
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.volume import to_source_axes
from tests.store import scans
from tests.store.scans import write_nifti

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@pytest.fixture
def archive(tmp_path):
    """An nnU-Net data set with two people, one of them with labels; two loose files, one broken."""
    folder = tmp_path / "archive"
    for seed, name in enumerate(("p1", "p2")):
        data = scans.voxels(seed=seed)
        write_nifti(folder / "set" / "imagesTr" / f"{name}_0000.nii.gz", data, axes="PIR")
    labels = (scans.voxels(seed=1) > 100).astype(np.uint8) * 2
    write_nifti(folder / "set" / "labelsTr" / "p2.nii.gz", labels, axes="PIR")
    about = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "left": 1, "right": 2},
        "file_ending": ".nii.gz",
    }
    (folder / "set" / "dataset.json").write_text(json.dumps(about))
    write_nifti(folder / "loose.nii", scans.voxels(seed=2))
    whole = write_nifti(folder / "short.nii.gz", scans.voxels(seed=3)).read_bytes()
    (folder / "short.nii.gz").write_bytes(whole[: len(whole) // 2])
    return folder


def ingest(source, store, *words):
    return main(["ingest", f"source={source}", f"store={store}", *words])


def last_line(capsys):
    return capsys.readouterr().out.splitlines()[-1]


def test_an_archive_goes_in_and_the_broken_file_is_named(archive, tmp_path, capsys):
    assert ingest(archive, tmp_path / "s") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "ingested 3, already stored 0, quarantined 1"
    assert "truncated" in lines[-2]
    assert "short.nii.gz" in lines[-2]
    (row,) = read_quarantine(tmp_path / "s")
    assert row["reason"] == "truncated"


def test_what_is_stored_is_what_nibabel_reads(archive, tmp_path):
    assert ingest(archive, tmp_path / "s") == 0
    store, index = VolumeStore.open(tmp_path / "s"), VolumeIndex.read(tmp_path / "s")
    for row in index.records():
        source = nib.load(row["source"])
        affine = np.reshape(row["source_affine"], (4, 4))
        array = store.read(row["case_id"])[0]
        np.testing.assert_array_equal(to_source_axes(array, affine), np.asanyarray(source.dataobj))
        np.testing.assert_array_equal(affine, source.affine)
        assert row == store.record(row["case_id"])
    assert {row["case_id"]: row["modality"] for row in index.records()} == {
        "loose": "CT",
        "p1": "MR",
        "p2": "MR",
    }
    wanted = nib.load(archive / "set" / "labelsTr" / "p2.nii.gz")
    label = to_source_axes(store.read_label("p2", "structures"), wanted.affine)
    np.testing.assert_array_equal(label, np.asanyarray(wanted.dataobj))
    assert index.row("p2")["structures"] == {"right": int((label == 2).sum())}


def test_twice_does_nothing_twice(archive, tmp_path, capsys):
    ingest(archive, tmp_path / "s")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s" / "cases").rglob("*")}
    index = (tmp_path / "s" / "index.parquet").read_bytes()
    assert ingest(archive, tmp_path / "s") == 0
    assert last_line(capsys) == "ingested 0, already stored 3, quarantined 1"
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "s" / "cases").rglob("*")
    }
    assert index == (tmp_path / "s" / "index.parquet").read_bytes()


def test_more_cases_than_are_in_flight_all_arrive(tmp_path, capsys):
    for seed in range(11):
        write_nifti(tmp_path / "in" / f"{seed}.nii", scans.voxels(seed=seed))
    assert ingest(tmp_path / "in", tmp_path / "s", "modality=MR") == 0
    assert last_line(capsys) == "ingested 11, already stored 0, quarantined 0"
    assert set(VolumeIndex.read(tmp_path / "s").rows["modality"].to_pylist()) == {"MR"}


def test_another_modality_takes_a_case_in_again(archive, tmp_path, capsys):
    ingest(archive / "loose.nii", tmp_path / "s")
    assert ingest(archive / "loose.nii", tmp_path / "s", "modality=MR") == 0
    assert last_line(capsys) == "ingested 1, already stored 0, quarantined 0"


def test_a_setting_without_effect_says_so(archive, tmp_path, capsys):
    ingest(archive, tmp_path / "s", "chunk=16", "levels=2")
    capsys.readouterr()
    assert ingest(archive, tmp_path / "s") == 0
    out = capsys.readouterr().out
    assert re.search(r"chunk: \(32, 32, 32\) has no effect.*\(16, 16, 16\)", out)
    assert "levels: 3 has no effect" in out


def test_when_nothing_can_be_ingested_the_user_is_told_where_to_look(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.nii").touch()
    assert ingest(tmp_path / "in", tmp_path / "s") == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == "ingested 0, already stored 0, quarantined 1"
    assert "quarantine.parquet" in captured.err


def test_while_a_case_is_replaced_no_row_speaks_of_its_old_voxels(archive, tmp_path, monkeypatch):
    ingest(archive, tmp_path / "s")
    write_nifti(archive / "loose.nii", scans.voxels(seed=8))
    seen = []

    def watched(todo, **how):
        seen.append(VolumeIndex.read(tmp_path / "s").case_ids())
        raise KeyboardInterrupt

    monkeypatch.setattr("glmae_ray.jobs.ingest.outcomes", watched)
    assert ingest(archive, tmp_path / "s") == 130
    assert seen == [["p1", "p2"]]


@pytest.mark.parametrize("source", ["gone", "empty"])
def test_a_source_without_images_leaves_no_store(tmp_path, capsys, source):
    (tmp_path / "empty").mkdir()
    assert ingest(tmp_path / source, tmp_path / "s") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "s").exists()


def test_a_folder_that_is_no_store_is_left_alone(archive, tmp_path, capsys):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "letter.txt").write_text("dear")
    assert ingest(archive, tmp_path / "s") == 2
    assert "not a store" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["letter.txt"]
