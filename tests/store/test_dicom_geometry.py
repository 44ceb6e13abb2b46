"""DICOM slices and frames become volumes with an exact affine, or are bad geometry or not 3-D."""

import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import Dataset

from tests.store import dicoms
from tests.store.dicoms import error_of, read, set_on, write_multiframe, write_series

# --- geometry


def test_voxels_and_affine_are_those_that_were_written_whatever_the_order(tmp_path):
    paths = write_series(tmp_path)
    np.random.default_rng(3).shuffle(paths)
    scan = read(paths)
    np.testing.assert_array_equal(scan.voxels, dicoms.voxels())
    np.testing.assert_allclose(scan.affine, dicoms.affine(), atol=1e-5)
    assert (scan.reader, scan.modality, scan.volumes) == ("dicom", "MR", 1)


def test_gantry_tilt_is_a_shear_of_the_affine(tmp_path):
    step = 3.0 * dicoms.AXES[2] + 0.8 * dicoms.AXES[1]
    scan = read(write_series(tmp_path, step=step))
    np.testing.assert_array_equal(scan.voxels, dicoms.voxels())
    np.testing.assert_allclose(scan.affine, dicoms.affine(step), atol=1e-5)


def test_the_affine_is_simpleitks(tmp_path):
    paths = write_series(tmp_path)
    image = sitk.ReadImage([str(path) for path in paths])
    x, y, z = 7, 3, 5
    point = np.diag([-1, -1, 1, 1]) @ read(paths).affine @ [x, y, z, 1]
    np.testing.assert_allclose(point[:3], image.TransformIndexToPhysicalPoint((x, y, z)), atol=1e-4)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"SpacingBetweenSlices": "2.5", "SliceThickness": "4"}, 2.5),
        ({"SliceThickness": "4"}, 4.0),
    ],
)
def test_one_slice_is_as_thick_as_its_header_says(tmp_path, tags, expected):
    data = dicoms.voxels()[:, :, :1]
    scan = read(write_series(tmp_path, data, change=set_on(0, **tags)))
    assert scan.voxels.shape == (11, 14, 1)
    np.testing.assert_allclose(scan.affine, dicoms.affine(expected * dicoms.AXES[2]), atol=1e-5)


def test_one_slice_without_thickness_is_bad_geometry(tmp_path):
    assert error_of(write_series(tmp_path, dicoms.voxels()[:, :, :1])).reason == "bad_geometry"


@pytest.mark.parametrize("missing", range(1, dicoms.SHAPE[2] - 1))
def test_a_missing_slice_is_named_by_its_neighbour(tmp_path, missing):
    paths = write_series(tmp_path)
    error = error_of(paths[:missing] + paths[missing + 1 :])
    assert error.reason == "bad_geometry"
    assert f"slice{missing - 1:03}.dcm: 6.00 mm" in error.message
    assert "elsewhere 3.00 mm" in error.message


def test_positions_rounded_by_a_tenth_of_a_millimetre_are_no_gap(tmp_path):
    def change(one, z):
        one.ImagePositionPatient = [round(float(n), 1) for n in one.ImagePositionPatient]

    scan = read(write_series(tmp_path, step=0.625 * dicoms.AXES[2], change=change))
    np.testing.assert_array_equal(scan.voxels, dicoms.voxels())


@pytest.mark.parametrize(
    "tags",
    [
        {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
        {"PixelSpacing": [1.1, 0.8]},
        {"ImageOrientationPatient": None},
        {"ImagePositionPatient": None},
        {"PixelSpacing": None},
        {"ImagePositionPatient": [0, 1e300, 0]},
        {"ImagePositionPatient": [-500, 12, 140]},
    ],
)
def test_slices_that_do_not_fit_together_are_bad_geometry(tmp_path, tags):
    assert error_of(write_series(tmp_path, change=set_on(3, **tags))).reason == "bad_geometry"


@pytest.mark.parametrize(
    "tags",
    [
        {"PixelSpacing": [0, 1]},
        {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]},
        {"ImageOrientationPatient": [2, 0, 0, 0, 1, 0]},
    ],
)
def test_axes_that_are_none_are_bad_geometry(tmp_path, tags):
    assert error_of(write_series(tmp_path, change=set_on(None, **tags))).reason == "bad_geometry"


def test_slices_of_other_sides_are_bad_geometry(tmp_path):
    paths = write_series(tmp_path / "a")
    paths[2] = write_series(tmp_path / "b", dicoms.voxels((14, 11, 7)))[2]
    assert error_of(paths).reason == "bad_geometry"


# --- copies and several volumes


def test_a_copied_file_counts_once(tmp_path):
    paths = write_series(tmp_path)
    copy = shutil.copy(paths[4], tmp_path / "copy.dcm")
    np.testing.assert_array_equal(read([*paths, copy]).voxels, dicoms.voxels())


