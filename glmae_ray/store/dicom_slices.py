"""What a DICOM header says of each slice: its place, its scale, and the technique in words."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.datadict import dictionary_VR

from glmae_ray.store.dicom_headers import CODED_STRING, text
from glmae_ray.store.dicom_pixels import Pixels
from glmae_ray.store.scan import ReadError

# Numbers and coded strings only (and the kernel's short name); no name, id, date or free text.
_FACTS = (
    "ImageType",
    "BodyPartExamined",
    "PatientPosition",
    "SliceThickness",
    "SpacingBetweenSlices",
    "KVP",
    "XRayTubeCurrent",
    "Exposure",
    "GantryDetectorTilt",
    "ConvolutionKernel",
    "ScanningSequence",
    "SequenceVariant",
    "MRAcquisitionType",
    "EchoTime",
    "RepetitionTime",
    "InversionTime",
    "FlipAngle",
    "MagneticFieldStrength",
    "RescaleType",
    "Units",
)
_NUMBER = re.compile(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?")
_KERNEL = re.compile(r"[A-Za-z0-9_. +-]{1,16}")

_FARTHEST_MM = 1e6  # no scanner is a kilometre long, and products of such numbers stay finite

# Each by its name in single-frame and in multi-frame objects; the image type is text.
_ORDER = (
    ("TemporalPositionIdentifier", "TemporalPositionIndex"),
    ("TriggerTime", "NominalCardiacTriggerDelayTime"),
    ("EchoTime", "EffectiveEchoTime"),
    ("DiffusionBValue",),
    ("AcquisitionNumber", "FrameAcquisitionNumber"),
    ("InstanceNumber",),
)
_GROUPS = (
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
    "FrameContentSequence",
    "CardiacSynchronizationSequence",
    "MREchoSequence",
    "MRDiffusionSequence",
    "MRImageFrameTypeSequence",
)
_FRAMES = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
SLICE_KEYWORDS = (
    "SOPInstanceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    *(keyword for names in _ORDER for keyword in names),
    *_FRAMES,
    *_FACTS,
)


class Slice(NamedTuple):
    """One slice, in patient space of DICOM: LPS+ mm."""

    pixels: Pixels
    frame: int  # its number in the file, from 0
    instance: str
    position: NDArray[np.float64]  # (3,), centre of the first pixel
    axes: NDArray[np.float64]  # (2, 3), directions of the columns' and of the rows' index
    spacing: NDArray[np.float64]  # (2,), mm along these axes
    thickness: float  # mm to the next slice as the header says, 0: it does not
    slope: float
    intercept: float
    order: tuple[float | str, ...]


def read_slices(header: Dataset, pixels: Pixels) -> Iterator[Slice]:
    """The slices of one file."""
    if "ModalityLUTSequence" in header:
        message = f"{pixels.path}: values by a table; save it with slope and intercept"
        raise ReadError("unreadable", message)
    if _FRAMES[1] not in header:
        if pixels.frames > 1:
            message = f"{pixels.path}: {pixels.frames} frames without positions, not a volume"
            raise ReadError("not_3d", f"{message}; remove it")
        yield _slice([header], pixels, 0)
        return
    shared = [item for sequence in header.get(_FRAMES[0], [])[:1] for item in _groups(sequence)]
    frames = header[_FRAMES[1]].value
    if len(frames) != pixels.frames:
        message = f"{pixels.path}: {pixels.frames} frames but positions of {len(frames)}"
        raise ReadError("bad_geometry", f"{message}; repair the header")
    for index, frame in enumerate(frames):
        yield _slice([*_groups(frame), *shared, header], pixels, index)


def read_facts(header: Dataset) -> dict[str, str]:
    """What the header says of the technique, as text; what is odd is left out."""
    facts = {}
    for keyword in _FACTS:
        vr = dictionary_VR(keyword)
        pattern = {"CS": CODED_STRING, "SH": _KERNEL}.get(vr, _NUMBER)
        with contextlib.suppress(Exception):  # an odd fact is no reason to refuse a scan
            value = header.get(keyword)
            values = [value] if isinstance(value, str | float | int) else list(value or ())
            words = [str(word).strip() for word in values]
            if words and all(map(pattern.fullmatch, words)):
                facts[keyword] = "\\".join(words)
    return facts


def _groups(frame: Dataset) -> Iterator[Dataset]:
    for name in _GROUPS:
        yield from frame.get(name) or ()


def _slice(sources: Sequence[Dataset], pixels: Pixels, frame: int) -> Slice:
    """One slice, whose attributes lie in the first of the sources that has them."""
    slope, intercept = (_numbers(sources, k) for k in ("RescaleSlope", "RescaleIntercept"))
    scale = float(slope[0]) if slope.size else 1.0, float(intercept[0]) if intercept.size else 0.0
    if not np.isfinite(scale).all() or scale[0] == 0:
        raise ReadError("unreadable", f"{pixels.path}: rescale {scale}; repair the header")
    thickness = _number(sources, "SpacingBetweenSlices") or _number(sources, "SliceThickness")
    kinds = (text(source, k) for k in ("FrameType", "ImageType") for source in sources)
    order = [_number(sources, *keywords) for keywords in _ORDER]
    return Slice(
        pixels,
        frame,
        text(sources[-1], "SOPInstanceUID"),
        _vector(sources, "ImagePositionPatient", 3, pixels.path),
        _vector(sources, "ImageOrientationPatient", 6, pixels.path).reshape(2, 3),
        _vector(sources, "PixelSpacing", 2, pixels.path)[::-1],  # the distance of rows is first
        abs(thickness),
        *scale,
        (*order[:4], next(filter(None, kinds), ""), *order[4:], frame),
    )


def _numbers(sources: Sequence[Dataset], *keywords: str) -> NDArray[np.float64]:
    """(n,) values, none where no source has the attribute."""
    values = (source.get(keyword) for keyword in keywords for source in sources)
    found: Any = next((value for value in values if value is not None and value != ""), [])
    return np.atleast_1d(np.asarray(found, np.float64))


def _number(sources: Sequence[Dataset], *keywords: str) -> float:
    """The first value, 0 where there is none or it is no number."""
    with contextlib.suppress(ValueError, TypeError, IndexError):
        return float(_numbers(sources, *keywords)[0])
    return 0.0


def _vector(sources: Sequence[Dataset], keyword: str, size: int, path: Path) -> NDArray[np.float64]:
    found = _numbers(sources, keyword)
    if found.shape != (size,) or not (np.abs(found) < _FARTHEST_MM).all():
        message = f"{path}: no usable {keyword}; repair the header"
        raise ReadError("bad_geometry", message)
    return found
