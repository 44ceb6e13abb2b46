"""Nothing that identifies a person leaves the DICOM reader; shared technical facts do."""

import traceback

import pydicom
import pytest
from pydicom import config
from pydicom.datadict import DicomDictionary

from glmae_ray.store.scan import ReadError
from tests.store import dicoms
from tests.store.dicoms import header_of, read, write_series


def canary_file(path, *, numbers=(), codes=False):
    """A slice with a canary in every text attribute of the standard, and in the named numbers."""
    needed = {
        "PhotometricInterpretation",
        "SpecificCharacterSet",
        "ImageOrientationPatient",
        "ImagePositionPatient",
        "PixelSpacing",
        "SpacingBetweenSlices",
        "RescaleSlope",
        "RescaleIntercept",
        "NumberOfFrames",
    }
    one = dicoms.dataset(dicoms.voxels()[:, :, 0].T)
    one.ImageOrientationPatient, one.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 0]
    one.PixelSpacing, one.SpacingBetweenSlices = [1, 1], 3
    texts = ("LO", "SH", "PN", "LT", "ST", "UT", "UC", "AE", "AS", "DA", "TM", "DT", "UR")
    kinds = (*texts, "CS", "DS", "IS") if codes else texts
    with config.disable_value_validation():
        for tag, (vr, *_, keyword) in DicomDictionary.items():
            if (vr in kinds and tag >> 16 > 2 and keyword not in needed) or keyword in numbers:
                one[tag] = pydicom.DataElement(tag, vr, "12345678")
        one.private_block(0x0009, "12345678", create=True).add_new(1, "LO", "12345678")
        dicoms.write(one, path, syntax="implicit")
    path.write_bytes(path.read_bytes().replace(b"12345678", b"Canary^J"))
    return path


@pytest.mark.parametrize("codes", [False, True])
def test_no_text_of_a_person_leaves_the_reader(tmp_path, codes):
    path = canary_file(tmp_path / "a.dcm", codes=codes)
    assert path.read_bytes().count(b"Canary") > 500
    said = repr(header_of(path)) + repr(read([path]))
    assert "canary" not in said.lower()
    assert "1.2.826" not in said


@pytest.mark.parametrize(
    "keyword",
    ["ImagePositionPatient", "PixelSpacing", "RescaleSlope", "NumberOfFrames", "InstanceNumber"],
)
def test_messages_do_not_quote_values(tmp_path, keyword):
    path = canary_file(tmp_path / "a.dcm", numbers=(keyword,), codes=True)
    said = ""
    for job in (header_of, lambda path: read([path])):
        try:
            job(path)
        except ReadError as error:
            said += "".join(traceback.format_exception(error))
    assert "ReadError" in said or keyword == "InstanceNumber"
    assert "anary" not in said


def test_technical_facts_that_all_slices_share_are_kept(tmp_path):
    def change(one, z):
        one.KVP, one.SliceThickness, one.PatientPosition = "120", "3.0", "HFS"
        one.ConvolutionKernel, one.XRayTubeCurrent = "Br40d", str(200 + z)
        one.PatientName, one.InstitutionName = "Canary^Jane", "Canary Clinic"
        one.BodyPartExamined = "Canary of Jane"

    with config.disable_value_validation():
        paths = write_series(tmp_path, change=change)
    assert read(paths).acquisition == {
        "ImageType": "ORIGINAL\\PRIMARY\\M",
        "PatientPosition": "HFS",
        "SliceThickness": "3.0",
        "KVP": "120",
        "ConvolutionKernel": "Br40d",
    }
