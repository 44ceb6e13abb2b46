"""Ledger and intake, without Ray: what is stored, redone and kept, and what users choose."""

import json
import os
import shutil

import numpy as np
import pytest

from glmae_ray.errors import UserError
from glmae_ray.store.index import VolumeIndex, read_files, read_quarantine
from glmae_ray.store.intake import Choices, take_in
from glmae_ray.store.ledger import Ledger
from glmae_ray.store.readers import read_image
from glmae_ray.store.scan import ImageFiles, ReadError
from glmae_ray.store.sources import discover
from glmae_ray.store.zarr_store import VolumeStore
from tests.store import scans
from tests.store.scans import write_nifti

SPLITS = (0.8, 0.1, 0.1)
AS_IT_IS = Choices()


def outcome_of(pending, store, choices=AS_IT_IS):
    try:
        return take_in(pending, store=store, choices=choices)
    except ReadError as error:
        return error


def ledger_of(source, store, *, splits=SPLITS, choices=AS_IT_IS):
    sources = discover(str(source), read_headers=lambda places: [None] * len(places))
    return Ledger(store, sources, splits=splits, choices=choices)


def ingest(source, store, *, order=lambda pending: pending, saves=True, **choices):
    """One run in this process, cases finishing in `order`."""
    choices = Choices(**choices)
    ledger = ledger_of(source, store, choices=choices)
    for pending in order(list(ledger.pending)):
        ledger.add(pending, outcome_of(pending, store, choices))
    if saves:
        ledger.save()
        ledger.save_files(secret="")
    return ledger


def counts(ledger):
    return ledger.ingested, ledger.already_stored, len(ledger.quarantined)


@pytest.fixture
def store(tmp_path):
    return VolumeStore.create(tmp_path / "s.zarr")


@pytest.fixture
def source(tmp_path):
    """Three cases; in path order a, b, c."""
    for seed, name in enumerate("abc"):
        write_nifti(tmp_path / "in" / f"{name}.nii.gz", scans.voxels(seed=seed))
    return tmp_path / "in"


def test_a_second_run_opens_nothing(source, store):
    assert counts(ingest(source, store)) == (3, 0, 0)
    ledger = ingest(source, store)
    assert ledger.pending == []
    assert counts(ledger) == (0, 3, 0)


def test_a_row_says_what_the_file_holds(source, store):
    ingest(source, store)
    row = VolumeIndex.read(store.path).row("b")
    assert row["shape"] == [13, 22, 17]
    assert row["source_shape"] == [17, 22, 13]
    assert row["spacing"] == pytest.approx([3.0, 1.1, 0.9])
    np.testing.assert_allclose(np.reshape(row["source_affine"], (4, 4)), scans.affine(), rtol=1e-6)
    assert row["source"] == str(source / "b.nii.gz")
    assert row == store.record("b")


def test_touched_files_are_hashed_and_not_written_again(source, store):
    ingest(source, store)
    os.utime(source / "a.nii.gz", (1, 1))
    ledger = ingest(source, store)
    assert [pending.item.case_id for pending in ledger.pending] == ["a"]
    assert counts(ledger) == (0, 3, 0)
    assert ingest(source, store).pending == []


def test_changed_content_replaces_its_case(source, store):
    ingest(source, store)
    write_nifti(source / "a.nii.gz", scans.voxels(seed=9))
    assert counts(ingest(source, store)) == (1, 2, 0)
    assert store.read("a").sum() == scans.voxels(seed=9).sum()
    assert len(VolumeIndex.read(store.path)) == 3


def test_a_moved_source_is_the_same_source(source, store):
    ingest(source, store)
    moved = source.rename(source.with_name("moved"))
    assert counts(ingest(moved, store)) == (0, 3, 0)
    assert VolumeIndex.read(store.path).row("a")["source"] == str(moved / "a.nii.gz")


