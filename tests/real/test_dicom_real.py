"""Real DICOM series: voxels and affines of their ground truths, and what converters get wrong."""

import nibabel as nib
import numpy as np
import pydicom
import pytest

from glmae_ray.store.dicom import read_dicom
from glmae_ray.store.dicom_headers import read_slice_header
from glmae_ray.store.scan import ImageFiles, Limits, ReadError

pytestmark = pytest.mark.real

ANY = Limits(min_side=1, min_voxels=1)
SERIES = [
    "dicom_ok/ge_anatomical/001",
    "dicom_ok/ge_anatomical/001_implicit",
    "dicom_ok/generic_anatomical/001",
    "dicom_ok/generic_anatomical/001_implicit",
    "dicom_ok/generic_anatomical/002_non_isotropic",
    "tricky/dicom/compressed_jpegls/001",
    "tricky/dicom/compressed_rle/001",
    "tricky/dicom/slicecount/001",
]


def volumes_of(folder):
    """The files of a folder as discovery would group them."""
    groups = {}
    for path in sorted(folder.iterdir()):
        groups.setdefault(read_slice_header(path, salt=b"salt").series, []).append(path)
    return list(groups.values())


def read(paths):
    return read_dicom(ImageFiles(".dcm", tuple(paths)), ANY)


@pytest.mark.parametrize("series", SERIES)
def test_ground_truths_come_out_voxel_for_voxel(real_data, series):
    folder = real_data / series
    (paths,) = volumes_of(folder)
    scan = read(paths)
    truth = nib.as_closest_canonical(nib.load(f"{folder}_ground_truth.nii.gz"))
    ours = nib.as_closest_canonical(nib.Nifti1Image(scan.voxels, scan.affine))
    expected, found = np.asanyarray(truth.dataobj), np.asanyarray(ours.dataobj)
    assert (scan.modality, found.shape) == ("MR", expected.shape)
    if scan.voxels.dtype.kind == "i":
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(ours.affine, truth.affine, atol=1e-3)


def test_a_slice_of_unknown_thickness_is_refused_where_converters_assume_one(real_data):
    (paths,) = volumes_of(real_data / "dicom_ok/ge_anatomical/001_single_slice")
    with pytest.raises(ReadError, match="unknown thickness") as caught:
        read(paths)
    assert caught.value.reason == "bad_geometry"


def check_positions(scan, paths):
    """Hold the affine and the voxels of every slice against the headers."""
    slices = [pydicom.dcmread(path) for path in paths]
    normal = np.cross(scan.affine[:3, 0], scan.affine[:3, 1]) @ np.diag([-1, -1, 1])
    slices.sort(key=lambda one: float(np.dot(normal, one.ImagePositionPatient)))
    for z, one in enumerate(slices):
        position = np.diag([-1, -1, 1]) @ np.array(one.ImagePositionPatient, float)
        np.testing.assert_allclose((scan.affine @ [0, 0, z, 1])[:3], position, atol=1e-3)
        scale = float(one.get("RescaleSlope", 1)), float(one.get("RescaleIntercept", 0))
        expected = one.pixel_array.T.astype(float) * scale[0] + scale[1]
        np.testing.assert_array_equal(scan.voxels[:, :, z], expected)
    row = np.array(slices[0].ImageOrientationPatient[:3], float) * slices[0].PixelSpacing[1]
    column = np.array(slices[0].ImageOrientationPatient[3:], float) * slices[0].PixelSpacing[0]
    expected = np.diag([-1, -1, 1]) @ np.stack([row, column], axis=1)
    np.testing.assert_allclose(scan.affine[:3, :2], expected, atol=1e-9)


def test_gantry_tilt_keeps_every_slice_at_its_position(real_data):
    (paths,) = volumes_of(real_data / "tricky/dicom/gantrytilting/001")
    scan = read(paths)
    assert (scan.modality, scan.voxels.dtype, scan.voxels.shape[2]) == ("CT", np.int16, len(paths))
    check_positions(scan, paths)
    axes = scan.affine[:3, :3] / np.linalg.norm(scan.affine[:3, :3], axis=0)
    angle = np.rad2deg(np.arcsin(abs(axes[:, 1] @ axes[:, 2])))
    assert angle == pytest.approx(14, abs=0.1)


def test_two_orientations_in_one_folder_are_two_volumes(real_data):
    groups = volumes_of(real_data / "tricky/dicom/sliceorientation/001")
    assert [len(paths) for paths in groups] == [2, 2]
    for paths in groups:
        check_positions(read(paths), paths)
    with pytest.raises(ReadError) as caught:
        read([*groups[0], *groups[1]])
    assert caught.value.reason == "bad_geometry"
