"""Quarantine, without Ray: what is rejected, whose fault it is, and when it is read again."""

import itertools
import json
import shutil

import numpy as np
import pytest

from glmae_ray.store.index import VolumeIndex, read_quarantine
from glmae_ray.store.intake import Choices
from glmae_ray.store.readers import READERS
from glmae_ray.store.scan import Limits
from glmae_ray.store.zarr_store import VolumeStore
from tests.store import scans
from tests.store.scans import write_nifti
from tests.store.test_ledger import counts, ingest, ledger_of, source, store

__all__ = ["source", "store"]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_of_equal_voxels_the_first_in_path_order_stays(source, store, order):
    shutil.copy(source / "a.nii.gz", source / "b.nii.gz")
    ledger = ingest(source, store, order=lambda pending: [pending[n] for n in order])
    assert counts(ledger) == (2, 0, 1)
    assert store.cases() == VolumeIndex.read(store.path).case_ids() == ["a", "c"]
    (row,) = read_quarantine(store.path)
    assert (row["source"], row["reason"]) == (str(source / "b.nii.gz"), "duplicate")
    assert "case a" in row["message"]


def test_a_stored_case_wins_over_an_equal_one_from_elsewhere(source, store, tmp_path):
    ingest(source, store)
    (tmp_path / "new").mkdir()
    shutil.copy(source / "c.nii.gz", tmp_path / "new" / "0.nii.gz")
    assert counts(ingest(tmp_path / "new", store)) == (0, 0, 1)
    assert store.cases() == ["a", "b", "c"]


def test_quarantine_forgets_what_was_repaired_or_removed(source, store):
    for name in "xyz":
        (source / f"{name}.nii").touch()
    assert counts(ingest(source, store)) == (3, 0, 3)
    write_nifti(source / "x.nii", scans.voxels(seed=5))
    (source / "y.nii").unlink()
    assert counts(ingest(source, store)) == (1, 3, 1)
    assert [row["source"] for row in read_quarantine(store.path)] == [str(source / "z.nii")]


def test_a_source_that_broke_keeps_the_case_it_gave(source, store):
    ingest(source, store)
    (source / "a.nii.gz").write_bytes(b"")
    assert counts(ingest(source, store)) == (0, 2, 1)
    assert counts(ingest(source, store)) == (0, 2, 1)
    assert "a" in VolumeIndex.read(store.path).case_ids()


def test_what_goes_wrong_in_writing_is_not_the_sources_fault(source, store, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(VolumeStore, "write", full)
    with pytest.raises(OSError, match="No space left"):
        ingest(source, store)


def test_an_unforeseen_error_in_a_reader_is_that_cases_alone(source, store, monkeypatch):
    def surprise(files, limits):
        raise ZeroDivisionError("never thought of")

    monkeypatch.setitem(READERS, ".nii", surprise)
    write_nifti(source / "d.nii")
    ledger = ingest(source, store)
    assert counts(ledger) == (3, 0, 1)
    assert ledger.quarantined[0]["reason"] == "unreadable"
    assert "never thought of" in ledger.quarantined[0]["message"]


def test_a_source_that_was_rejected_is_not_read_again_until_something_changes(source, store):
    write_nifti(source / "small.nii", scans.voxels((3, 40, 40)))
    shutil.copy(source / "a.nii.gz", source / "z.nii.gz")
    assert counts(ingest(source, store)) == (3, 0, 2)
    assert ledger_of(source, store).pending == []
    assert counts(ingest(source, store)) == (0, 3, 2)
    # Other limits, another file, no twin any more.
    choices = Choices(limits=Limits(min_side=2))
    names = [p.item.case_id for p in ledger_of(source, store, choices=choices).pending]
    assert "small" in names
    write_nifti(source / "a.nii.gz", scans.voxels(seed=11))
    assert {p.item.case_id for p in ledger_of(source, store).pending} == {"a", "z"}
    assert counts(ingest(source, store)) == (2, 2, 1)


def test_an_unreadable_source_is_tried_again(source, store, monkeypatch):
    def offline(files, limits):
        raise OSError(5, "Input/output error", str(files.paths[0]))

    monkeypatch.setitem(READERS, ".nii", offline)
    write_nifti(source / "x.nii", scans.voxels(seed=5))
    ledger = ingest(source, store)
    assert counts(ledger) == (3, 0, 1)
    assert ledger.quarantined[0]["message"] == f"{source / 'x.nii'}: Input/output error; restore it"
    monkeypatch.undo()
    assert counts(ingest(source, store)) == (1, 3, 0)


def test_a_link_that_was_broken_leaves_quarantine_when_it_is_mended(source, store):
    (source / "x.nii").symlink_to(source.parent / "offline.nii")
    assert counts(ingest(source, store)) == (3, 0, 1)
    write_nifti(source.parent / "offline.nii", scans.voxels(seed=5))
    assert counts(ingest(source, store)) == (1, 3, 0)
    assert read_quarantine(store.path) == []


def test_a_data_set_and_its_file_have_to_agree_on_the_channels(tmp_path, store):
    write_nifti(tmp_path / "d" / "imagesTr" / "c.nii.gz", scans.voxels())
    about = {"modality": {"0": "T1", "1": "T2"}, "training": ["imagesTr/c.nii.gz"]}
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(about))
    ledger = ingest(tmp_path / "d", store)
    assert counts(ledger) == (0, 0, 1)
    assert "1 volumes, 2 in dataset.json" in ledger.quarantined[0]["message"]
    four = np.stack([scans.voxels(seed=n) for n in (1, 2)], axis=-1)
    write_nifti(tmp_path / "d" / "imagesTr" / "c.nii.gz", four)
    assert counts(ingest(tmp_path / "d", store)) == (1, 0, 0)
    assert store.read("c").shape[0] == 2
    assert ledger_of(tmp_path / "d", store).pending == []