def test_another_source_with_the_same_names_takes_nothing_away(source, store, tmp_path):
    ingest(source, store)
    write_nifti(tmp_path / "other" / "a.nii.gz", scans.voxels(seed=7))
    assert counts(ingest(tmp_path / "other", store)) == (1, 0, 0)
    ids = VolumeIndex.read(store.path).case_ids()
    assert [case_id.split("-")[0] for case_id in ids] == ["a", "a", "b", "c"]
    assert store.read("a").sum() == scans.voxels(seed=0).sum()
    assert counts(ingest(tmp_path / "other", store)) == (0, 1, 0)
    assert counts(ingest(source, store)) == (0, 3, 0)


def test_cases_of_a_killed_run_are_adopted(source, store):
    ingest(source, store, order=lambda pending: pending[:2], saves=False)
    assert not (store.path / "index.parquet").exists()
    ledger = ingest(source, store)
    assert [pending.item.case_id for pending in ledger.pending] == ["c"]
    assert counts(ledger) == (1, 2, 0)
    assert VolumeIndex.read(store.path).case_ids() == ["a", "b", "c"]


def test_a_run_killed_while_it_replaced_a_case_leaves_no_old_row(source, store):
    ingest(source, store)
    write_nifti(source / "a.nii.gz", scans.voxels(seed=9))
    # The tables are saved before the new case is booked, which is published when the kill comes.
    ledger = ledger_of(source, store)
    ledger.save()
    outcome_of(ledger.pending[0], store)
    assert counts(ingest(source, store)) == (0, 3, 0)
    assert VolumeIndex.read(store.path).row("a") == store.record("a")


def test_a_case_whose_folder_went_is_taken_in_again(source, store):
    ingest(source, store)
    store.remove("b")
    assert counts(ingest(source, store)) == (1, 2, 0)


def test_a_subject_keeps_its_split_whatever_is_asked_later(source, store):
    ingest(source, store)
    before = {row["subject"]: row["split"] for row in VolumeIndex.read(store.path).records()}
    write_nifti(source / "later" / "a.nii.gz", scans.voxels(seed=8))
    ledger = ledger_of(source, store, splits=(0.0, 0.0, 1.0))
    (pending,) = ledger.pending
    assert pending.item.subject == "a"
    assert pending.split == before["a"] != "test"


def outcomes(store):
    return {
        row["location"].rpartition("/")[2]: (row["outcome"], row["case_id"])
        for row in read_files(store.path)
    }


def test_every_file_has_a_row_that_says_what_became_of_it(source, store):
    shutil.copy(source / "a.nii.gz", source / "z.nii.gz")
    (source / "broken.nii").touch()
    (source / "notes.txt").touch()
    ingest(source, store)
    assert outcomes(store) == {
        "a.nii.gz": ("case", "a"),
        "b.nii.gz": ("case", "b"),
        "c.nii.gz": ("case", "c"),
        "z.nii.gz": ("quarantined", None),
        "broken.nii": ("quarantined", None),
        "notes.txt": ("not_an_image", None),
    }


def test_files_of_a_run_that_was_killed_are_pending(source, store):
    ledger = ledger_of(source, store)
    ledger.save_files(secret="")
    assert set(outcomes(store).values()) == {("pending", None)}


def test_splits_of_a_subject_do_not_follow_other_choices(source, store):
    ingest(source, store)
    before = {row["subject"]: row["split"] for row in VolumeIndex.read(store.path).records()}
    ledger = ledger_of(source, store, splits=(0, 0, 1), choices=Choices(crop=True))
    assert {p.item.subject: p.split for p in ledger.pending} == before


def nnunet_with_test(folder, case):
    about = {"channel_names": {"0": "CT"}, "labels": {"background": 0}, "file_ending": ".nii.gz"}
    write_nifti(folder / "imagesTs" / f"{case}_0000.nii.gz", scans.voxels(seed=40))
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


def test_a_stated_split_that_a_subject_cannot_have_is_told_before_anything_is_written(
    source, store, tmp_path
):
    ingest(source, store)
    before = {row["subject"]: row["split"] for row in VolumeIndex.read(store.path).records()}
    person = next(name for name, split in before.items() if split != "test")
    other = nnunet_with_test(tmp_path / "other", person)
    with pytest.raises(UserError, match=f"says test, but its subject {person} is in") as caught:
        ledger_of(other, store)
    assert len(caught.value.lines) == 1


