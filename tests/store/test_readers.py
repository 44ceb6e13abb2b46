"""Readers: values and geometry are kept, and every damage has its reason."""

import gzip
import tracemalloc

import nibabel as nib
import numpy as np
import pytest

from glmae_ray.store.raw import Block, read_block
from glmae_ray.store.readers import read_image, read_label
from glmae_ray.store.scan import LIMITS, REASONS, ReadError
from glmae_ray.volume import to_source_axes
from tests.store import scans
from tests.store.scans import files_of, write_nifti

NIFTI = (".nii", ".nii.gz")


def read(path, volume=None, **options):
    return read_image([files_of(path, volume=volume)], case_id="a", **options)


def reason_of(path):
    with pytest.raises(ReadError) as caught:
        read(path)
    assert caught.value.reason in REASONS
    assert path.name in caught.value.message
    return caught.value.reason


@pytest.mark.parametrize("suffix", NIFTI)
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_integers_come_through_bit_for_bit(tmp_path, suffix, kind):
    data = np.random.default_rng(1).integers(-(2**15), 2**15, scans.SHAPE).astype(np.int16)
    path = tmp_path / f"scan{suffix}"
    nib.save(kind(data, scans.affine("PIR")), path)

    image = read(path)

    assert image.volume.array.dtype == np.int16
    np.testing.assert_array_equal(to_source_axes(image.volume.array[0], image.source_affine), data)
    np.testing.assert_array_equal(image.source_affine, nib.load(path).affine)


@pytest.mark.parametrize(
    ("dtype", "top", "expected"),
    [
        ("u1", 255, "int16"),
        (">i2", 30000, "int16"),
        ("u2", 30000, "int16"),
        ("u2", 60000, "float32"),
        ("i4", 30000, "int16"),
        ("i4", 2**24, "float32"),
        ("f4", 3071.0, "int16"),
        ("f4", 0.5, "float32"),
        (">f8", 3071.25, "float32"),
    ],
)
def test_values_are_int16_where_they_fit_and_float32_elsewhere(tmp_path, dtype, top, expected):
    data = scans.voxels(dtype=np.dtype(dtype))
    data[1, 2, 3] = top
    volume = read(write_nifti(tmp_path / "scan.nii", data)).volume
    assert volume.array.dtype == expected
    assert volume.array.max() == max(top, 254)


