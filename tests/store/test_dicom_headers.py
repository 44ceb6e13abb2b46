"""What discovery reads from a DICOM header: series, subject, instance, and what is DICOM at all."""

import hashlib

import numpy as np
import pydicom
import pytest
from pydicom import uid
from upath import UPath

from glmae_ray.store.dicom_headers import is_dicom, is_named_dicom, read_slice_header
from glmae_ray.store.scan import ReadError
from tests.store import dicoms
from tests.store.dicoms import header_of, read, set_on, write_multiframe, write_series


def test_slices_of_a_volume_share_a_series_and_noise_does_not_split(tmp_path):
    def change(one, z):
        noise = 1e-6 * (-1) ** z
        one.ImageOrientationPatient = [float(n) + noise for n in one.ImageOrientationPatient]
        one.PixelSpacing = [1.1 + noise, 0.9]

    headers = [header_of(path) for path in write_series(tmp_path, change=change)]
    assert len({(header.series, header.subject) for header in headers}) == 1
    assert len({header.instance for header in headers}) == len(headers)
    assert headers[0].modality == "MR"


def test_files_without_instance_uid_are_no_copies_of_each_other(tmp_path):
    paths = write_series(tmp_path)
    for path in paths:
        one = pydicom.dcmread(path)
        del one.SOPInstanceUID
        one.save_as(path)
    assert len({header_of(path).instance for path in paths}) == len(paths)
    np.testing.assert_array_equal(read(paths).voxels, dicoms.voxels())


def test_zeros_of_either_sign_are_one_orientation(tmp_path):
    def change(one, z):
        one.ImageOrientationPatient = ["1", "-0.0" if z % 2 else "0", "-0.0001", "0", "1", "0"]

    assert len({header_of(path).series for path in write_series(tmp_path, change=change)}) == 1


@pytest.mark.parametrize(
    "tags",
    [
        {"SeriesInstanceUID": "1.2.3"},
        {"SOPClassUID": uid.SecondaryCaptureImageStorage},
        {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
        {"PixelSpacing": [1.1, 0.8]},
        {"Rows": 15},
    ],
)
def test_what_cannot_lie_in_one_volume_is_split(tmp_path, tags):
    paths = write_series(tmp_path, change=set_on(3, **tags))
    assert len({header_of(path).series for path in paths}) == 2


def test_every_multi_frame_file_is_a_series_of_its_own(tmp_path):
    first = write_multiframe(tmp_path / "a.dcm")
    one = pydicom.dcmread(first)
    one.SOPInstanceUID = "1.2.826.7.2.2"
    one.save_as(tmp_path / "b.dcm")
    assert header_of(first).series != header_of(tmp_path / "b.dcm").series
    assert header_of(first).subject == header_of(tmp_path / "b.dcm").subject


def subject_with(folder, **tags):
    data = dicoms.voxels()[:, :, :1]
    return header_of(write_series(folder, data, change=set_on(0, **tags))[0]).subject


def test_a_subject_is_the_patient_else_the_study_else_the_series(tmp_path):
    first = subject_with(tmp_path / "a", PatientID="P1", StudyInstanceUID="1.2")
    assert first == subject_with(tmp_path / "b", PatientID="P1 ", StudyInstanceUID="1.3")
    assert first != subject_with(tmp_path / "c", PatientID="P1", IssuerOfPatientID="elsewhere")
    assert first != subject_with(tmp_path / "d", PatientID="P2")
    blank = subject_with(tmp_path / "e", PatientID=" ", StudyInstanceUID="1.2")
    assert blank == subject_with(tmp_path / "f", PatientID=None, StudyInstanceUID="1.2")
    assert blank != subject_with(tmp_path / "g", PatientID="", StudyInstanceUID="1.3")
    nothing = subject_with(tmp_path / "h", PatientID="", StudyInstanceUID="")
    assert nothing not in (first, blank)


def test_hashes_depend_on_the_salt_and_are_not_plain_ones(tmp_path):
    path = write_series(tmp_path)[0]
    first, other = header_of(path), read_slice_header(path, salt=b"other")
    assert first.subject != other.subject
    assert first.series != other.series
    assert first.subject not in hashlib.sha256(b"P-17").hexdigest()
    assert len(first.subject) >= 16
    int(first.subject, 16)
    int(first.series, 16)


def test_files_without_preamble_are_read_where_their_name_says_dicom(tmp_path):
    path = write_series(tmp_path, syntax="implicit")[0]
    assert is_dicom(path.read_bytes()[:132])
    bare = path.read_bytes()[132:]
    named, plain = tmp_path / "bare.IMA", tmp_path / "bare"
    named.write_bytes(bare)
    plain.write_bytes(bare)
    assert not is_dicom(bare[:132])
    assert is_named_dicom(named)
    assert not is_named_dicom(plain)
    assert header_of(named) == header_of(path)
    with pytest.raises(ReadError) as caught:
        header_of(plain)
    assert caught.value.reason == "not_an_image"


def test_a_remote_header_is_the_local_one(tmp_path):
    path = write_series(tmp_path)[0]
    remote = UPath("memory://dicom/slice.dcm")
    remote.write_bytes(path.read_bytes())
    assert header_of(remote) == header_of(path)
