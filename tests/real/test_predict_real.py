"""Prediction on what archives hold: each label map where its scan lies, the rest told and left."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest

from glmae_ray.cli import main
from tests.jobs.segmenters import write_segmenter

pytestmark = [pytest.mark.real, pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

# Windows of (16, 12, 8) are tiny; without overlap a large scan takes seconds all the same.
WORDS = ["modality=CT", "inference.overlap=0", "inference.batch=64"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return write_segmenter(tmp_path_factory.mktemp("run"), "crops.size=[16,32,32]")


def predict(run, source, out, *words) -> int:
    return main(["predict", f"run={run}", f"source={source}", f"out={out}", *WORDS, *words])


def test_of_every_tricky_file_there_is_a_label_map_in_place_or_a_reason(
    run, real_data, tmp_path, capsys
):
    assert predict(run, real_data / "tricky", tmp_path) == 0
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    lines = (tmp_path / "refused.csv").read_text().splitlines()
    refused = {row["source"] for row in csv.DictReader(lines)}
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"predicted {len(records)}, already there 0, refused {len(refused)}"
    names = {record["case"] for record in records}
    assert {"orient_PSR", "orient_PIR_ct", "orientation_phantom_32x48x64"} <= names
    for word in (
        "truncated_half",
        "zero_bytes",
        "10868_1000884_t2w",
        "rgba_atlas",
        "4d_128x96x24x2",
    ):
        assert any(word in source for source in refused), word
    for record in records:
        if not record["source"].endswith((".nii", ".nii.gz")):
            continue
        source, labels = nib.load(record["source"]), nib.load(tmp_path / f"{record['case']}.nii.gz")
        assert labels.shape == source.shape[:3], record["case"]
        np.testing.assert_array_equal(labels.affine, source.affine, err_msg=record["case"])


def in_a_frame(series: Path, to: Path) -> Path:
    """A copy that says in which frame of reference it lies, as a DICOM-SEG has to."""
    to.mkdir()
    for number, path in enumerate(sorted(p for p in series.iterdir() if p.is_file())):
        header = pydicom.dcmread(path)
        header.FrameOfReferenceUID = "1.2.826.0.1.3680043.8.498.1"
        header.save_as(to / f"{number}.dcm")
    return to


@pytest.mark.usefixtures("cases_here")
def test_a_series_without_a_frame_of_reference_gets_no_segmentation_and_says_why(
    run, real_data, tmp_path, capsys
):
    assert predict(run, real_data / "dicom_ok" / "ge_anatomical/001", tmp_path) == 0
    assert "no DICOM-SEG" in (told := capsys.readouterr().out)
    assert "FrameOfReferenceUID is missing" in told
    assert [*tmp_path.glob("*.nii.gz")]
    assert not [*tmp_path.glob("*.seg.dcm")]


@pytest.mark.usefixtures("cases_here")
@pytest.mark.parametrize("series", ["ge_anatomical/001", "generic_anatomical/002_non_isotropic"])
def test_a_dicom_series_and_its_nifti_file_get_the_same_labels(run, real_data, tmp_path, series):
    folder = real_data / "dicom_ok" / series
    assert predict(run, in_a_frame(folder, tmp_path / "in"), tmp_path / "dicom") == 0
    truth = f"{folder}_ground_truth.nii.gz"
    assert predict(run, truth, tmp_path / "nifti") == 0
    (one,), (other,) = ([*(tmp_path / name).glob("*.nii.gz")] for name in ("dicom", "nifti"))
    found, expected = (nib.as_closest_canonical(nib.load(path)) for path in (one, other))
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-3)
    same = np.asarray(found.dataobj) == np.asarray(expected.dataobj)
    assert same.mean() > 0.999  # scaled values differ in their last digit
    (segmentation,) = (tmp_path / "dicom").glob("*.seg.dcm")
    volume = highdicom.seg.segread(segmentation).get_volume(combine_segments=True)
    labels = nib.load(one)
    for index in np.argwhere(volume.array)[::9973]:
        lps = volume.affine @ [*index, 1]
        place = np.linalg.inv(labels.affine) @ (lps * [-1, -1, 1, 1])
        x, y, z = np.rint(place[:3]).astype(int)
        np.testing.assert_allclose(place[:3], (x, y, z), atol=0.02)
        assert labels.dataobj[x, y, z] == volume.array[tuple(index)]
