"""Headers of DICOM files: what discovery needs from one file, and the safe way into pydicom.

Patients' names, ids, dates and texts end here: series and subjects leave only as salted hashes,
and no message quotes what a file says.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from pydicom import Dataset, config
from pydicom.datadict import tag_for_keyword
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_partial
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, UID_dictionary

from glmae_ray.store.scan import ReadError

if TYPE_CHECKING:
    from upath import UPath

    Stop = Callable[[int, str | None, int], bool]

CODED_STRING = re.compile(r"[A-Z0-9_ ]{1,16}")  # value representation CS
_NAMED_DICOM = (".dcm", ".dicom", ".ima")  # taken for DICOM even without its magic
_HEADER_BLOCK = 2**16  # of a remote file; headers of single slices take 2 to 20 KB
_LAST_TAG = 0x00280030  # PixelSpacing; what discovery needs lies before it, in order of tags
_START_BYTES = 1024  # preamble and file meta group, which names the transfer syntax
# pydicom inflates a whole file at once, up to 1032 times its size: 4 GiB here.
_DEFLATED_LIMIT = 2**32 // 1032

_SERIES_KEYWORDS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "PatientID",
    "IssuerOfPatientID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "ImageOrientationPatient",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "PixelSpacing",
)


class SliceHeader(NamedTuple):
    """What groups files into volumes and volumes by person."""

    series: str  # salted hash, equal for the slices of one volume
    subject: str  # salted hash, equal for the files of one person
    modality: str | None
    instance: str  # salted hash, equal for copies of one file


def is_dicom(start: bytes) -> bool:
    """Whether the first 132 bytes of a file (or more) are those of a DICOM file."""
    return start[128:132] == b"DICM"


def is_named_dicom(place: Path | UPath) -> bool:
    """Whether a name alone makes a file worth a try: old files lack the magic of `is_dicom`."""
    return place.name.lower().endswith(_NAMED_DICOM)


def read_slice_header(place: Path | UPath, *, salt: bytes) -> SliceHeader:
    """Read what discovery needs, from the first kilobytes of a file.

    A series is split by what cannot lie in one volume: object class, orientation, rows, columns
    and pixel spacing. Orientations are rounded to 0.01 and spacings to 0.001 mm, so that
    noise in their last digits does not split. A file of several frames is a series of its own.

    Args:
        place: A DICOM file.
        salt: Secret; without it nobody can try ids until a hash fits.

    Raises:
        ReadError: not_an_image, truncated or unreadable.
        OSError: The system cannot read it.
    """
    options: Any = {} if isinstance(place, Path) else {"block_size": _HEADER_BLOCK}
    with place.open("rb", **options) as stream:
        header = parse(cast(BinaryIO, stream), place, _SERIES_KEYWORDS, _is_past_spacing)
    check_is_image(header, place)
    with guarded(place):
        series = text(header, "SeriesInstanceUID")
        if not series:
            raise ReadError("unreadable", f"{place}: no SeriesInstanceUID; repair the header")
        person = text(header, "PatientID")
        subject = ["patient", text(header, "IssuerOfPatientID"), person]
        if not person:
            study = text(header, "StudyInstanceUID")
            subject = ["study", study] if study else ["series", series]
        return SliceHeader(
            _hash(salt, "volume", series, *_separators(header)),
            _hash(salt, *subject),
            code(header, "Modality"),
            _hash(salt, "instance", text(header, "SOPInstanceUID") or str(place))[:16],
        )


def parse(
    stream: BinaryIO, place: Path | UPath, keywords: Iterable[str], stop_when: Stop
) -> Dataset:
    """The named attributes of a file that lie before the element at which `stop_when` says so.

    Raises:
        ReadError: not_an_image, truncated or unreadable.
    """
    start = stream.read(_START_BYTES)
    _check_start(start, place)
    stream.seek(0)
    tags = [cast(int, tag_for_keyword(keyword)) for keyword in keywords]
    with guarded(place):
        return read_partial(
            stream, stop_when, force=is_named_dicom(place), specific_tags=cast(Any, tags)
        )


@contextmanager
def guarded(place: Path | UPath) -> Iterator[None]:
    """Run pydicom or a decoder on what may be damaged: quiet, and a failure is a ReadError.

    Damage shows as almost any exception of pydicom. Its text is dropped, for it may quote values.

    Raises:
        ReadError: One raised within, not_an_image, truncated or unreadable.
        OSError: The system cannot read the file.
    """
    log = logging.getLogger("pydicom")
    propagates, log.propagate = log.propagate, False
    try:
        with warnings.catch_warnings(), config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    except ReadError:
        raise
    except InvalidDicomError:
        message = f"{place}: holds something else than DICOM; remove it"
        raise ReadError("not_an_image", message) from None
    except EOFError:
        raise truncated(place) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        message = f"{place}: damaged DICOM ({type(error).__name__}); copy it again"
        raise ReadError("unreadable", message) from None
    finally:
        log.propagate = propagates


def truncated(place: Path | UPath) -> ReadError:
    """The error for a file that ends too early."""
    return ReadError("truncated", f"{place}: shorter than its header says; copy it again")


def text(header: Dataset, keyword: str) -> str:
    """An attribute as text, empty where it is missing or blank."""
    value = header.get(keyword)
    return "" if value is None else str(value).strip().strip("\0")


def code(header: Dataset, keyword: str) -> str | None:
    """An attribute that holds a coded string, None where it holds none or something else."""
    value = text(header, keyword)
    return value if CODED_STRING.fullmatch(value) else None


def check_is_image(header: Dataset, place: Path | UPath) -> None:
    """Refuse what is no scan: other kinds of DICOM objects, and headers that break off.

    Raises:
        ReadError: not_an_image or truncated.
    """
    with guarded(place):
        kind, modality = _kind(header), text(header, "Modality")
        sized = "Rows" in header and "Columns" in header
    if "Image Storage" in kind and not sized:
        raise truncated(place)
    if not sized or modality in ("SEG", "RTDOSE"):
        message = f"{place}: holds {kind or 'no known DICOM object'}, not a scan; remove it"
        raise ReadError("not_an_image", message)


def _check_start(start: bytes, place: Path | UPath) -> None:
    if not start:
        raise ReadError("not_an_image", f"{place}: is empty; look where it came from, or remove it")
    is_deflated = DeflatedExplicitVRLittleEndian.encode() in start
    if is_deflated and place.stat().st_size > _DEFLATED_LIMIT:
        raise ReadError("too_large", f"{place}: deflated; save it in another transfer syntax")


def _is_past_spacing(tag: int, _vr: str | None, _length: int) -> bool:
    return tag > _LAST_TAG


def _kind(header: Dataset) -> str:
    """What kind of object this is, in words of the standard only."""
    meta = getattr(header, "file_meta", {})
    uid = text(header, "SOPClassUID") or str(meta.get("MediaStorageSOPClassUID", ""))
    return UID(uid).name if uid in UID_dictionary else ""


def _separators(header: Dataset) -> Iterator[str]:
    """What the slices of one volume have in common."""
    yield text(header, "SOPClassUID")
    yield text(header, "Rows")
    yield text(header, "Columns")
    # The sum turns -0.0 into 0.0.
    yield " ".join(f"{round(float(n), 2) + 0.0}" for n in header.get("ImageOrientationPatient", ()))
    yield " ".join(f"{round(float(n), 3)}" for n in header.get("PixelSpacing", ()))
    if int(header.get("NumberOfFrames") or 1) > 1:
        yield text(header, "SOPInstanceUID")


def _hash(salt: bytes, *parts: str) -> str:
    message = "\0".join(parts).encode("utf-8", "surrogateescape")
    return hmac.new(salt, message, hashlib.sha256).hexdigest()[:32]
