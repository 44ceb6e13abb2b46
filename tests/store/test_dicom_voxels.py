"""DICOM values: every transfer syntax, maker and rescaling gives the voxels that were written."""

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from tests.store import dicoms
from tests.store.dicoms import error_of, read, sample, set_on, write_series


@pytest.mark.parametrize("syntax", dicoms.SYNTAXES)
@pytest.mark.parametrize(("dtype", "bits"), [("i2", 16), ("u2", 12), ("i2", 12), ("u1", 8)])
def test_every_transfer_syntax_gives_the_voxels_that_were_written(tmp_path, syntax, dtype, bits):
    data = dicoms.voxels(dtype=np.int32) % 2**bits
    data = (data - (2 ** (bits - 1) if dtype[0] == "i" else 0)).astype(dtype)
    if (syntax, dtype) == ("jpeg_2000", "u1"):
        data = dicoms.voxels((64, 48, 5), dtype=np.uint8)  # GDCM's encoder overruns on smaller ones
    paths = write_series(tmp_path, data, syntax=syntax, bits=bits)
    if (syntax, dtype) == ("big_endian", "u1"):
        assert "big-endian words" in error_of(paths).message
        return
    scan = read(paths)
    assert scan.voxels.dtype == np.int16
    np.testing.assert_array_equal(scan.voxels, data)


@pytest.mark.parametrize("syntax", ["explicit", "rle", "jpeg_2000"])
def test_bits_that_do_not_count_are_dropped_as_simpleitk_does(tmp_path, syntax):
    paths = write_series(tmp_path, dicoms.voxels(dtype="u2") & 0xFFF, bits=12, syntax=syntax)
    if syntax == "explicit":
        for path in paths:
            one = pydicom.dcmread(path)
            one.PixelData = (np.frombuffer(one.PixelData, "<u2") | 0xA000).tobytes()
            one.save_as(path)
    expected = [sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0] for path in paths]
    np.testing.assert_array_equal(read(paths).voxels.transpose(2, 1, 0), expected)


@pytest.mark.parametrize(
    "name",
    [
        "MR_small.dcm",
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_expb.dcm",
        "MR_small_implicit.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_padded.dcm",
        "CT_small.dcm",
        "J2K_pixelrep_mismatch.dcm",
        "693_J2KI.dcm",
    ],
)
def test_files_of_other_makers_agree_with_simpleitk(name):
    scan, image = read([sample(name)]), sitk.ReadImage(str(sample(name)))
    np.testing.assert_array_equal(scan.voxels.T, sitk.GetArrayFromImage(image))
    lps = np.diag([-1, -1, 1]) @ scan.affine[:3]
    np.testing.assert_allclose(lps[:, 3], image.GetOrigin(), atol=1e-6)
    np.testing.assert_allclose(
        np.linalg.norm(lps[:, :2], axis=0), image.GetSpacing()[:2], rtol=1e-4
    )


def test_integer_rescaling_stays_int16_at_the_price_of_nothing(tmp_path):
    scale = {"RescaleSlope": "1", "RescaleIntercept": "-1024"}
    data = dicoms.voxels(dtype="u2")
    scan = read(write_series(tmp_path, data, change=set_on(None, **scale)))
    assert scan.voxels.dtype == np.int16
    np.testing.assert_array_equal(scan.voxels, data.astype(int) - 1024)


@pytest.mark.parametrize(
    ("dtype", "slope", "intercept", "expected"),
    [
        ("u2", 1, 0, np.int32),
        ("u2", 1, -40000, np.int16),
        ("i2", 3, 5, np.int32),
        ("i2", -1, 0, np.int32),  # 32768 is one too many
        ("u4", 2, 1, np.int64),
    ],
)
def test_integers_are_exact_at_the_ends_of_their_range(tmp_path, dtype, slope, intercept, expected):
    data = dicoms.voxels(dtype="u1").astype(dtype)
    bounds = np.iinfo(dtype)
    ends = (26000, bounds.max) if intercept == -40000 else (bounds.min, bounds.max)
    if intercept == -40000:
        data += 30000
    data[3, 4, 5], data[4, 5, 6] = ends
    scale = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    scan = read(write_series(tmp_path, data, change=set_on(None, **scale)))
    assert scan.voxels.dtype == expected
    np.testing.assert_array_equal(scan.voxels, data.astype(np.int64) * slope + intercept)


def test_slices_with_slopes_of_their_own_are_exact_to_float32_as_in_pet(tmp_path):
    slopes = [round(0.731 + 0.011 * z, 3) for z in range(dicoms.SHAPE[2])]

    def change(one, z):
        one.RescaleSlope, one.RescaleIntercept, one.Modality = str(slopes[z]), "0", "PT"

    data = dicoms.voxels(dtype="u2")
    scan = read(write_series(tmp_path, data, change=change))
    assert (scan.voxels.dtype, scan.modality) == (np.float32, "PT")
    np.testing.assert_allclose(scan.voxels, data * np.array(slopes), rtol=1e-7)


def test_monochrome1_is_left_as_stored(tmp_path):
    change = set_on(None, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(
        read(write_series(tmp_path, change=change)).voxels, dicoms.voxels()
    )
