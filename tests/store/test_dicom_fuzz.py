"""DICOM under damage: an error with a reason, or the volume that SimpleITK reads; nothing else."""

import contextlib
import pickle
import subprocess
import sys
import zlib

import numpy as np
import pytest

from glmae_ray.store.dicom import read_dicom
from glmae_ray.store.dicom_headers import read_slice_header
from glmae_ray.store.scan import REASONS, ImageFiles, Limits, ReadError
from tests.store import dicoms

ANY = Limits(min_side=1, min_voxels=1)
SHAPE = (11, 14, 4)
SLOPES = (1, 1.5, 1, 1)
PIXEL_BYTES = 2 * SHAPE[0] * SHAPE[1]
ROUNDS = 40  # per syntax; about 10 s in all
SLOW_ROUNDS = 20 * ROUNDS

# Reads files with GDCM in a process of its own, which damage may crash.
REFERENCE = """
import pickle, sys
import numpy as np, SimpleITK as sitk
sitk.ProcessObject.GlobalWarningDisplayOff()
for line in sys.stdin.buffer:
    try:
        image = sitk.ReadImage(line.decode().strip(), imageIO="GDCMImageIO")
        answer = (sitk.GetArrayFromImage(image), np.array(image.GetOrigin()))
    except RuntimeError:
        answer = None
    data = pickle.dumps(answer)
    sys.stdout.buffer.write(len(data).to_bytes(8, "little") + data)
    sys.stdout.buffer.flush()
"""


class Reference:
    """SimpleITK in another process, started again after a crash."""

    def __init__(self):
        self.process = None

    def read(self, path):
        """Voxels (frames, rows, columns) and position; None where it fails."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", REFERENCE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        self.process.stdin.write(f"{path}\n".encode())
        self.process.stdin.flush()
        size = self.process.stdout.read(8)
        if len(size) < 8:
            self.close()
            return None
        return pickle.loads(self.process.stdout.read(int.from_bytes(size, "little")))

    def close(self):
        if self.process is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def reference():
    worker = Reference()
    yield worker
    worker.close()


def damaged(raw, rng):
    """The bytes of a file cut short, or with some of them changed."""
    kind = rng.integers(4)
    if kind == 0:
        return raw[: int(rng.integers(len(raw)))]
    out = bytearray(raw)
    first, last = ((132, len(raw)), (132, 1000), (len(raw) - 300, len(raw)))[kind - 1]
    for place in rng.integers(first, min(last, len(raw)), int(rng.integers(1, 4))):
        out[place] = (
            int(rng.integers(256)) if rng.integers(2) else out[place] ^ (1 << rng.integers(8))
        )
    return bytes(out)


def pixels_alone(raw, syntax, sound):
    """A file with the pixels of `raw` and all else sound: damage elsewhere need not concern us."""
    if syntax != "deflated":
        start = sound.index(b"\xe0\x7f\x10\x00" if syntax != "big_endian" else b"\x7f\xe0\x00\x10")
        return sound[: start + 12] + raw[start + 12 :]
    start = 144 + int.from_bytes(sound[140:144], "little")  # after the file meta group
    raw, plain = (zlib.decompressobj(-15).decompress(data[start:]) for data in (raw, sound))
    end = len(plain)
    packer = zlib.compressobj(wbits=-15)
    mixed = plain[: end - PIXEL_BYTES] + raw[end - PIXEL_BYTES : end]
    return sound[:start] + packer.compress(mixed) + packer.flush()


def outcome_of(paths):
    """The scan, or the reason why there is none."""
    try:
        return read_dicom(ImageFiles(".dcm", tuple(paths)), ANY), None
    except ReadError as error:
        return None, error


def check_round(paths, syntax, sound, rng, reference):
    """Damage one file of a series, read it, and hold the outcome against the reference."""
    number = int(rng.integers(len(paths)))
    victim = paths[number]
    raw = victim.read_bytes()
    victim.write_bytes(damaged(raw, rng))
    try:
        with contextlib.suppress(ReadError):
            read_slice_header(victim, salt=b"salt")
        scan, error = outcome_of(paths)
        if error is not None:
            assert error.reason in REASONS
            assert "\n" not in error.message
            return "refused"
        if np.array_equal(scan.voxels, sound.voxels) and np.allclose(scan.affine, sound.affine):
            return "sound"
        answers = [reference.read(path) for path in paths]
        if answers[number] is None:
            victim.write_bytes(pixels_alone(victim.read_bytes(), syntax, raw))
            answers[number] = reference.read(victim)
        assert all(answer is not None for answer in answers), "read what SimpleITK does not"
        normal = np.diag([-1, -1, 1]) @ np.cross(scan.affine[:3, 0], scan.affine[:3, 1])
        answers.sort(key=lambda answer: float(answer[1] @ normal))
        expected = np.concatenate([answer[0] for answer in answers])
        np.testing.assert_allclose(scan.voxels.transpose(2, 1, 0), expected, rtol=1e-6)
        for z, (_, position) in enumerate(answers):
            here = np.diag([-1, -1, 1]) @ (scan.affine @ [0, 0, z, 1])[:3]
            assert np.abs(here - position).max() < 0.25 * dicoms.STEP
        return "as SimpleITK"
    finally:
        victim.write_bytes(raw)


def fuzz(folder, syntax, rounds, reference, capfd):
    def change(one, z):
        one.RescaleSlope = str(SLOPES[z])

    paths = dicoms.write_series(folder, dicoms.voxels(SHAPE), syntax=syntax, change=change)
    sound = read_dicom(ImageFiles(".dcm", tuple(paths)), ANY)
    outcomes = {}
    for number in range(rounds):
        rng = np.random.default_rng([zlib.crc32(syntax.encode()), number])
        try:
            outcome = check_round(paths, syntax, sound, rng, reference)
        except Exception as error:
            raise AssertionError(f"{syntax}, round {number}: {error}") from error
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert outcomes["refused"] > rounds // 5
    assert outcomes.get("sound", 0) > 0
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    return outcomes


@pytest.mark.parametrize("syntax", dicoms.SYNTAXES)
def test_damage_gives_a_reason_or_what_simpleitk_reads(tmp_path, syntax, reference, capfd):
    fuzz(tmp_path, syntax, ROUNDS, reference, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("syntax", dicoms.SYNTAXES)
def test_much_damage_gives_a_reason_or_what_simpleitk_reads(tmp_path, syntax, reference, capfd):
    fuzz(tmp_path, syntax, SLOW_ROUNDS, reference, capfd)
