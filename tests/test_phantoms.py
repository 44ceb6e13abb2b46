"""What a phantom cohort promises: reproducible, upright people in an nnU-Net v2 data set."""

import json
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from glmae_ray.phantoms import LABELS, Scan, make_person, write_cohort

EXPECTED_HU = {
    "lungs": (-900, -780),
    "spine": (200, 500),
    "liver": (95, 125),
    "kidneys": (130, 185),
    "vessels": (165, 210),
}
ONE_OF_EACH_ORIENTATION = range(6)


@cache
def person(number: int) -> Scan:
    """One of the default cohort, drawn once for all tests."""
    return make_person(number)


def upright(number: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Image (HU) and labels of a person, both turned to (right, anterior, superior)."""
    image, labels, affine = person(number)
    turned = (nib.as_closest_canonical(nib.Nifti1Image(a, affine)) for a in (image, labels))
    first, second = (np.asarray(scan.dataobj) for scan in turned)
    return first, second


def centre(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean voxel index along each axis."""
    return np.argwhere(mask).mean(axis=0)


def test_the_same_seed_and_number_give_the_same_voxels() -> None:
    first, second = make_person(7, seed=3), make_person(7, seed=3)
    assert first[0].tobytes() == second[0].tobytes()
    assert first[1].tobytes() == second[1].tobytes()
    assert first[2].tobytes() == second[2].tobytes()


@pytest.mark.parametrize(("number", "seed"), [(8, 3), (7, 4)])
def test_another_number_or_seed_gives_another_person(number: int, seed: int) -> None:
    # Voxels alone could differ by noise only; the labels show that the anatomy differs.
    _, labels, _ = make_person(7, seed=3)
    _, others, _ = make_person(number, seed=seed)
    assert np.bincount(labels.ravel()).tolist() != np.bincount(others.ravel()).tolist()


def test_a_cohort_is_laid_out_as_nnunet_expects(tmp_path: Path) -> None:
    folder = write_cohort(tmp_path / "Dataset900_Phantoms", people=2, seed=5)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    assert files == [
        "dataset.json",
        "imagesTr/phantom_000_0000.nii.gz",
        "imagesTr/phantom_001_0000.nii.gz",
        "labelsTr/phantom_000.nii.gz",
        "labelsTr/phantom_001.nii.gz",
    ]
    description = json.loads((folder / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "CT"}
    assert description["labels"] == LABELS
    assert list(LABELS.values()) == list(range(6))
    assert description["numTraining"] == 2
    assert description["file_ending"] == ".nii.gz"


def test_files_hold_the_person_unchanged_on_one_grid(tmp_path: Path) -> None:
    number = 3  # an oblique person: there a lost or approximate affine shows
    write_cohort(tmp_path, people=number + 1, seed=5)
    image, labels, affine = make_person(number, seed=5)
    for name, voxels in (("imagesTr/phantom_003_0000", image), ("labelsTr/phantom_003", labels)):
        file = nib.load(tmp_path / f"{name}.nii.gz")
        assert file.get_data_dtype() == voxels.dtype
        np.testing.assert_array_equal(np.asarray(file.dataobj), voxels)
        for stored, code in (file.get_sform(coded=True), file.get_qform(coded=True)):
            assert code > 0
            np.testing.assert_allclose(stored, affine, atol=1e-3)  # mm; the header is float32


def test_a_cohort_of_nobody_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="people is 0"):
        write_cohort(tmp_path, people=0)


@pytest.mark.parametrize("number", ONE_OF_EACH_ORIENTATION)
def test_every_structure_is_there_with_the_hu_of_its_tissue(number: int) -> None:
    image, labels, _ = person(number)
    assert image.dtype == np.int16
    assert labels.dtype == np.uint8
    assert image.shape == labels.shape
    assert image.min() == -1024
    assert np.unique(labels).tolist() == sorted(LABELS.values())
    for name, (low, high) in EXPECTED_HU.items():
        structure = image[labels == LABELS[name]]
        assert structure.size > 2000, name
        assert low < np.median(structure) < high, name


@pytest.mark.parametrize("number", ONE_OF_EACH_ORIENTATION)
def test_anatomy_is_upright_in_patient_space(number: int) -> None:
    image, labels = upright(number)
    lungs, spine, liver, kidneys, vessels = (centre(labels == value) for value in range(1, 6))
    body = centre(image > -300)
    assert lungs[2] > liver[2] > kidneys[2]
    assert liver[0] > body[0] + 10
    assert spine[1] < body[1] - 10
    assert spine[1] < vessels[1] < liver[1]


@pytest.mark.parametrize("number", ONE_OF_EACH_ORIENTATION)
def test_the_heart_lies_between_the_lungs_in_front_of_the_spine(number: int) -> None:
    image, labels = upright(number)
    left, right = np.sort(np.argwhere(labels == LABELS["lungs"])[:, 0])[[0, -1]]
    height = int(centre(labels == LABELS["lungs"])[2])
    chest = (image[:, :, height] > 90) & (image[:, :, height] < 220)
    chest &= labels[:, :, height] == LABELS["background"]
    heart = np.argwhere(chest)
    heart = heart[(heart[:, 0] > left + 20) & (heart[:, 0] < right - 20)].mean(axis=0)
    assert heart[1] > centre(labels == LABELS["spine"])[1] + 15


def test_the_spine_repeats_along_the_body() -> None:
    image, labels = upright(1)
    spine = np.where(labels == LABELS["spine"], image, 0).sum(axis=(0, 1)).astype(float)
    waves = np.abs(np.fft.rfft(spine - spine.mean()))
    assert 8 <= waves.argmax() <= 14  # vertebrae in view


def test_twelve_people_come_in_many_orientations_and_some_oblique() -> None:
    affines = [person(number)[2] for number in range(12)]
    assert len({nib.aff2axcodes(affine) for affine in affines}) >= 4
    degrees = np.rad2deg([nib.affines.obliquity(affine).max() for affine in affines])
    oblique = degrees > 1e-6
    assert oblique.sum() == 3
    assert np.all((degrees[oblique] > 1) & (degrees[oblique] < 9))


@pytest.mark.parametrize("number", range(12))
def test_sides_are_unequal_and_spacing_is_anisotropic(number: int) -> None:
    image, _, affine = person(number)
    assert len(set(image.shape)) == 3
    spacing = np.sort(nib.affines.voxel_sizes(affine))
    assert 2.0 <= spacing[0] <= spacing[1] <= 2.5
    assert 2.8 <= spacing[2] <= 4.0
