"""Label maps as DICOM Segmentation objects; the only door to highdicom.

Each structure is a segment of type BINARY, on the frames of the series that was segmented. As the
standard demands, the object repeats the patient and study of that series.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset

from glmae_ray import __version__
from glmae_ray.errors import UserError
from glmae_ray.store.dicom import open_series
from glmae_ray.store.dicom_headers import guarded
from glmae_ray.store.dicom_slices import Slice
from glmae_ray.store.scan import ImageFiles, Limits

# Type 2 of the standard: they have to be there, and may be empty.
_MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate",
    "StudyTime", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
_HAVE_TO_BE = (
    "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID",
)  # fmt: skip
_UTF8 = "ISO_IR 192"  # what a series is written in may be one that highdicom refuses
_NONE = "no DICOM-SEG, its headers do not do for one"
_SCHEME = "99GLMAE"  # of codes: structures are called what the training data calls them


class References(NamedTuple):
    """The objects that a segmentation refers to.

    Attributes:
        headers: Of each file, without pixels.
        order: For each frame of these, which plane of the scan it shows.
    """

    headers: Sequence[Dataset]
    order: list[int]


def is_installed() -> bool:
    """Whether highdicom is."""
    return find_spec("highdicom") is not None


def read_references(files: ImageFiles, limits: Limits) -> References | None:
    """Headers of the series that `read_dicom` makes one volume of; None where they do not fit.

    Files of one frame each, or a single file of many, are what a segmentation can refer to.

    Raises:
        ReadError: As `read_dicom` does.
    """
    slices = open_series(files, limits).slices
    paths = list(dict.fromkeys(one.pixels.path for one in slices))
    if len(paths) > 1 and len(paths) < len(slices):
        return None
    headers = []
    for path in paths:
        with guarded(path):
            header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
            header.decode()
            header.SpecificCharacterSet = _UTF8
            for keyword in _MAY_BE_EMPTY:
                if keyword not in header:
                    setattr(header, keyword, "")
            if len(paths) > 1 and "SliceThickness" not in header:
                header.SliceThickness = _step(slices)
            headers.append(header)
    if len(paths) > 1:
        return References(headers, list(range(len(slices))))
    planes = {one.frame: z for z, one in enumerate(slices)}
    return References(headers, [planes[frame] for frame in sorted(planes)])


def encode_segmentation(
    labels: NDArray[np.uint8], references: References, *, structures: Sequence[str]
) -> bytes:
    """A DICOM file.

    Args:
        labels: (X, Y, Z) on the axes of the series; structure number n has the value n + 1.
        references: Of the series.
        structures: Their names.

    Raises:
        UserError: The headers of the series lack something that a segmentation has to repeat.
    """
    import highdicom
    from pydicom.sr.codedict import codes

    for keyword in _HAVE_TO_BE:
        if not all(header.get(keyword) for header in references.headers):
            raise UserError(f"{_NONE}: {keyword} is missing")
    frames = np.ascontiguousarray(labels.transpose(2, 1, 0)[references.order])
    program = highdicom.AlgorithmIdentificationSequence(
        name="glmae-ray", family=codes.DCM.ArtificialIntelligence, version=__version__
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],  # the longest text of its kind
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=highdicom.sr.CodedConcept(str(number), _SCHEME, name[:64]),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=program,
        )
        for number, name in enumerate(structures, start=1)
    ]
    try:
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")  # of values in headers that are not as they should be
            made = highdicom.seg.Segmentation(
                references.headers,
                frames,
                highdicom.seg.SegmentationTypeValues.BINARY,
                segments,
                series_instance_uid=highdicom.UID(),
                series_number=1000,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="glmae-ray",
                manufacturer_model_name="glmae predict",
                software_versions=__version__,
                device_serial_number="0",
            )
            file = io.BytesIO()
            made.save_as(file)
    except Exception as error:
        raise UserError(f"{_NONE}: {_lacking(error)}") from None
    return file.getvalue()


def _step(slices: Sequence[Slice]) -> float:
    """Distance of neighbouring slices, in mm."""
    whole = np.linalg.norm(slices[-1].position - slices[0].position)
    return round(float(whole) / (len(slices) - 1), 6)


def _lacking(error: Exception) -> str:
    """What was wrong; the words of others are left out, for they may quote a patient's data."""
    missing: Any = getattr(error, "name", None)
    return f"{missing} is missing" if missing else type(error).__name__
