"""Procedural CT-like people, written as an nnU-Net v2 data set so that a demo uses real doors."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import orientations
from nibabel.affines import from_matvec
from nibabel.eulerangles import euler2mat
from numpy.typing import NDArray

LABELS = {"background": 0, "lungs": 1, "spine": 2, "liver": 3, "kidneys": 4, "vessels": 5}
ORIENTATIONS = ("LPS", "RAS", "LAS", "PIR", "LPI", "SAR")  # of the voxel axes, in turn by person

Array = NDArray[np.float32]
Point = Sequence[float]  # mm right, anterior and superior of the middle of the standard person
Scan = tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.float64]]

# Tissue: average HU, how far a person may be from it, label painted, the label it stays within.
_TISSUES: dict[str, tuple[float, float, str, str | None]] = {
    "fat": (-100, 8, "background", None),
    "soft": (50, 8, "background", None),
    "rib": (450, 60, "background", None),
    "organ": (130, 10, "background", None),
    "blood": (185, 15, "background", None),
    "fluid": (15, 8, "background", None),
    "air": (-1020, 0, "background", None),  # as scanners that cut off at -1024 show it
    "lung": (-850, 30, "lungs", None),
    "lung vessel": (40, 15, "lungs", "lungs"),
    "bone": (700, 80, "spine", None),
    "marrow": (200, 35, "spine", None),
    "disc": (80, 15, "spine", None),
    "liver": (110, 12, "liver", None),
    "liver vessel": (180, 12, "vessels", "liver"),
    "kidney": (165, 15, "kidneys", None),
    "renal pelvis": (30, 15, "kidneys", "kidneys"),
    "vessel": (190, 15, "vessels", None),
}
_LUNGS: tuple[tuple[str, Point, Point], ...] = (  # tissue, centre, radii in mm
    ("lung", (-68, -5, 55), (58, 95, 106)),
    ("lung", (68, -5, 55), (58, 95, 106)),
    ("fat", (-60, 12, -32), (76, 96, 72)),  # below the domes of the diaphragm
    ("fat", (60, 12, -32), (76, 96, 72)),
)
_ORGANS: tuple[tuple[str, Point, Point], ...] = (  # the same
    ("organ", (-18, 28, 48), (50, 40, 42)),  # heart and its left chamber
    ("blood", (-34, 24, 42), (20, 17, 22)),
    ("organ", (-88, -34, -12), (22, 36, 40)),  # spleen
    ("liver", (62, 6, -34), (62, 72, 64)),
    ("liver", (8, 34, -14), (56, 32, 32)),
    ("kidney", (-64, -40, -72), (25, 23, 46)),
    ("kidney", (64, -40, -84), (25, 23, 46)),
    ("renal pelvis", (-55, -36, -72), (11, 10, 20)),
    ("renal pelvis", (55, -36, -84), (11, 10, 20)),
)
_TUBES: tuple[tuple[str, float, tuple[Point, ...]], ...] = (  # tissue, radius in mm, path
    ("soft", 17, ((-34, -42, -60), (-46, -36, -175))),  # psoas
    ("soft", 17, ((34, -42, -60), (46, -36, -175))),
    ("air", 8, ((2, -2, 170), (2, -6, 92))),  # trachea and main bronchi
    ("air", 5, ((-34, -12, 70), (2, -6, 92), (34, -12, 70))),
    ("vessel", 11, ((-2, 22, 62), (8, 20, 95), (0, 8, 118), (-14, -10, 120), (-20, -22, 100))),
    ("vessel", 11, ((-20, -22, 100), (-18, -20, 20), (-10, -17, -60), (-4, -19, -118))),  # aorta
    ("vessel", 10, ((24, 10, 135), (24, 14, 80), (18, 12, 40), (22, -4, -10))),  # venae cavae
    ("vessel", 10, ((22, -4, -10), (20, -16, -60), (18, -20, -126))),
    ("vessel", 6, ((-40, -18, -178), (-4, -19, -118), (32, -18, -178))),  # iliac
    ("vessel", 6, ((-16, -26, -180), (18, -20, -126), (52, -26, -180))),
    ("vessel", 4, ((-46, -34, -72), (0, -14, -68), (46, -34, -84))),  # renal
    ("vessel", 4, ((-24, 4, 170), (-4, 6, 118), (24, 4, 170))),  # to the neck
)
_TREES: tuple[tuple[str, Point, Point], ...] = (  # tissue, root, first step in mm
    ("lung vessel", (-24, -8, 66), (-19, -12, 18)),
    ("lung vessel", (-24, -8, 66), (-20, 14, 10)),
    ("lung vessel", (-24, -8, 66), (-18, -16, -12)),
    ("lung vessel", (24, -8, 66), (19, -12, 18)),
    ("lung vessel", (24, -8, 66), (20, 14, 8)),
    ("lung vessel", (24, -8, 66), (20, -14, -12)),
    ("liver vessel", (32, 4, -30), (24, 4, 2)),
    ("liver vessel", (32, 4, -30), (14, -16, -20)),
    ("liver vessel", (28, 8, -26), (-20, 20, 6)),
)
_COLON = ((88, -5, -155), (90, 0, -75), (0, 54, -66), (-92, -5, -50), (-90, 0, -155))
_STOMACH = ((-66, 14, 0), (-52, 30, -24), (-30, 42, -38))
_TORSO_MM = np.array([132, 88, 165], np.float32)  # half-axes of the muscle wall, half of the height
_EDGE_MM = 2.5  # an edge is about a voxel wide: the partial volume of a real scanner
_BEND_MM = 3.0  # largest amplitude of each of the two waves that bend a coordinate
_SHADING_HU, _SHADED_HU = 10.0, -950  # of each wave; air stays as it is
_FLOOR_HU = -1024  # what scanners write outside their circular field of view


def write_cohort(folder: Path, *, people: int, seed: int = 0) -> Path:
    """Write phantom_000, phantom_001, ... as an nnU-Net v2 data set with one CT channel.

    `dataset.json` comes last, so a killed call leaves no folder that claims to be complete.

    Args:
        folder: Where imagesTr/, labelsTr/ and dataset.json go; made if missing.
        people: Number of cases.
        seed: Another seed gives another cohort.

    Returns:
        `folder`.
    """
    if people < 1:
        raise ValueError(f"people is {people}; a cohort needs at least 1")
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(people):
        image, labels, affine = make_person(number, seed=seed)
        _save(folder / f"imagesTr/phantom_{number:03d}_0000.nii.gz", image, affine)
        _save(folder / f"labelsTr/phantom_{number:03d}.nii.gz", labels, affine)
    description = {
        "name": "Phantoms",
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": people,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")
    return folder


def make_person(number: int, *, seed: int = 0) -> Scan:
    """Draw one person from (seed, number) alone.

    Args:
        number: Which person; also picks the orientation of the voxel axes, and whether oblique.
        seed: Which cohort.

    Returns:
        CT image in HU, label map (values of `LABELS`) of the same shape, and the affine (4, 4) from
        voxel indices to RAS+ millimetres. The axes are ordered as nibabel orders a file's.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, number]))
    size = rng.uniform(0.92, 1.06) * rng.uniform(0.96, 1.04, 3)
    fat_mm, plane_mm = rng.uniform((8, 2.0), (22, 2.5)).tolist()
    spacing = np.array([plane_mm, plane_mm, rng.uniform(2.8, 4.0)])
    margin_mm = np.array([fat_mm + 12, fat_mm + 25, 0])
    shape = np.ceil(2 * (_TORSO_MM + margin_mm) * size / spacing).astype(int)
    shape[2] += shape[2] == shape[1]  # equal sides would hide swapped axes from a test
    person = _Person(rng, shape.tolist(), spacing / size)
    for tissue, centre, radii in _LUNGS:
        person.ellipsoid(tissue, centre, radii)
    _paint_bowel(person)
    for tissue, centre, radii in _ORGANS:
        person.ellipsoid(tissue, centre, radii)
    for tissue, radius, path in _TUBES:
        person.tube(tissue, radius, path)
    for tissue, root, step in _TREES:
        _paint_tree(person, tissue, person.near(root, by=3), person.near(step, by=4), radius=4.8)
    _paint_wall(person, fat_mm)
    _paint_ribs(person)
    _paint_spine(person)
    return _to_file_axes(person, spacing, number)


