"""Time reading a CT series of 300 slices of 512x512: ours, SimpleITK, dcm2niix; and headers.

    python -m benchmarks.dicom_reading [--quick] --out FILE.json

Every reader runs three times in a process of its own, with the files in the page cache.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from pydicom import Dataset, uid
from pydicom.dataset import FileMetaDataset

from benchmarks._report import arguments, environment, report, spread

SLICES, SIDE, REPEATS = 300, 512, 3
PACKAGES = ["dcm2niix", "numpy", "pydicom", "python-gdcm", "simpleitk"]


def write_series(folder: Path) -> None:
    """Noise of 12 bits, uncompressed."""
    rng = np.random.default_rng(0)
    for z in range(SLICES):
        one = Dataset()
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        one.SOPClassUID, one.SOPInstanceUID = uid.CTImageStorage, f"1.2.826.1.{z + 1}"
        one.StudyInstanceUID, one.SeriesInstanceUID = "1.2.826", "1.2.826.1"
        one.PatientID, one.Modality, one.InstanceNumber = "P1", "CT", z + 1
        one.ImageOrientationPatient, one.PixelSpacing = [1, 0, 0, 0, 1, 0], [0.7, 0.7]
        one.ImagePositionPatient, one.SliceThickness = [0, 0, z], 1
        one.Rows = one.Columns = SIDE
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 12, 11, 0
        one.RescaleSlope, one.RescaleIntercept = 1, -1024
        one.PixelData = rng.integers(0, 4096, (SIDE, SIDE), np.uint16).tobytes()
        one.save_as(folder / f"{z:04}.dcm", enforce_file_format=True)


def read_ours(folder: Path) -> None:
    """One volume through `read_dicom`."""
    from glmae_ray.store.dicom import read_dicom
    from glmae_ray.store.scan import LIMITS, ImageFiles

    read_dicom(ImageFiles(".dcm", tuple(folder.iterdir())), LIMITS)


def read_headers(folder: Path) -> None:
    """What discovery reads."""
    from glmae_ray.store.dicom_headers import read_slice_header

    for path in folder.iterdir():
        read_slice_header(path, salt=b"salt")


def read_simpleitk(folder: Path) -> None:
    """One volume through GDCM."""
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    reader.Execute()


def convert(folder: Path) -> None:
    """One uncompressed NIfTI file, written and thrown away."""
    program = Path(sys.executable).with_name("dcm2niix")
    with tempfile.TemporaryDirectory() as out:
        words = [str(program), "-z", "n", "-b", "n", "-o", out, str(folder)]
        subprocess.run(words, check=True, capture_output=True)


def peak_mib() -> float:
    """The most memory that this process has held since it was last asked to forget."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


JOBS = {job.__name__: job for job in (read_ours, read_headers, read_simpleitk, convert)}


def measure(name: str, folder: Path) -> dict[str, float]:
    """Do one job in this process, its libraries loaded before the clock starts."""
    __import__("SimpleITK" if name == "read_simpleitk" else "glmae_ray.store.dicom")
    Path("/proc/self/clear_refs").write_text("5")
    before, start, work = peak_mib(), time.perf_counter(), time.process_time()
    JOBS[name](folder)
    wall, cpu = time.perf_counter() - start, time.process_time() - work
    return {"seconds": wall, "of CPU": cpu, "MiB more": peak_mib() - before}


def main() -> None:
    """Write the series, and run every job in fresh processes."""
    options = arguments(__doc__.splitlines()[0])
    facts, rows = environment(PACKAGES), []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        write_series(Path(folder))
        for name in JOBS:
            found = []
            for _ in range(REPEATS):
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    found.append(pool.submit(measure, name, Path(folder)).result())
            rows.append({"job": name} | {key: spread([f[key] for f in found]) for key in found[0]})
    seconds = {row["job"]: row["seconds"]["median"] for row in rows}
    ratios = {f"ours / {name}": seconds["read_ours"] / seconds[name] for name in list(JOBS)[2:]}
    ratios["headers a second"] = SLICES / seconds["read_headers"]
    report("dicom_reading", rows=rows, ratios=ratios, facts=facts, out=options.out)


if __name__ == "__main__":
    main()
