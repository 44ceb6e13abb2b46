"""MetaImage: what only this format has, against SimpleITK where it has an answer."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from glmae_ray.store.readers import read_image
from glmae_ray.store.scan import ReadError
from tests.store import scans
from tests.store.scans import files_of
from tests.store.test_nrrd import DATA, RAW, assert_as_simpleitk_reads, read, reason_of

META = {
    "NDims": "3",
    "ElementByteOrderMSB": "False",
    "TransformMatrix": "0.8 0 -0.6 -0.6 0 -0.8 0 1 0",
    "Offset": "-31 12.5 140",
    "ElementSpacing": "0.9 1.1 3",
    "DimSize": "17 22 13",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "LOCAL",
}


def write_meta(folder, body=RAW, *, drop=(), suffix=".mha", **change):
    fields = {k: v for k, v in (META | change).items() if k not in (*drop, "ElementDataFile")}
    last = change.get("ElementDataFile", "LOCAL")
    lines = [f"{name} = {value}" for name, value in fields.items()]
    path = folder / f"scan{suffix}"
    path.write_bytes("\n".join([*lines, f"ElementDataFile = {last}\n"]).encode() + body)
    return path


@pytest.mark.parametrize(
    ("change", "body"),
    [
        ({}, RAW),
        ({"HeaderSize": "-1"}, b"garbage" + RAW),
        ({"HeaderSize": "7", "ElementDataFile": "scan.raw"}, b"garbage" + RAW),
        ({"HeaderSize": "-1", "ElementDataFile": "scan.raw"}, b"garbage" + RAW),
        ({"ElementByteOrderMSB": "True"}, DATA.astype(">i2").tobytes("F")),
        ({"BinaryDataByteOrderMSB": "False"}, RAW),
        ({"drop": ("TransformMatrix", "Offset", "ElementByteOrderMSB")}, RAW),
        ({"drop": ("Offset",), "Position": "1 2 3"}, RAW),
        ({"drop": ("Offset",), "Origin": "1 2 3"}, RAW),
        ({"drop": ("TransformMatrix",), "Rotation": "0 1 0 0 0 1 1 0 0"}, RAW),
        ({"drop": ("TransformMatrix",), "Orientation": "0 1 0 0 0 1 1 0 0"}, RAW),
        ({"ElementSize": "1 2 3", "drop": ("ElementSpacing",)}, RAW),
    ],
)
def test_a_metaimage_header_is_read_as_simpleitk_reads_it(tmp_path, change, body):
    if "ElementDataFile" in change:
        (tmp_path / "scan.raw").write_bytes(body)
        path = write_meta(tmp_path, b"", suffix=".mhd", **change)
    else:
        path = write_meta(tmp_path, body, **change)
    np.testing.assert_array_equal(read(path)[0], DATA)
    assert_as_simpleitk_reads(path)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("bad_geometry", {"drop": ("ElementSpacing",)}),
        ("bad_geometry", {"ElementSpacing": "1 0 3"}),
        ("bad_geometry", {"ElementSpacing": "1 nan 3"}),
        ("bad_geometry", {"ElementSpacing": "1e200 1 1"}),
        ("bad_geometry", {"Offset": "nan 0 0"}),
        ("bad_geometry", {"TransformMatrix": "1 0 0 1 0 0 0 0 1"}),
        ("unreadable", {"TransformMatrix": "1 0 0 0 1 0 0 0"}),
        ("unreadable", {"DimSize": "17 22"}),
        ("unreadable", {"DimSize": "1_7 22 13"}),
        ("unreadable", {"NDims": "three"}),
        ("unreadable", {"drop": ("DimSize",)}),
        ("unreadable", {"drop": ("ElementType",)}),
        ("unreadable", {"Origin": "1 2 3"}),  # and Offset says something else
        ("unreadable", {"BinaryData": "False"}),
        ("unreadable", {"BinaryData": "maybe"}),
        ("unreadable", {"HeaderSize": "9"}),  # where the header is in the same file
        ("unreadable", {"CompressedData": "True"}),
        ("not_an_image", {"ElementNumberOfChannels": "3", "ElementType": "MET_UCHAR"}),
        ("not_an_image", {"ElementType": "MET_UCHAR_ARRAY"}),
        ("not_an_image", {"ObjectType": "Tube"}),
        ("not_3d", {"NDims": "2", "DimSize": "17 286"}),
        ("unreadable", {"ElementDataFile": "LIST"}),
        ("unreadable", {"ElementDataFile": "slice%03d.raw 1 13 1"}),
    ],
)
def test_a_metaimage_that_cannot_be_used_says_why(tmp_path, reason, change):
    assert reason_of(write_meta(tmp_path, **change)) == reason


@pytest.mark.parametrize("size", [0, -1, 1, 200])
def test_a_packed_metaimage_must_be_as_long_as_it_says(tmp_path, size):
    packed = zlib.compress(RAW)
    change = {"CompressedData": "True", "CompressedDataSize": str(len(packed) + size)}
    path = write_meta(tmp_path, packed, **change)
    if size == 0:
        assert_as_simpleitk_reads(path)
        return
    assert reason_of(path) == "truncated"
    if size > 0:
        path.write_bytes(path.read_bytes() + b"x" * size)
        assert reason_of(path) in ("truncated", "unreadable")


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_a_metaimage_may_name_its_modality(tmp_path, modality):
    path = write_meta(tmp_path, Modality=f"MET_MOD_{modality}")
    assert read_image([files_of(path)], case_id="a").volume.modality == modality


@pytest.mark.real
def test_real_metaimages(real_data):
    path = real_data / "tricky" / "floatmax_1.7e38.mha"
    assert_as_simpleitk_reads(path)
    pointer = real_data / "tricky" / "broken" / "10868_1000884_t2w.mha"
    with pytest.raises(ReadError, match="10868_1000884_t2w") as caught:
        read_image([scans.files_of(pointer)], case_id="a")
    assert caught.value.reason == "not_an_image"
