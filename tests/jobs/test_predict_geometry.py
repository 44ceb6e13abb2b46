"""Label maps lie where their scan lies: every orientation, oblique axes, DICOM, reshaped cases."""

from __future__ import annotations

import itertools
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from nibabel import orientations

from glmae_ray.config_finetune import PredictConfig
from glmae_ray.config_loading import load
from glmae_ray.jobs.predict_inputs import FileCase
from glmae_ray.jobs.predict_worker import Predicted, Predictor, Todo
from glmae_ray.jobs.segmenting import Segmenter
from glmae_ray.store.items import SourceImage, SourceItem
from tests.jobs.segmenters import NAMES, write_segmenter
from tests.store import dicoms
from tests.store.scans import affine, change_nifti, voxels, write_nifti

AXES = [
    "".join(signs)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for signs in itertools.product(*order)
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return write_segmenter(tmp_path_factory.mktemp("run"))


def predict(run: str, out: Path, case, *words: str):
    cfg = load(PredictConfig, [f"run={run}", "source=none", f"out={out}", *words])
    outcome = Predictor(cfg).do(Todo(case, {}))
    assert isinstance(outcome, Predicted), outcome
    return outcome


def file_case(*paths: Path, suffix: str = ".nii.gz", case_id: str = "p1") -> FileCase:
    item = SourceItem(case_id, (SourceImage(suffix, tuple(map(str, paths))),))
    return FileCase(item, "CT", dicom_seg=suffix == ".dcm")


def canonical(path: Path) -> np.ndarray:
    return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)


def test_a_scan_gets_the_same_labels_in_each_of_the_48_orientations(run, tmp_path):
    ras = nib.Nifti1Image(voxels(), affine("RAS"))
    segmenter = Segmenter(run)
    expected = None
    for axes in AXES:
        moves = orientations.ornt_transform(
            orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(axes)
        )
        scan = ras.as_reoriented(moves)
        nib.save(scan, tmp_path / "p1.nii.gz")
        case = file_case(tmp_path / "p1.nii.gz")
        predict(run, tmp_path / "out", case)
        found = nib.load(tmp_path / "out" / "p1.nii.gz")
        assert found.shape == scan.shape
        assert found.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(found.affine, nib.load(tmp_path / "p1.nii.gz").affine)
        assert nib.aff2axcodes(found.affine) == tuple(axes)
        labels = canonical(tmp_path / "out" / "p1.nii.gz")
        if expected is None:
            source = case.open()
            expected = segmenter.label(source.array, source.row).transpose(2, 1, 0)
            assert len(np.unique(expected)) == 3
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize(
    "forms",
    [
        {"sform_code": 1, "qform_code": 1},
        {"sform_code": 4, "qform_code": 0},
        {"sform_code": 0, "qform_code": 3},
        {"sform_code": 0, "qform_code": 0},
        # Two forms that contradict each other: whoever reads one reads it of both files.
        {"sform_code": 2, "qform_code": 1, "qoffset_x": 77.0},
    ],
)
def test_a_nifti_file_finds_all_it_says_of_its_place_in_its_label_map(run, tmp_path, forms):
    path = tmp_path / "p1.nii.gz"
    matrix = affine("PIR", degrees=20)
    image = nib.Nifti1Image(voxels(), matrix)
    image.set_qform(matrix, code=1)
    nib.save(image, path)
    change_nifti(path, **forms)
    predict(run, tmp_path / "out", file_case(path))
    before, after = (nib.load(p).header for p in (path, tmp_path / "out" / "p1.nii.gz"))
    for name in ("pixdim", "xyzt_units", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z"):
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    for form in ("get_qform", "get_sform", "get_best_affine"):
        np.testing.assert_array_equal(getattr(after, form)(), getattr(before, form)())


def test_simpleitk_finds_scan_and_labels_at_the_same_place(run, tmp_path):
    scan = sitk.GetImageFromArray(voxels().T)
    scan.SetSpacing((0.9, 1.1, 3.0))
    scan.SetOrigin((-31.0, 12.5, 140.0))
    turn = np.deg2rad(15)
    scan.SetDirection([np.cos(turn), 0, np.sin(turn), 0, -1, 0, np.sin(turn), 0, -np.cos(turn)])
    sitk.WriteImage(scan, tmp_path / "p1.mha")
    predict(run, tmp_path / "out", file_case(tmp_path / "p1.mha", suffix=".mha"))
    found = sitk.ReadImage(tmp_path / "out" / "p1.nii.gz")
    assert found.GetSize() == scan.GetSize()
    for name in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(found, name)(), getattr(scan, name)(), atol=1e-5)


