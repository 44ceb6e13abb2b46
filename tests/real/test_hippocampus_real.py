"""From labelled scans to label maps: the small hippocampus preset on people whom it never saw."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from glmae_ray.cli import main
from glmae_ray.config_loading import shipped

pytestmark = [
    pytest.mark.real,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("local_ray"),
]

STRUCTURES = ("Anterior", "Posterior")
TESTED, HELD_OUT = 10, 4  # people; the others are trained on


@pytest.fixture(scope="module")
def images(real_data) -> dict[str, Path]:
    """Of each person, in an order that hangs on nothing about them."""
    found = (real_data / "hippocampus_mr" / "imagesTr").glob("*.nii.gz")
    named = {path.name.removesuffix("_0000.nii.gz"): path for path in found}
    return dict(sorted(named.items(), key=lambda of: hashlib.sha256(of[0].encode()).hexdigest()))


@pytest.fixture(scope="module")
def run(images, local_ray, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hippocampus")
    splits = ["test"] * TESTED + ["val"] * HELD_OUT + ["train"] * (len(images) - TESTED - HELD_OUT)
    people = [
        {
            "case_id": person,
            "image": image,
            "label": image.parents[1] / "labelsTr" / f"{person}.nii.gz",
            "subject": person,
            "split": split,
            "modality": "MR",
            "structures": "|".join(STRUCTURES),
            "label_names": "|".join(f"{name}={value}" for value, name in enumerate(STRUCTURES, 1)),
        }
        for (person, image), split in zip(images.items(), splits, strict=True)
    ]
    with (folder / "people.csv").open("w") as file:
        rows = csv.DictWriter(file, people[0])
        rows.writeheader()
        rows.writerows(people)
    store, run = f"store={folder / 'store'}", folder / "run"
    assert main(["ingest", f"source={folder / 'people.csv'}", store]) == 0
    preset = str(shipped("finetune/hippocampus_cpu.yaml"))
    words = [store, f"run={run}", "init=none", "where=split != 'test'"]
    assert main(["finetune", preset, *words]) == 0
    assert main(["evaluate", store, f"run={run}", "split=test"]) == 0
    return run


def test_both_structures_are_found_in_people_it_never_saw(run):
    found = json.loads((run / "evaluation.json").read_text())
    print(found["mean"], found["intervals"]["mean"])
    assert found["weights"] == "last"
    assert found["mean"]["dice"] >= 0.75


def turned(image: sitk.Image) -> sitk.Image:
    """The same space in voxels of 0.5 mm that lie oblique, with room around it."""
    size, spacing = np.array(image.GetSize()), np.array(image.GetSpacing())
    turn = sitk.Euler3DTransform()
    turn.SetRotation(*np.deg2rad([10, 5, -10]))
    axes = np.reshape(turn.GetMatrix(), (3, 3)) @ np.reshape(image.GetDirection(), (3, 3))
    sides = np.ceil(1.3 * size * spacing / 0.5).astype(int)
    middle = image.TransformContinuousIndexToPhysicalPoint(((size - 1) / 2).tolist())
    grid = sitk.Image(sides.tolist(), sitk.sitkFloat32)
    grid.SetSpacing([0.5] * 3)
    grid.SetDirection(axes.ravel().tolist())
    grid.SetOrigin((np.array(middle) - axes @ ((sides - 1) / 2 * 0.5)).tolist())
    return sitk.Resample(image, grid, sitk.Transform(), sitk.sitkBSpline, 0.0, sitk.sitkFloat32)


def labels_on(grid: sitk.Image, out: Path, person: str) -> NDArray[np.int64]:
    """What was predicted for a scan, linearly on another grid; background around it."""
    paths = sorted((out / "probabilities" / person).glob("*.nii.gz"))
    assert len(paths) == len(STRUCTURES)
    shares = [sitk.Resample(sitk.ReadImage(path), grid, sitk.Transform()) for path in paths]
    found = np.stack([sitk.GetArrayFromImage(share) for share in shares])
    return np.concatenate([1 - found.sum(0, keepdims=True), found]).argmax(0)


def test_an_oblique_resampled_copy_gets_the_same_anatomy(run, images, tmp_path, capsys):
    scans, copies = tmp_path / "scans", tmp_path / "copies"
    for folder in (scans, copies):
        folder.mkdir()
    people = [*images][:TESTED]
    for person in people:
        image = sitk.ReadImage(images[person])
        sitk.WriteImage(image, scans / f"{person}.nii.gz")
        sitk.WriteImage(turned(image), copies / f"{person}.nii.gz")
    for folder in (scans, copies):
        words = [f"source={folder}", f"out={folder}-out", "modality=MR", "probabilities=true"]
        assert main(["predict", f"run={run}", *words]) == 0
    told = capsys.readouterr()
    assert (told.out + told.err).count("was straightened") == TESTED
    dices = []
    for person in people:
        there = sitk.ReadImage(tmp_path / "copies-out" / f"{person}.nii.gz")
        copy, scan = sitk.GetArrayFromImage(there), labels_on(there, tmp_path / "scans-out", person)
        pairs = [(copy == value, scan == value) for value in (1, 2)]
        dices.append([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs])
    print(np.round(dices, 3), np.mean(dices, axis=0))
    assert np.mean(dices, axis=0).min() >= 0.95
