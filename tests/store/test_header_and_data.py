"""NRRD and MetaImage alike: where the voxels end, and which data file a header may name."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from glmae_ray.store.readers import DETACHED, read_image
from glmae_ray.store.scan import ImageFiles, ReadError
from tests.store.test_metaimage import write_meta
from tests.store.test_nrrd import DATA, RAW, read, reason_of, write_nrrd


@pytest.mark.parametrize("shape", ["17 22 12", "17 20 13"])
def test_packed_voxels_that_go_on_after_the_last_are_damage(tmp_path, shape):
    packed = zlib.compress(RAW, wbits=31)
    assert reason_of(write_nrrd(tmp_path, packed, encoding="gzip", sizes=shape)) == "unreadable"
    path = write_meta(tmp_path, zlib.compress(RAW), CompressedData="True", DimSize=shape)
    assert reason_of(path) == "unreadable"


def test_bytes_after_the_last_voxel_of_an_unpacked_file_do_no_harm(tmp_path):
    np.testing.assert_array_equal(read(write_nrrd(tmp_path, RAW + b"more"))[0], DATA)
    np.testing.assert_array_equal(read(write_meta(tmp_path, RAW + b"more"))[0], DATA)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../scan.raw",
        "deep/../../scan.raw",
        "..\\scan.raw",
        "\\\\server\\scan.raw",
        "C:\\scan.raw",
        "s3://bucket/scan.raw",
        "scan\x00.raw",
    ],
)
def test_a_header_cannot_name_a_file_outside_its_folder(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "scan.raw").write_bytes(RAW)
    paths = {
        ".nhdr": write_nrrd(folder, b"", suffix=".nhdr", data_file=name),
        ".mhd": write_meta(folder, b"", suffix=".mhd", ElementDataFile=name),
    }
    for suffix, path in paths.items():
        with pytest.raises(ReadError, match="scan") as caught:
            DETACHED[suffix](path)
        assert caught.value.reason == "unreadable"
        files = ImageFiles(suffix, (path, tmp_path / "scan.raw"))
        with pytest.raises(ReadError, match="unreadable"):
            read_image([files], case_id="a")


def test_a_header_names_its_data_file_once_and_cleanly(tmp_path):
    nrrd = write_nrrd(tmp_path, b"", suffix=".nhdr", data_file="./raw/a ( b ).raw")
    meta = write_meta(tmp_path, b"", suffix=".mhd", ElementDataFile="raw//scan.raw")
    assert DETACHED[".nhdr"](nrrd) == ["raw/a ( b ).raw"]
    assert DETACHED[".mhd"](meta) == ["raw/scan.raw"]
    assert DETACHED[".nhdr"](write_nrrd(tmp_path, suffix=".nhdr")) == []
    assert DETACHED[".mhd"](write_meta(tmp_path, suffix=".mhd")) == []


def test_a_missing_data_file_is_named(tmp_path):
    path = write_meta(tmp_path, b"", suffix=".mhd", ElementDataFile="gone.raw")
    with pytest.raises(ReadError, match=r"gone\.raw"):
        read(path)
    with pytest.raises(ReadError, match="a header and its data are needed"):
        read_image([ImageFiles(".mhd", (path,))], case_id="a")