def test_probabilities_lie_on_the_same_grid_and_give_the_labels(run, tmp_path):
    path = write_nifti(tmp_path / "p1.nii.gz", axes="PIR")
    predict(run, tmp_path / "out", file_case(path), "probabilities=true")
    labels = nib.load(tmp_path / "out" / "p1.nii.gz")
    files = sorted((tmp_path / "out" / "probabilities" / "p1").iterdir())
    assert [file.name for file in files] == ["1_liver.nii.gz", "2_left_kidney.nii.gz"]
    shares = np.stack([nib.load(file).get_fdata(dtype=np.float32) for file in files])
    assert nib.load(files[0]).get_data_dtype() == np.float32
    np.testing.assert_array_equal(nib.load(files[1]).affine, labels.affine)
    whole = np.concatenate([1 - shares.sum(axis=0, keepdims=True), shares])
    assert (np.asarray(labels.dataobj) == whole.argmax(axis=0)).mean() > 0.999
    left = {file.name for file in (tmp_path / "out").iterdir()}
    assert left == {"p1.nii.gz", "p1.json", "probabilities"}


def series(folder: Path) -> FileCase:
    def complete(one, z):
        one.FrameOfReferenceUID = "1.2.826.7.9"
        one.PatientName = "Doe^Jane"

    paths = dicoms.write_series(folder, dicoms.voxels((22, 26, 9)), change=complete)
    return file_case(*reversed(paths), suffix=".dcm")


def test_a_dicom_series_gets_a_segmentation_object_of_the_same_labels(run, tmp_path):
    case = series(tmp_path / "scan")
    assert predict(run, tmp_path / "out", case) == Predicted()
    labels = nib.load(tmp_path / "out" / "p1.nii.gz")
    np.testing.assert_allclose(labels.affine, dicoms.affine(), atol=1e-4)
    found = highdicom.seg.segread(tmp_path / "out" / "p1.seg.dcm")
    assert [found.get_segment_description(n).SegmentLabel for n in (1, 2)] == list(NAMES)
    assert (found.PatientName, found.StudyInstanceUID) == ("Doe^Jane", "1.2.826.7")
    uids = [f"1.2.826.7.1.{z + 1}" for z in range(9)]
    stack = found.get_pixels_by_source_instance(
        uids,
        combine_segments=True,
        ignore_spatial_locations=True,
        assert_missing_frames_are_empty=True,
    )
    np.testing.assert_array_equal(stack.transpose(2, 1, 0), np.asarray(labels.dataobj))
    # And by the place that each frame states, which viewers go by.
    volume = found.get_volume(combine_segments=True)
    assert len(np.unique(volume.array)) == 3
    for index in np.argwhere(volume.array)[::97]:
        lps = volume.affine @ [*index, 1]
        x, y, z = np.rint(np.linalg.inv(labels.affine) @ (lps * [-1, -1, 1, 1]))[:3].astype(int)
        assert labels.dataobj[x, y, z] == volume.array[tuple(index)]


def test_a_file_of_many_frames_in_any_order_gets_one_too(run, tmp_path):
    order = [3, 0, 4, 1, 2, 8, 7, 6, 5]
    path = dicoms.write_multiframe(tmp_path / "p1.dcm", dicoms.voxels((22, 26, 9)), order=order)
    header = pydicom.dcmread(path)
    header.FrameOfReferenceUID = "1.2.826.7.9"
    header.save_as(path)
    assert predict(run, tmp_path / "out", file_case(path, suffix=".dcm")) == Predicted()
    labels = np.asarray(nib.load(tmp_path / "out" / "p1.nii.gz").dataobj)
    found = highdicom.seg.segread(tmp_path / "out" / "p1.seg.dcm")
    frames = found.get_pixels_by_source_frame(
        "1.2.826.7.2.1",
        range(1, 10),
        combine_segments=True,
        ignore_spatial_locations=True,
        assert_missing_frames_are_empty=True,
    )
    np.testing.assert_array_equal(frames.transpose(2, 1, 0), labels[:, :, order])


def test_headers_that_do_not_do_for_a_segmentation_leave_the_label_map_and_a_line(run, tmp_path):
    paths = dicoms.write_series(tmp_path / "scan", dicoms.voxels((22, 26, 9)))
    outcome = predict(run, tmp_path / "out", file_case(*paths, suffix=".dcm"))
    assert outcome.note.endswith(
        "no DICOM-SEG, its headers do not do for one: FrameOfReferenceUID is missing"
    )
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"p1.nii.gz", "p1.json"}