def test_a_file_that_changes_from_channel_to_label_map_is_taken_in_again(tmp_path, store):
    image = write_nifti(tmp_path / "i.nii", scans.voxels())
    label = write_nifti(tmp_path / "l.nii", (scans.voxels() > 100).astype(np.uint8))
    manifest = tmp_path / "cases.csv"
    manifest.write_text(f"case_id,image\na,{image}|{label}\n")
    assert counts(ingest(manifest, store)) == (1, 0, 0)
    manifest.write_text(f"case_id,image,label\na,{image},{label}\n")
    assert counts(ingest(manifest, store)) == (1, 0, 0)
    row = VolumeIndex.read(store.path).row("a")
    assert (row["channels"], list(row["structures"])) == (1, ["1"])


def test_a_case_that_nobody_has_seen_does_not_take_the_place_of_one_of_the_source(
    source, store, tmp_path
):
    ingest(source, store)
    (tmp_path / "z").mkdir()
    shutil.copy(source / "a.nii.gz", tmp_path / "z" / "zz.nii.gz")
    ingest(tmp_path / "z", store, saves=False)  # killed before its tables
    store.write(
        read_image([ImageFiles(".nii.gz", (source / "a.nii.gz",))], case_id="zz").volume,
        labels={},
        label_names={},
        record={**store.record("a"), "case_id": "zz", "source": str(tmp_path / "z" / "zz.nii.gz")},
    )
    assert counts(ingest(source, store)) == (0, 3, 0)
    assert store.cases() == ["a", "b", "c"]


def test_one_of_several_volumes_is_taken_where_the_user_says_which(source, store):
    four = np.stack([scans.voxels(seed=n) for n in (20, 21)], axis=-1)
    write_nifti(source / "four.nii.gz", four)
    assert counts(ingest(source, store)) == (3, 0, 1)
    (row,) = read_quarantine(store.path)
    assert (row["reason"], "volume=" in row["message"]) == ("not_3d", True)

    assert counts(ingest(source, store, volume=1)) == (1, 3, 0)
    row = VolumeIndex.read(store.path).row("four")
    assert row["options"]["volume"] == "1"
    assert store.read("four").sum() == four[..., 1].sum()
    assert ledger_of(source, store, choices=Choices(volume=1)).pending == []
    assert counts(ingest(source, store, volume=0)) == (1, 3, 0)
    assert store.read("four").sum() == four[..., 0].sum()


def test_what_is_not_finite_is_filled_where_the_user_says_so(source, store):
    data = scans.voxels(dtype=np.float32, seed=30)
    data[0, 0, 0], data[1, 0, 0], data[2, 0, 0] = np.nan, np.inf, -np.inf
    write_nifti(source / "nan.nii.gz", data)
    assert counts(ingest(source, store)) == (3, 0, 1)
    assert read_quarantine(store.path)[0]["reason"] == "non_finite"

    assert counts(ingest(source, store, fill=True)) == (1, 3, 0)
    row = VolumeIndex.read(store.path).row("nan")
    assert (row["filled"], row["options"]["non_finite"]) == (3, "fill")
    assert np.isfinite(store.read("nan")).all()
    assert store.read("nan").max() == data[np.isfinite(data)].max()


def test_another_spacing_and_a_crop_are_made_and_recorded(source, store):
    ingest(source, store)
    before = VolumeIndex.read(store.path).row("a")
    assert counts(ingest(source, store, spacing_mm=(3.0, 2.2, 1.8), crop=True)) == (3, 0, 0)
    row = VolumeIndex.read(store.path).row("a")
    assert row["spacing"] == pytest.approx([3.0, 2.2, 1.8])
    assert np.prod(row["shape"]) < np.prod(before["shape"]) / 4
    assert row["source_shape"] == before["source_shape"]
    assert row["source_affine"] == before["source_affine"]
    assert row["options"]["crop"] == "foreground"
    assert row["options"]["spacing_mm"] == "[3.0, 2.2, 1.8]"
    assert counts(ingest(source, store)) == (3, 0, 0)
    assert VolumeIndex.read(store.path).row("a") == before
