"""Small DICOM series written to disk with pydicom and GDCM, and the calls that read them."""

from collections.abc import Callable
from pathlib import Path

import gdcm
import numpy as np
import pytest
from pydicom import Dataset, uid
from pydicom.data import get_testdata_file
from pydicom.dataelem import DataElement
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate

from glmae_ray.store.dicom import read_dicom
from glmae_ray.store.dicom_headers import read_slice_header
from glmae_ray.store.scan import REASONS, ImageFiles, Limits, ReadError

SHAPE = (11, 14, 7)  # (X, Y, Z): columns, rows, slices
SPACING = (0.9, 1.1)  # mm between columns, between rows
STEP = 3.0  # mm between slices
ORIGIN = np.array([-31.25, 12.5, 140.0])  # LPS
_TURN = np.deg2rad(20)
AXES = np.array(  # LPS directions of columns, rows and slices: an oblique sagittal scan
    [[np.sin(_TURN), np.cos(_TURN), 0], [0, 0, -1], [-np.cos(_TURN), np.sin(_TURN), 0]]
)

NATIVE = {
    "implicit": uid.ImplicitVRLittleEndian,
    "explicit": uid.ExplicitVRLittleEndian,
    "big_endian": uid.ExplicitVRBigEndian,
    "deflated": uid.DeflatedExplicitVRLittleEndian,
}
COMPRESSED = {
    "rle": gdcm.TransferSyntax.RLELossless,
    "jpeg_lossless": gdcm.TransferSyntax.JPEGLosslessProcess14,
    "jpeg_lossless_sv1": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    "jpeg_ls": gdcm.TransferSyntax.JPEGLSLossless,
    "jpeg_2000": gdcm.TransferSyntax.JPEG2000Lossless,
}
SYNTAXES = (*NATIVE, *COMPRESSED)

ANY = Limits(min_side=1, min_voxels=1)
SALT = b"salt of the tests"

Change = Callable[[Dataset, int], None]


def voxels(shape=SHAPE, *, dtype=np.int16, seed: int = 0) -> np.ndarray:
    """Smooth values (X, Y, Z) with noise, in the range of CT."""
    grid = np.indices(shape).sum(0)
    noise = np.random.default_rng(seed).integers(0, 99, shape)
    return (grid * 57 + noise + (0 if np.dtype(dtype).kind == "u" else -400)).astype(dtype)


def affine(step=STEP * AXES[2]) -> np.ndarray:
    """The affine to RAS+ mm of what `write_series` writes."""
    lps = np.eye(4)
    lps[:3, :3] = np.stack([AXES[0] * SPACING[0], AXES[1] * SPACING[1], step], axis=1)
    lps[:3, 3] = ORIGIN
    return np.diag([-1, -1, 1, 1]) @ lps


def write_series(
    folder: Path,
    data: np.ndarray | None = None,
    *,
    syntax: str = "explicit",
    step=STEP * AXES[2],
    bits: int | None = None,
    change: Change | None = None,
    series: str = "1.2.826.7.1",
) -> list[Path]:
    """Write one file per slice; `change` gets each dataset and its number before it is written."""
    data = voxels() if data is None else data
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for z in range(data.shape[2]):
        one = dataset(data[:, :, z].T, bits=bits)
        one.SeriesInstanceUID = series
        one.SOPInstanceUID = f"{series}.{z + 1}"
        one.InstanceNumber = z + 1
        one.ImageOrientationPatient = [float(f"{n:.9f}") for n in AXES[:2].ravel()]
        one.ImagePositionPatient = [float(f"{n:.6f}") for n in ORIGIN + z * np.asarray(step)]
        one.PixelSpacing = [SPACING[1], SPACING[0]]
        if change:
            change(one, z)
        paths.append(write(one, folder / f"slice{z:03}.dcm", syntax=syntax))
    return paths


