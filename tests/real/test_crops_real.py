"""Crops of real label maps: partial ones, small structures, scans smaller than a crop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from glmae_ray.config_finetune import FinetuneConfig
from glmae_ray.config_loading import load, shipped
from glmae_ray.crops import CropMaker, crop_maker
from glmae_ray.labelled import Labelled, choose_cases
from glmae_ray.store.index import VolumeIndex
from glmae_ray.store.intake import Choices, take_in
from glmae_ray.store.ledger import Ledger
from glmae_ray.store.sources import discover
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.volume import to_canonical

pytestmark = pytest.mark.real

PLAIN = ["augment.affine_chance=0", "augment.shift_chance=0", "augment.flips=0"]


def ingested(source: Path, folder: Path, *, most: int) -> Path:
    """A store of the first cases of a data set, every fourth held out; without Ray."""
    store = VolumeStore.create(folder / "store")
    sources = discover(str(source), read_headers=lambda places: [None] * len(places))
    pending = Ledger(store, sources, splits=(1.0, 0.0, 0.0), choices=Choices()).pending[:most]
    rows = [
        take_in(replace(one, split="train" if n % 4 else "val"), store=store, choices=Choices())
        for n, one in enumerate(pending)
    ]
    VolumeIndex.from_records([taken.record for taken in rows]).write(folder / "store")
    return folder / "store"


def made_from(store: Path, config: str, *words: str) -> tuple[Labelled, CropMaker]:
    given = [f"store={store}", "run=r", "init=none", *PLAIN, *words]
    cfg = load(FinetuneConfig, [str(shipped(f"finetune/{config}.yaml")), *given])
    labelled = choose_cases(cfg)
    return labelled, crop_maker(cfg, labelled, split="train")


def test_crops_of_partial_labels_know_what_was_looked_for(real_data: Path, tmp_path):
    source = real_data / "headneck_ct"
    stated = json.loads((source / "cases.json").read_text())
    labelled, maker = made_from(ingested(source, tmp_path, most=16), "headneck")
    assert len(labelled.structures) == 7
    shown = np.zeros(8, int)
    for number in range(3 * len(maker.index)):
        columns = maker.make({"number": np.array([number])})
        case = maker.source(int(columns["case"][0])).case_id
        looked_for = [name in stated[case]["structures"] for name in labelled.structures]
        assert columns["known"][0, 0].tolist() == [all(looked_for), *looked_for]
        image = nib.load(source / f"labelsTr/{case}.nii.gz")
        whole = to_canonical(np.asanyarray(image.dataobj), image.affine)
        draw = maker.plan.draw(number, maker.points(maker.source(int(columns["case"][0]))))
        for label, (start, stop) in zip(columns["label"][0], draw.boxes.astype(int), strict=True):
            cut = tuple(slice(low, high) for low, high in zip(start, stop, strict=True))
            np.testing.assert_array_equal(label, whole[cut])
            shown[np.unique(label)] += 1
    assert shown.min() >= 4  # the smallest have 100 voxels of 2 million


def test_a_scan_smaller_than_a_crop_is_whole_inside_of_it(real_data: Path, tmp_path):
    store = ingested(real_data / "hippocampus_mr", tmp_path, most=8)
    labelled, maker = made_from(store, "hippocampus_cpu", "crops.size=[40,56,40]")
    assert any("padded with air" in note for note in labelled.notes)
    for number in range(len(maker.index)):
        columns = maker.make({"number": np.array([number])})
        row = maker.index.at(int(columns["case"][0]))
        if all(side <= most for side, most in zip(row["shape"], (40, 56, 40), strict=True)):
            counts = np.bincount(columns["label"].ravel(), minlength=3)[1:]
            assert counts.tolist() == [row["structures"][name] for name in labelled.structures]
        ends = columns["image"].min(), columns["image"].max()
        assert ends == pytest.approx((0, 1), abs=1e-6)
