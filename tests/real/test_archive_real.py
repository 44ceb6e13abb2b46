"""The whole folder of real volumes in one command: every file accounted for, every voxel kept."""

import json
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from glmae_ray.cli import main
from glmae_ray.store.index import VolumeIndex, read_files, read_quarantine
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.volume import to_source_axes

pytestmark = [pytest.mark.real, pytest.mark.ray]

QUARANTINED = {
    "4d_128x96x24x2.nii.gz": "not_3d",
    "4d_single_slice_256x256x1x3.nii.gz": "not_3d",
    "rgba_atlas.nii.gz": "not_an_image",
    "constant_zero_64.nii.gz": "constant",
    "nan_inf_mtr.nii.gz": "non_finite",
    "tiny_4x5x7_aniso.nii.gz": "too_small",
    "truncated_half.nii.gz": "truncated",
    "10868_1000884_t2w.mha": "not_an_image",
    "openkbp_kbp_143_tiny_crop.nii.gz": "duplicate",  # of kbp_143 itself
}


@pytest.fixture(scope="module")
def store(real_data, tmp_path_factory):
    place = tmp_path_factory.mktemp("archive") / "s"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLMAE_SUBJECT_SALT", "for tests")
        assert main(["ingest", f"source={real_data}", f"store={place}"]) == 0
    return place


def test_every_file_is_in_a_case_in_quarantine_or_no_image(store, real_data):
    rows = {row["location"]: row for row in read_files(store)}
    assert rows.keys() == {str(path) for path in real_data.rglob("*") if path.is_file()}
    cases = set(VolumeIndex.read(store).case_ids())
    quarantined = {row["source"] for row in read_quarantine(store)}
    for location, row in rows.items():
        assert row["outcome"] in ("case", "quarantined", "not_an_image")
        assert (row["outcome"] == "case") == (row["case_id"] in cases)
        if row["outcome"] == "not_an_image":
            assert Path(location).suffix in (".json", ".md")
    assert quarantined <= rows.keys()


def test_what_archives_really_contain_is_rejected_for_its_reason(store):
    reasons = {Path(row["source"]).name: row["reason"] for row in read_quarantine(store)}
    assert {name: reasons.get(name) for name in QUARANTINED} == QUARANTINED


def test_dicom_series_hold_the_voxels_of_their_ground_truths(store):
    # A ground truth with the voxels of a series is its duplicate: found by content hash.
    duplicates = Counter(
        Path(row["source"]).parent.name
        for row in read_quarantine(store)
        if row["reason"] == "duplicate" and "ground_truth" in row["source"]
    )
    assert duplicates["ge_anatomical"] == 4
    assert duplicates["generic_anatomical"] == 6
    assert duplicates["compressed_rle"] == duplicates["compressed_jpegls"] == 2


@pytest.mark.parametrize("name", ["headneck_ct", "hippocampus_mr", "sarcoma_ct"])
def test_images_labels_and_affines_are_those_that_nibabel_reads(store, real_data, name):
    opened, seen = VolumeStore.open(store), 0
    for row in VolumeIndex.read(store).records():
        source = Path(row["source"])
        if source.parts[-3] != name:
            continue
        seen += 1
        affine = np.reshape(row["source_affine"], (4, 4))
        image = nib.load(source)
        np.testing.assert_array_equal(affine, image.affine)
        back = to_source_axes(opened.read(row["case_id"])[0], affine)
        np.testing.assert_array_equal(back, image.get_fdata().astype(back.dtype))
        label = nib.load(real_data / name / "labelsTr" / f"{row['case_id']}.nii.gz")
        back = to_source_axes(opened.read_label(row["case_id"], "structures"), affine)
        np.testing.assert_array_equal(back, np.asanyarray(label.dataobj))
    assert seen == {"headneck_ct": 203, "hippocampus_mr": 40, "sarcoma_ct": 6}[name]


def test_partial_labels_say_what_was_looked_for(store, real_data):
    listed = json.loads((real_data / "headneck_ct" / "cases.json").read_text())
    organs = json.loads((real_data / "headneck_ct" / "dataset.json").read_text())["labels"]
    index = VolumeIndex.read(store)
    for case_id, about in listed.items():
        row = index.row(case_id)
        assert set(row["annotated"]) == set(about["structures"]) & organs.keys()
        assert row["structures"].keys() <= set(row["annotated"])