def write_multiframe(
    path: Path,
    data: np.ndarray | None = None,
    *,
    syntax: str = "explicit",
    order=None,
    change: Change | None = None,
) -> Path:
    """Write all slices into one enhanced MR file, its frames in the given order."""
    data = voxels() if data is None else data
    order = list(range(data.shape[2])) if order is None else list(order)
    one = dataset(data[:, :, order].transpose(2, 1, 0))
    one.SOPClassUID = uid.EnhancedMRImageStorage
    one.SeriesInstanceUID, one.SOPInstanceUID = "1.2.826.7.2", "1.2.826.7.2.1"
    shared, measures, plane = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [SPACING[1], SPACING[0]], STEP
    plane.ImageOrientationPatient = [float(f"{n:.9f}") for n in AXES[:2].ravel()]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    one.SharedFunctionalGroupsSequence = [shared]
    one.PerFrameFunctionalGroupsSequence = []
    for z in order:
        frame, position = Dataset(), Dataset()
        position.ImagePositionPatient = [float(f"{n:.6f}") for n in ORIGIN + z * STEP * AXES[2]]
        frame.PlanePositionSequence = [position]
        if change:
            change(frame, z)
        one.PerFrameFunctionalGroupsSequence.append(frame)
    return write(one, path, syntax=syntax)


def dataset(pixels: np.ndarray, *, bits: int | None = None) -> Dataset:
    """An MR image of (rows, columns) or (frames, rows, columns) without a place."""
    one = Dataset()
    one.SOPClassUID, one.Modality = uid.MRImageStorage, "MR"
    one.StudyInstanceUID, one.PatientID = "1.2.826.7", "P-17"
    one.SeriesInstanceUID, one.SOPInstanceUID = "1.2.826.7.1", "1.2.826.7.1.1"
    one.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.Rows, one.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        one.NumberOfFrames = len(pixels)
    one.BitsAllocated = 8 * pixels.dtype.itemsize
    one.BitsStored = bits or one.BitsAllocated
    one.HighBit = one.BitsStored - 1
    one.PixelRepresentation = int(pixels.dtype.kind == "i")
    one["PixelData"] = _pixel_element(pixels)
    return one


def write(one: Dataset, path: Path, *, syntax: str = "explicit") -> Path:
    """Write a dataset in the syntax of that name."""
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = NATIVE.get(syntax, uid.ExplicitVRLittleEndian)
    path.parent.mkdir(parents=True, exist_ok=True)
    if syntax == "big_endian":
        kind = np.dtype(f"u{one.BitsAllocated // 8}")
        one["PixelData"].value = np.frombuffer(one.PixelData, kind).byteswap().tobytes()
    if syntax in COMPRESSED:
        _compress(one, path, COMPRESSED[syntax])
    one.save_as(path, enforce_file_format=True)
    return path


def read(paths, *, limits=ANY, volume=None):
    return read_dicom(ImageFiles(".dcm", tuple(paths), volume), limits)


def error_of(paths, **options):
    with pytest.raises(ReadError) as caught:
        read(paths, **options)
    assert caught.value.reason in REASONS
    assert "\n" not in caught.value.message
    return caught.value


def header_of(path):
    return read_slice_header(path, salt=SALT)


def set_on(number, **values):
    def change(one, z):
        if number in (z, None):
            for name, value in values.items():
                setattr(one, name, value)

    return change


def sample(name):
    """A file of pydicom's own wheel; none is fetched from elsewhere."""
    return Path(get_testdata_file(name, download=False))


def _compress(one: Dataset, path: Path, syntax: int) -> None:
    """Replace the pixels by what GDCM makes of them; its own writer would rewrite positions."""
    one.save_as(path, enforce_file_format=True)
    reader, change = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetInput(reader.GetImage())
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    assert change.Change()
    parts = change.GetOutput().GetDataElement().GetSequenceOfFragments()
    values = [parts.GetFragment(n).GetByteValue() for n in range(parts.GetNumberOfFragments())]
    frames = [value.GetBuffer().encode("utf-8", "surrogateescape") for value in values]
    one["PixelData"] = DataElement("PixelData", "OB", encapsulate(frames))
    one["PixelData"].is_undefined_length = True
    one.file_meta.TransferSyntaxUID = gdcm.TransferSyntax(syntax).GetString()


def _pixel_element(pixels: np.ndarray) -> DataElement:
    raw = np.ascontiguousarray(pixels).tobytes()
    return DataElement("PixelData", "OW", raw + b"\0" * (len(raw) % 2))
