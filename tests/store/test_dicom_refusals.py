"""DICOM files that are refused: what is no scan, what is damaged, and for which reason."""

import contextlib

import pydicom
import pytest
from pydicom import Dataset, config, uid

from glmae_ray.store.scan import Limits, ReadError
from tests.store import dicoms
from tests.store.dicoms import error_of, header_of, read, sample, set_on, write_series


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rtstruct.dcm", "RT Structure Set"),
        ("rtplan.dcm", "RT Plan"),
        ("rtdose.dcm", "RT Dose"),
        ("test-SR.dcm", "SR"),
        ("liver_1frame.dcm", "Segmentation"),
        ("waveform_ecg.dcm", "ECG"),
        ("examples_palette.dcm", "palette"),
        ("SC_rgb_rle.dcm", "colour"),
    ],
)
def test_other_objects_are_no_images(name, words):
    error = error_of([sample(name)])
    assert error.reason == "not_an_image"
    assert words in error.message


@pytest.mark.parametrize("name", ["rtstruct.dcm", "test-SR.dcm", "liver_1frame.dcm", "rtdose.dcm"])
def test_discovery_refuses_what_has_no_pixels_of_a_scan(name):
    with pytest.raises(ReadError) as caught:
        header_of(sample(name))
    assert caught.value.reason == "not_an_image"


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n" + bytes(range(256)) * 8, b"a,b\n1,2\n"])
@pytest.mark.parametrize("name", ["note.dcm", "note"])
def test_something_else_under_an_images_name_is_no_image(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    assert error_of([path]).reason in ("not_an_image", "unreadable")
    with pytest.raises(ReadError) as caught:
        header_of(path)
    assert caught.value.reason in ("not_an_image", "unreadable")


def test_a_header_without_pixels_is_no_image(tmp_path):
    def change(one, z):
        del one.PixelData

    assert error_of(write_series(tmp_path, change=change)).reason == "not_an_image"


@pytest.mark.parametrize("syntax", [s for s in dicoms.SYNTAXES if s != "deflated"])
def test_a_file_cut_short_is_truncated(tmp_path, syntax):
    paths = write_series(tmp_path, syntax=syntax)
    raw = paths[3].read_bytes()
    for size in (len(raw) - 2, len(raw) - 60):
        paths[3].write_bytes(raw[:size])
        assert error_of(paths).reason == "truncated"


def test_a_file_of_pydicom_that_was_cut_short_is_truncated():
    assert error_of([sample("MR_truncated.dcm")]).reason == "truncated"


def test_compressed_pixels_of_another_shape_are_refused_before_decoding(tmp_path):
    for syntax in dicoms.COMPRESSED:
        paths = write_series(tmp_path / syntax, syntax=syntax)
        one = pydicom.dcmread(paths[2])
        one.Rows += 3
        one.save_as(paths[2])
        assert error_of(paths[2:3]).reason in ("unreadable", "bad_geometry")


def test_claims_are_refused_before_memory_is_taken(tmp_path):
    path = write_series(tmp_path, dicoms.voxels()[:, :, :1], syntax="rle")[0]
    one = pydicom.dcmread(path)
    one.Rows = one.Columns = 65535
    one.save_as(path)
    assert error_of([path]).reason == "too_large"
    assert error_of(write_series(tmp_path / "small"), limits=Limits()).reason == "too_small"


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"RescaleSlope": "0", "RescaleIntercept": "0"}, "rescale"),
        ({"BitsStored": 17}, "bits allocated"),
        ({"HighBit": 3}, "bits allocated"),
        ({"Rows": 0}, "no rows"),
        ({"Rows": 7}, "more pixels"),
        ({"ModalityLUTSequence": [Dataset()]}, "table"),
    ],
)
def test_headers_that_cannot_be_are_unreadable(tmp_path, tags, words):
    error = error_of(write_series(tmp_path, change=set_on(3, **tags)))
    assert error.reason == "unreadable"
    assert words in error.message


def test_a_syntax_without_decoder_is_named(tmp_path):
    path = write_series(tmp_path, syntax="jpeg_2000")[0]
    one = pydicom.dcmread(path)
    one.file_meta.TransferSyntaxUID = uid.HTJ2KLossless
    one.save_as(path)
    change = set_on(0, SliceThickness="3")
    change(one, 0)
    one.save_as(path)
    error = error_of([path])
    assert error.reason == "unreadable"
    assert "High-Throughput JPEG 2000" in error.message


def test_damage_that_only_libjpeg_complains_of_is_found(tmp_path):
    paths = write_series(tmp_path, syntax="jpeg_lossless")
    raw = paths[3].read_bytes()
    paths[3].write_bytes(raw[:-100] + b"\xff\xfe" + raw[-98:])
    assert error_of(paths).reason == "unreadable"


def test_odd_values_and_damage_warn_nobody(tmp_path, capfd, caplog):
    tags = {"PatientBirthDate": "some day", "KVP": "120", "ImageType": "A\\lower case"}
    with config.disable_value_validation():
        paths = write_series(tmp_path, change=set_on(None, **tags), syntax="jpeg_lossless")
    read(paths)
    header_of(paths[0])
    raw = paths[3].read_bytes()
    for place in range(len(raw) - 200, len(raw), 7):
        paths[3].write_bytes(raw[:place] + b"\xff" + raw[place + 1 :])
        with contextlib.suppress(ReadError):
            read(paths)
    out = capfd.readouterr()
    assert (out.out, out.err, caplog.records) == ("", "", [])
