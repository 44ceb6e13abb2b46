"""What every reader of single files must do; a new one adds its line to `scans.KINDS`."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from glmae_ray.store.readers import READERS, read_image
from glmae_ray.store.scan import LIMITS, Limits, ReadError
from glmae_ray.volume import to_source_axes
from tests.store import scans
from tests.store.scans import KINDS, files_of, trusted

ALL_AXES = [
    "".join(axes)
    for pairs in itertools.permutations(("RL", "AP", "SI"))
    for axes in itertools.product(*pairs)
]
INTEGERS = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]


def every_kind_of(*packings):
    names = [name for name in KINDS if KINDS[name].packing in packings]
    return pytest.mark.parametrize("kind", [KINDS[name] for name in names], ids=names)


every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_suffix = pytest.mark.parametrize("suffix", sorted({kind.suffix for kind in KINDS.values()}))


def read(path, *, volume=None, limits=LIMITS):
    return read_image([files_of(path, volume=volume)], case_id="a", limits=limits)


def refusal(path, **options) -> ReadError:
    """Why a file is refused."""
    with pytest.raises(ReadError) as caught:
        read(path, **options)
    assert str(path)[: -len(path.suffix)].removesuffix(".nii") in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value


def written(folder, kind, data=None, matrix=None) -> Path:
    path = Path(folder) / f"scan{kind.suffix}"
    data = scans.voxels() if data is None else data
    kind.write(path, data, scans.affine() if matrix is None else matrix)
    return path


def in_file_axes(image):
    return to_source_axes(image.volume.array[0], image.source_affine)


def full_range(dtype, shape=scans.SHAPE):
    """Noise over all values of a type, or over those that float32 holds."""
    info = np.iinfo(dtype)
    low, high = max(info.min, -(2**24)), min(info.max, 2**24)
    noise = np.random.default_rng(3).integers(low, high, shape, endpoint=True)
    noise.flat[:2] = low, high
    return noise.astype(dtype)


def test_every_reader_of_single_files_is_held_to_this():
    assert {kind.suffix for kind in KINDS.values()} == set(READERS) - {".dcm"}


@every_kind
@pytest.mark.parametrize("dtype", [order + name for name in INTEGERS for order in "<>"])
def test_integers_come_through_bit_for_bit(tmp_path, kind, dtype):
    data = full_range(np.dtype(dtype))

    array = in_file_axes(read(written(tmp_path, kind, data)))

    assert array.dtype == (np.int16 if dtype[1:] in ("i1", "u1", "i2") else np.float32)
    np.testing.assert_array_equal(array.astype(np.int64), data.astype(np.int64))


@every_kind
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8"])
def test_fractions_come_through_as_float32_has_them(tmp_path, kind, dtype):
    data = np.random.default_rng(3).normal(0, 900, scans.SHAPE).astype(dtype)
    array = in_file_axes(read(written(tmp_path, kind, data)))
    np.testing.assert_array_equal(array, data.astype(np.float32))


@every_kind
@pytest.mark.parametrize(("axes", "degrees"), [("RAS", 0), ("LPS", 0), ("PIR", 0), ("SAL", 23)])
def test_the_affine_is_kept(tmp_path, kind, axes, degrees):
    matrix = scans.affine(axes, degrees=degrees)
    image = read(written(tmp_path, kind, matrix=matrix))
    np.testing.assert_allclose(image.source_affine, matrix, atol=1e-4)
    assert image.source_shape == scans.SHAPE


@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from(sorted(KINDS)),
    axes=st.sampled_from(ALL_AXES),
    degrees=st.floats(-40, 40),
    spacing=st.tuples(*[st.floats(0.2, 8)] * 3),
    shape=st.tuples(*[st.integers(4, 14)] * 3).filter(lambda sides: len(set(sides)) == 3),
    dtype=st.sampled_from([*INTEGERS, "f4", "f8"]),
    order=st.sampled_from("<>"),
    scale=st.sampled_from([(1, 0), (1, -1024), (2, 5), (0.37, -5.25), (-1.5, 3)]),
)
def test_any_image_reads_as_the_library_of_its_format_reads_it(
    name, axes, degrees, spacing, shape, dtype, order, scale
):
    dtype = np.dtype(order + dtype)
    rng = np.random.default_rng(0)
    data = full_range(dtype, shape) if dtype.kind in "iu" else rng.normal(0, 900, shape)
    if dtype.kind in "iu" and scale != (1, 0):
        data //= 8  # what a slope makes of whole numbers has to fit float32
    matrix = scans.affine(axes, spacing=spacing, degrees=degrees)
    with tempfile.TemporaryDirectory() as folder:
        path = written(folder, KINDS[name], data.astype(dtype), matrix)
        if name.startswith("nifti1"):
            scans.change_nifti(path, scl_slope=scale[0], scl_inter=scale[1])

        image = read(path, limits=Limits(4, 64))
        expected, affine = trusted(path)

    np.testing.assert_allclose(image.source_affine, affine, atol=1e-4)
    np.testing.assert_array_equal(in_file_axes(image), np.asarray(expected).astype(np.float32))


# A byte of bzip2 or of text can stand for many voxels, so that their size says too little.
@every_kind_of("raw", "deflate")
def test_a_claim_that_the_file_cannot_hold_is_refused_before_memory_is_taken(
    tmp_path, kind, monkeypatch
):
    data = np.zeros((160, 128, 96), np.int16)
    data[3, 4, 5] = 1
    path = written(tmp_path, kind, data)
    last = files_of(path).paths[-1]
    raw = last.read_bytes()
    last.write_bytes(raw[: 400 + len(raw) // 10])  # the header and too little
    monkeypatch.setattr(np, "empty", no_memory)
    assert refusal(path).reason == "truncated"


@every_kind
def test_an_image_above_the_limit_is_refused_before_memory_is_taken(tmp_path, kind, monkeypatch):
    path, limits = written(tmp_path, kind), Limits(max_voxels=scans.voxels().size - 1)
    monkeypatch.setattr(np, "empty", no_memory)
    assert refusal(path, limits=limits).reason == "too_large"


def no_memory(*args, **kwargs):
    raise AssertionError("memory was asked for")


@every_kind
@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 0.5, 0.9, 0.99, 1.0])
def test_a_file_cut_short_is_never_a_volume(tmp_path, kind, share):
    path = written(tmp_path, kind, np.random.default_rng(0).integers(99, 999, (17, 22, 40)))
    last = files_of(path).paths[-1]
    raw = last.read_bytes()
    lost = 5 if kind.packing == "text" else 1  # the last digits of the last number are not missed
    last.write_bytes(raw[: min(int(len(raw) * share), len(raw) - lost)])
    error = refusal(path)
    early = ("not_an_image", "unreadable") if share < 0.5 else ()  # within the header
    assert error.reason in ("truncated", *early)


@every_kind_of("deflate", "bzip2")  # the others have no checksum
@pytest.mark.parametrize("place", [0.4, 0.6, 0.8])
def test_a_flipped_bit_in_packed_voxels_is_found(tmp_path, kind, place):
    path = written(tmp_path, kind, full_range("i2"))
    last = files_of(path).paths[-1]
    raw = bytearray(last.read_bytes())
    raw[int(len(raw) * place)] ^= 4
    last.write_bytes(raw)
    assert refusal(path).reason in ("unreadable", "truncated")


@every_suffix
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:b282d064\nsize 3972194\n",
        b"\x1f\x8b\x08\x00" + bytes(40),
        np.random.default_rng(5).bytes(5000),
        b"\n" * 2**21,
    ],
    ids=["empty", "git-lfs pointer", "gzip magic", "noise", "newlines"],
)
def test_something_else_under_the_name_of_an_image_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"scan{suffix}"
    path.write_bytes(content)
    with pytest.raises(ReadError, match=path.name) as caught:
        read(path)
    gzip_or_not = ("not_an_image", "unreadable", "truncated") if content[:1] == b"\x1f" else ()
    assert caught.value.reason in ("not_an_image", *gzip_or_not)


@every_suffix
def test_a_missing_file_is_unreadable(tmp_path, suffix):
    path = tmp_path / f"gone{suffix}"
    with pytest.raises(ReadError, match="gone") as caught:
        read_image([scans.ImageFiles(suffix, (path,))], case_id="a")
    assert caught.value.reason == "unreadable"


@every_kind
def test_one_of_several_volumes_can_be_taken(tmp_path, kind):
    data = np.random.default_rng(1).integers(0, 999, (*scans.SHAPE, 3)).astype(np.int16)
    path = written(tmp_path, kind, data)

    assert refusal(path).reason == "not_3d"
    assert refusal(path, volume=3).reason == "not_3d"
    for number in range(3):
        image = read(path, volume=number)
        np.testing.assert_array_equal(in_file_axes(image), data[..., number])
        np.testing.assert_allclose(image.source_affine, scans.affine(), atol=1e-4)
        assert image.volumes == 3


@every_kind
def test_the_last_of_several_volumes_may_not_be_missing(tmp_path, kind):
    noise = np.random.default_rng(1).integers(0, 999, (*scans.SHAPE, 3)).astype(np.int16)
    path = written(tmp_path, kind, noise)
    last = files_of(path).paths[-1]
    last.write_bytes(last.read_bytes()[:-2000])
    assert refusal(path, volume=0).reason == "truncated"


@every_suffix
def test_vectors_are_no_image(tmp_path, suffix):
    noise = np.random.default_rng(1).normal(size=(13, 22, 17, 3)).astype(np.float32)
    path = tmp_path / f"field{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(noise, isVector=True), path)
    assert refusal(path).reason == "not_an_image"
    assert refusal(path, volume=1).reason == "not_an_image"