class _Person:
    """A scan in the making: parts are painted by distance (mm, negative inside), last on top.

    Arrays are (X, Y, Z) in RAS order, in the scaled and gently bent frame of a standard person.
    """

    def __init__(self, rng: np.random.Generator, shape: list[int], step_mm: NDArray[np.float64]):
        self.rng = rng
        self.hu = np.full(shape, -100, np.float32)  # fat, until something else is painted
        self.labels = np.zeros(shape, np.uint8)
        self.tissue_hu = {t: hu + rng.uniform(-by, by) for t, (hu, by, *_) in _TISSUES.items()}
        self.axes = [
            ((np.arange(n) - (n - 1) / 2) * mm).astype(np.float32)
            for n, mm in zip(shape, step_mm, strict=True)
        ]
        x, y, z = np.meshgrid(*self.axes, indexing="ij", sparse=True)
        pairs = ((x, y, z), (y, x, z), (z, x, y))
        self.xyz = np.stack([a + self._wave(b) + self._wave(c) for a, b, c in pairs])

    def _wave(self, axis: Array) -> Array:
        height, length, phase = self.rng.uniform((1, 140, 0), (_BEND_MM, 320, 2 * np.pi)).tolist()
        wave: Array = height * np.sin(axis * (2 * np.pi / length) + phase)
        return wave

    def near(self, numbers: Point, by: float) -> Array:
        """`numbers`, each up to `by` away: where one person differs from another."""
        return (numbers + self.rng.uniform(-by, by, len(numbers))).astype(np.float32)

    def box(self, low: NDArray[Any], high: NDArray[Any]) -> tuple[slice, ...]:
        """The voxels between two corners, with a margin for bends and soft edges."""
        margin = 2 * _BEND_MM + _EDGE_MM
        ends = zip(self.axes, low, high, strict=True)
        return tuple(slice(*a.searchsorted((lo - margin, hi + margin))) for a, lo, hi in ends)

    def paint(self, tissue: str, distance: Array, box: tuple[slice, ...] = ()) -> None:
        """Cover where `distance` < 0 with a tissue, half of it at the edge."""
        _, _, label, within = _TISSUES[tissue]
        cover = np.clip(0.5 - distance / _EDGE_MM, 0, 1)
        if within is not None:
            cover *= self.labels[box] == LABELS[within]
        self.hu[box] += cover * (self.tissue_hu[tissue] - self.hu[box])
        self.labels[box][cover > 0.5] = LABELS[label]

    def ellipsoid(self, tissue: str, centre: Point, radii: Point) -> None:
        """Paint an ellipsoid that is moved, stretched and leant a little for this person."""
        reach = 1.3 * np.array(radii) + 3
        box = self.box(centre - reach, centre + reach)
        (a, b, c), lean = self.near(radii, by=0.07 * min(radii)), self.near((0, 0), by=0.15)
        x, y, z = self.xyz[:, *box] - self.near(centre, by=3).reshape(3, 1, 1, 1)
        x, y = x - lean[0] * z, y - lean[1] * z
        radius = np.sqrt((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2)
        self.paint(tissue, (radius - 1) * np.float32(min(radii)), box)

    def tube(self, tissue: str, radius: float, path: Sequence[Point]) -> None:
        for start, end in pairwise([self.near(point, by=2) for point in path]):
            self.segment(tissue, radius, start, end)

    def segment(self, tissue: str, radius: float, start: Array, end: Array) -> None:
        box = self.box(np.minimum(start, end) - radius, np.maximum(start, end) + radius)
        x, y, z = self.xyz[:, *box] - start.reshape(3, 1, 1, 1)
        dx, dy, dz = end - start
        along = np.clip((x * dx + y * dy + z * dz) / (dx * dx + dy * dy + dz * dz), 0, 1)
        aside = np.sqrt((x - along * dx) ** 2 + (y - along * dy) ** 2 + (z - along * dz) ** 2)
        self.paint(tissue, aside - np.float32(radius), box)


def _paint_bowel(person: _Person) -> None:
    small = person.rng.uniform((-75, -5, -165), (75, 66, -85), (30, 3)).tolist()
    for path, radius in ((small, 11), (_COLON, 15), (_STOMACH, 29)):
        person.tube("soft", radius, path)
        person.tube("fluid", radius - 4, path)
        for centre in path[::2]:
            person.ellipsoid("air", centre, [0.7 * radius] * 3)


def _paint_tree(person: _Person, tissue: str, start: Array, step: Array, radius: float) -> None:
    """A vessel that forks into two thinner ones, and so on."""
    person.segment(tissue, radius, start, start + step)
    if radius < 1.2:
        return
    length = np.linalg.norm(step)
    for _ in range(2):
        fork = step + person.near((0, 0, 0), by=0.6 * float(length))
        fork *= 0.87 * length / np.linalg.norm(fork)
        _paint_tree(person, tissue, start + step, fork, radius * 0.76)


def _paint_wall(person: _Person, fat_mm: float) -> None:
    """Muscle, fat, skin and the room around, over whatever bulged into them."""
    wall = _to_wall(person.xyz)
    for tissue, start in (("soft", -14.0), ("fat", 0.0), ("soft", fat_mm - 3), ("air", fat_mm)):
        person.paint(tissue, start - wall)


def _to_wall(xyz: Array) -> Array:
    """Distance to the outside of the muscle wall, slimmer at the waist and the shoulders."""
    x, y, z = xyz
    slim = 1 - 0.07 * np.exp(-(((z + 70) / 45) ** 2)) - 0.12 * np.clip((z - 90) / 75, 0, 1) ** 2
    u, v = (x / (_TORSO_MM[0] * slim)) ** 2, (y / (_TORSO_MM[1] * slim)) ** 2
    # Between a circle's norm and a square's: a trunk has corners, but round ones
    norm: Array = 0.55 * np.sqrt(u + v) + 0.45 * np.sqrt(np.sqrt(u * u + v * v))
    return (norm - 1) * np.float32(105)  # 105 mm: between the half-axes of the wall


def _paint_ribs(person: _Person) -> None:
    box = person.box(np.array((-150, -110, -60)), np.array((150, 110, 170)))
    x, y, z = person.xyz[:, *box]
    inwards = np.abs(_to_wall(person.xyz[:, *box]) + 7)  # from the middle of the wall
    slope = np.mod(z + 0.4 * y, 27) - 13.5  # a rib every 27 mm, lower in front
    ribs = np.maximum(np.hypot(inwards, 0.7 * slope) - 4.5, np.maximum(y, 0) - 40 - z)
    ribs = np.maximum(ribs, np.where(y > 0, 30 - np.abs(x), -9))  # cartilage beside the sternum
    sternum = np.maximum(np.maximum(np.abs(x) - 17, inwards - 5), np.maximum(10 - z, -y))
    person.paint("rib", np.minimum(ribs, sternum), box)


def _paint_spine(person: _Person) -> None:
    box = person.box(np.array((-48, -110, -170)), np.array((48, -15, 170)))
    x, y, z = person.xyz[:, *box]
    shift, pitch = person.rng.uniform((0, 27), (30, 32)).tolist()
    y = y + 50 - 6 * np.sin((z + shift) / 55)  # from the axis of the column, which sways
    height = np.abs(np.mod(z + shift, pitch) - pitch / 2)  # from the middle of a vertebra
    column = (np.sqrt((x / 22) ** 2 + (y / 17) ** 2) - 1) * 18
    body = np.maximum(column, height - (pitch / 2 - 3.5))
    canal = np.sqrt(x * x + (y + 26) ** 2)
    spinous = np.maximum(np.abs(x) - 3.5, np.abs(y + 40) - 12)
    transverse = np.maximum(np.abs(x) - 38, np.abs(y + 27 + 0.15 * np.abs(x)) - 4)
    arch = np.maximum(np.minimum(canal - 13, np.minimum(spinous, transverse)), height - 8)
    person.paint("soft", np.sqrt((0.5 * (np.abs(x) - 26)) ** 2 + (y + 30) ** 2) - 13, box)
    person.paint("disc", column, box)
    person.paint("bone", np.minimum(body, arch), box)
    person.paint("marrow", np.minimum(body, arch) + 3, box)
    person.paint("soft", canal - 9, box)  # the cord


def _scan(hu: Array, rng: np.random.Generator) -> NDArray[np.int16]:
    """Add shading, a scanner's noise smooth from voxel to voxel, and its circular field of view."""
    noise = rng.standard_normal(hu.shape, np.float32)
    for axis in (0, 1):
        noise += 0.5 * (np.roll(noise, 1, axis) + np.roll(noise, -1, axis))
    sigma_hu = rng.uniform(3, 6) / 1.5  # the two smoothings raise sigma by 1.5
    shaded = hu + _shading(hu.shape, rng) * (hu > _SHADED_HU)
    image = np.rint(shaded + sigma_hu * noise).clip(_FLOOR_HU).astype(np.int16)
    x, y = (np.arange(n) - (n - 1) / 2 for n in hu.shape[:2])
    image[np.hypot(x[:, None], y) > max(hu.shape[:2]) / 2] = _FLOOR_HU
    return image


def _shading(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Slow waves of some HU, as scatter and uneven contrast leave: no tissue is quite flat."""
    field = np.zeros(shape, np.float32)
    for axis, side in enumerate(shape):
        turns, phase = rng.uniform(1.5, 3.5), rng.uniform(0, 2 * np.pi)
        wave = np.sin(2 * np.pi * turns * np.arange(side, dtype=np.float32) / side + phase)
        field += _SHADING_HU * wave.reshape([-1 if a == axis else 1 for a in range(3)])
    return field


def _to_file_axes(person: _Person, spacing: NDArray[np.float64], number: int) -> Scan:
    """Turn RAS arrays to the person's orientation; every fourth person lies some degrees askew."""
    rng, image, labels = person.rng, _scan(person.hu, person.rng), person.labels
    degrees = rng.choice((-1, 1), 3) * rng.uniform(1, 4, 3) * (number % 4 == 3)
    matrix = euler2mat(*np.deg2rad(degrees)) * spacing
    middle = rng.uniform(-30, 30, 3) - matrix @ (np.array(image.shape) - 1) / 2
    wanted = orientations.axcodes2ornt(ORIENTATIONS[number % len(ORIENTATIONS)])
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), wanted)
    affine = from_matvec(matrix, middle) @ orientations.inv_ornt_aff(turn, image.shape)
    image, labels = (orientations.apply_orientation(a, turn) for a in (image, labels))
    return np.ascontiguousarray(image), np.ascontiguousarray(labels), affine


def _save(path: Path, voxels: NDArray[np.generic], affine: NDArray[np.float64]) -> None:
    file = nib.Nifti1Image(voxels, affine)
    file.set_sform(affine, code="scanner")
    file.set_qform(affine, code="scanner")
    nib.save(file, path)