def test_slope_and_intercept_are_applied_as_nibabel_does(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", scl_slope=0.37, scl_inter=-5)

    image = read(path)

    array = to_source_axes(image.volume.array[0], image.source_affine)
    np.testing.assert_array_equal(array, nib.load(path).get_fdata().astype(np.float32))


@pytest.mark.parametrize(
    ("stored", "slope", "inter", "expected"),
    [
        ("u2", 1, -1024, "int16"),
        (">i2", 2, 3, "int16"),
        ("u1", -1, 0, "int16"),
        ("i4", 1, 40000, "float32"),
        ("u1", 0.5, 0, "float32"),
        ("u1", 1e36, 0, "float32"),
    ],
)
def test_integers_scaled_to_integers_stay_exact(tmp_path, stored, slope, inter, expected):
    data = scans.voxels(dtype=np.dtype(stored))
    data[2, 2, 2] = 1  # odd: half of it is none
    path = write_nifti(tmp_path / "scan.nii", data, scl_slope=slope, scl_inter=inter)

    image = read(path)

    assert image.volume.array.dtype == expected
    array = to_source_axes(image.volume.array[0], image.source_affine)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(array, nib.load(path).get_fdata().astype(np.float32))


def test_scaled_values_that_float32_cannot_hold_are_out_of_range(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", scl_slope=1e38, scl_inter=0)
    assert reason_of(path) == "out_of_range"


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIL", "SAR"])
def test_reading_int16_takes_the_memory_of_two_volumes_and_a_half(tmp_path, axes):
    data = np.random.default_rng(0).integers(-1000, 1000, (160, 128, 96)).astype(np.int16)
    path = write_nifti(tmp_path / "scan.nii.gz", data, axes=axes)
    read(path)  # what is imported on first use
    tracemalloc.start()
    read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * data.nbytes


def test_several_files_become_channels(tmp_path):
    paths = [write_nifti(tmp_path / f"{n}.nii", scans.voxels(seed=n)) for n in range(3)]
    volume = read_image([files_of(path) for path in paths], case_id="a", modality="MR").volume
    singles = [read(path).volume.array[0] for path in paths]
    np.testing.assert_array_equal(volume.array, np.stack(singles))


def test_a_last_axis_of_one_is_no_fourth_dimension(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", scans.voxels()[..., None])
    assert read(path).volume.array.shape == (1, 13, 22, 17)


def with_value(value, dtype=np.float32):
    data = scans.voxels(dtype=dtype)
    data[4, 5, 6] = value
    return data


@pytest.mark.parametrize(
    ("reason", "data", "change"),
    [
        ("not_3d", np.ones((9, 10, 11, 2), np.int16), {}),
        ("not_3d", np.ones((9, 10), np.int16), {}),
        ("too_small", np.arange(7 * 9 * 10, dtype=np.int16).reshape(9, 7, 10), {}),
        ("constant", np.full(scans.SHAPE, 7, np.int16), {}),
        ("non_finite", with_value(np.nan), {}),
        ("non_finite", with_value(-np.inf), {}),
        ("out_of_range", with_value(1e300, np.float64), {}),
        ("out_of_range", with_value(2**24 + 1, np.int32), {}),
        ("not_an_image", scans.voxels(dtype=np.complex64), {}),
        ("bad_geometry", None, {"srow_x": 0.0}),
        ("bad_geometry", None, {"srow_y": np.nan}),
        (
            "bad_geometry",
            None,
            {"sform_code": 0, "qform_code": 0, "pixdim": [1, 0, 1, 1] + 4 * [0]},
        ),
    ],
)
def test_what_cannot_be_learned_from_says_why(tmp_path, reason, data, change):
    assert reason_of(write_nifti(tmp_path / "scan.nii.gz", data, **change)) == reason


def test_an_affine_with_axes_in_one_plane_is_bad_geometry(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", srow_x=[1, 1, 0, 0], srow_y=[1, 1, 0, 0])
    assert reason_of(path) == "bad_geometry"


@pytest.mark.parametrize("share", [0.5, 0.99])
@pytest.mark.parametrize("suffix", NIFTI)
def test_a_file_cut_short_is_truncated(tmp_path, suffix, share):
    path = write_nifti(tmp_path / f"scan{suffix}")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert reason_of(path) == "truncated"


def test_a_gzip_file_without_its_checksum_is_truncated(tmp_path):
    path = write_nifti(tmp_path / "scan.nii.gz")
    path.write_bytes(path.read_bytes()[:-4])
    assert reason_of(path) == "truncated"


def test_compression_is_told_by_the_content_not_by_the_name(tmp_path):
    plain, packed = write_nifti(tmp_path / "a.nii"), write_nifti(tmp_path / "b.nii.gz")
    expected = read(plain).volume.array
    plain, packed = plain.rename(tmp_path / "scan.nii.gz"), packed.rename(tmp_path / "scan.nii")
    np.testing.assert_array_equal(read(plain).volume.array, expected)
    np.testing.assert_array_equal(read(packed).volume.array, expected)


def test_a_gzip_file_of_several_members_and_zeros_at_its_end_is_read(tmp_path):
    path = write_nifti(tmp_path / "scan.nii.gz")
    expected, raw = read(path).volume.array, gzip.decompress(path.read_bytes())
    parts = [gzip.compress(raw[start : start + 3000]) for start in range(0, len(raw), 3000)]
    path.write_bytes(b"".join(parts) + bytes(512))
    np.testing.assert_array_equal(read(path).volume.array, expected)
    path.write_bytes(b"".join(parts) + b"something else")
    assert reason_of(path) == "unreadable"


@pytest.mark.parametrize("count", [2**20 - 1, 2**20, 2**20 + 1, 2**20 + 258, 2**22])
def test_voxels_that_end_with_a_part_of_the_stream_are_whole(tmp_path, count):
    path = tmp_path / "voxels.gz"
    path.write_bytes(gzip.compress(bytes(count - 1) + b"\7"))
    block = Block(path, np.dtype("u1"), (count, 1, 1), packing="deflate", sealed=True)
    voxels = read_block(block)
    assert voxels[-1, 0, 0] == 7
    assert not voxels[:-1].any()


def test_a_flipped_bit_in_a_gzip_file_is_found(tmp_path):
    path = write_nifti(tmp_path / "scan.nii.gz")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    assert reason_of(path) in ("unreadable", "truncated")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.nii", b"", "not_an_image"),
        ("empty.nii.gz", b"", "not_an_image"),
        ("text.nii", b"version https://git-lfs.github.com/spec/v1\n" * 30, "not_an_image"),
        ("text.nii.gz", b"version https://git-lfs.github.com/spec/v1\n", "not_an_image"),
        ("scan.xyz", b"0" * 400, "unreadable"),
    ],
)
def test_something_else_under_the_name_of_an_image_is_refused(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    assert reason_of(path) == reason


def test_a_missing_file_is_unreadable(tmp_path):
    assert reason_of(tmp_path / "gone.nii") == "unreadable"


@pytest.mark.parametrize("suffix", NIFTI)
@pytest.mark.parametrize(
    ("sides", "reason"), [((10**4,) * 3, "too_large"), ((1200,) * 3, "truncated")]
)
def test_a_header_that_claims_too_much_is_refused_before_memory_is_taken(
    tmp_path, monkeypatch, suffix, sides, reason
):
    header = nib.Nifti1Header()
    header.set_data_shape(sides)
    header["magic"], header["vox_offset"] = b"n+1", 352
    raw = header.binaryblock + bytes(4000)
    path = tmp_path / f"huge{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)

    def no_memory(*args, **kwargs):
        raise AssertionError("memory was asked for")

    monkeypatch.setattr(np, "empty", no_memory)
    assert sides[0] ** 3 > LIMITS.max_voxels or reason == "truncated"
    assert reason_of(path) == reason


def test_headers_that_nibabel_repairs_leave_no_word_on_the_screen(tmp_path, capfd):
    path = write_nifti(tmp_path / "scan.nii", pixdim=[7, 0.9, 1.1, 3.0, 0, 0, 0, 0], bitpix=3)
    read(path)
    assert capfd.readouterr() == ("", "")


def test_a_label_map_in_other_axes_lands_on_the_images_grid(tmp_path):
    path = write_nifti(tmp_path / "image.nii", axes="LPS")
    labels = (scans.voxels() > 100).astype(np.float32) * 3
    turned = nib.Nifti1Image(labels, scans.affine("LPS")).as_reoriented([[1, -1], [2, 1], [0, -1]])
    nib.save(turned, tmp_path / "label.nii.gz")
    volume = read(path).volume

    label = read_label(files_of(tmp_path / "label.nii.gz"), like=volume)

    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, (volume.array[0] > 100) * 3)


@pytest.mark.parametrize(
    ("reason", "data", "axes"),
    [
        ("label_mismatch", np.ones((17, 22, 12), np.uint8), "LPS"),
        ("label_mismatch", np.ones(scans.SHAPE, np.uint8), "RPS"),
        ("label_not_integer", with_value(0.5), "LPS"),
        ("label_not_integer", with_value(40000, np.int32), "LPS"),
    ],
)
def test_a_label_map_that_does_not_fit_says_why(tmp_path, reason, data, axes):
    volume = read(write_nifti(tmp_path / "image.nii")).volume
    path = write_nifti(tmp_path / "label.nii", data, axes=axes)
    with pytest.raises(ReadError) as caught:
        read_label(files_of(path), like=volume)
    assert caught.value.reason == reason


def test_wide_label_values_are_kept_as_int16(tmp_path):
    volume = read(write_nifti(tmp_path / "image.nii")).volume
    path = write_nifti(tmp_path / "label.nii", with_value(1042, np.int32))
    assert read_label(files_of(path), like=volume).max() == 1042


def test_channels_on_different_grids_are_refused(tmp_path):
    first = write_nifti(tmp_path / "a.nii")
    second = write_nifti(tmp_path / "a_second.nii", axes="RPS")
    with pytest.raises(ReadError, match="bad_geometry"):
        read_image([files_of(first), files_of(second)], case_id="a")