@pytest.mark.parametrize("syntax", ["explicit", "deflated", "rle"])
def test_the_same_instance_with_other_pixels_is_bad_geometry(tmp_path, syntax):
    paths = write_series(tmp_path / "a", syntax=syntax)
    other = write_series(tmp_path / "b", dicoms.voxels(seed=1), syntax=syntax)[4]
    error = error_of([*paths, other])
    assert error.reason == "bad_geometry"
    assert "same instance UID" in error.message


def test_a_place_with_a_slice_too_many_is_bad_geometry(tmp_path):
    paths = write_series(tmp_path / "a")
    other = write_series(tmp_path / "b", series="1.2.826.7.9")[4]
    assert "1 to 2 slices per place" in error_of([*paths, other]).message


@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        ("TemporalPositionIdentifier", [3, 1, 2]),
        ("TriggerTime", ["120.5", "0", "60"]),
        ("EchoTime", ["9", "3", "10"]),
        ("DiffusionBValue", [1000.0, 0.0, 500.0]),
        ("AcquisitionNumber", [30, 4, 12]),
        ("InstanceNumber", [300, 4, 12]),
    ],
)
def test_several_volumes_are_told_apart_by_time_echo_or_number(tmp_path, keyword, values):
    paths = []
    for n, value in enumerate(values):

        def change(one, z, value=value):
            if keyword != "InstanceNumber":
                del one.InstanceNumber
            setattr(one, keyword, value)

        data = dicoms.voxels(seed=n)
        paths += write_series(tmp_path / f"{n}", data, change=change, series=f"1.2.826.8.{n + 1}")
    np.random.default_rng(0).shuffle(paths)

    error = error_of(paths)
    assert error.reason == "not_3d"
    assert "volume=K" in error.message
    assert error_of(paths, volume=3).reason == "not_3d"
    for number, seed in enumerate(np.argsort([float(value) for value in values])):
        scan = read(paths, volume=number)
        assert scan.volumes == 3
        np.testing.assert_array_equal(scan.voxels, dicoms.voxels(seed=int(seed)))


# --- multi-frame


@pytest.mark.parametrize("syntax", dicoms.SYNTAXES)
def test_a_multi_frame_file_is_the_series_of_its_frames(tmp_path, syntax):
    order = np.random.default_rng(5).permutation(dicoms.SHAPE[2])
    scan = read([write_multiframe(tmp_path / "a.dcm", order=order, syntax=syntax)])
    classic = read(write_series(tmp_path / "classic"))
    np.testing.assert_array_equal(scan.voxels, classic.voxels)
    np.testing.assert_array_equal(scan.affine, classic.affine)


def test_frames_have_slopes_of_their_own(tmp_path):
    def change(frame, z):
        scale = Dataset()
        scale.RescaleSlope, scale.RescaleIntercept = str(2 + z), "-7"
        frame.PixelValueTransformationSequence = [scale]

    scan = read([write_multiframe(tmp_path / "a.dcm", change=change)])
    expected = dicoms.voxels().astype(int) * (2 + np.arange(dicoms.SHAPE[2])) - 7
    np.testing.assert_array_equal(scan.voxels, expected)


def test_frames_of_several_times_are_several_volumes(tmp_path):
    data = np.concatenate([dicoms.voxels(seed=0), dicoms.voxels(seed=1)], axis=2)
    sides = dicoms.SHAPE[2]

    def change(frame, z):
        content = Dataset()
        content.TemporalPositionIndex = 2 - z // sides  # the second half comes first
        frame.FrameContentSequence = [content]
        place = dicoms.ORIGIN + (z % sides) * dicoms.STEP * dicoms.AXES[2]
        frame.PlanePositionSequence[0].ImagePositionPatient = [float(f"{n:.6f}") for n in place]

    path = write_multiframe(tmp_path / "a.dcm", data, change=change)
    assert error_of([path]).reason == "not_3d"
    np.testing.assert_array_equal(read([path], volume=0).voxels, dicoms.voxels(seed=1))
    np.testing.assert_array_equal(read([path], volume=1).voxels, dicoms.voxels(seed=0))


def test_frames_of_two_orientations_are_bad_geometry(tmp_path):
    def change(frame, z):
        plane = Dataset()
        plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        if z > 3:
            frame.PlaneOrientationSequence = [plane]

    assert error_of([write_multiframe(tmp_path / "a.dcm", change=change)]).reason == "bad_geometry"


def test_frames_without_positions_are_not_3d(tmp_path):
    one = dicoms.dataset(dicoms.voxels().T)
    assert error_of([dicoms.write(one, tmp_path / "cine.dcm")]).reason == "not_3d"
