"""Crop making without Ray: voxels against slicing, spacing, padding, partial labels, faults."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from glmae_ray.config_finetune import FinetuneConfig
from glmae_ray.config_loading import load
from glmae_ray.crops import CropMaker, crop_maker
from glmae_ray.labelled import choose_cases
from glmae_ray.reading import UnreadableCaseError, fault_texts
from glmae_ray.store.index import VolumeIndex
from glmae_ray.store.layout import pyramid_factors
from glmae_ray.store.statistics import label_counts
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.volume import Volume
from tests.store.test_index import record

SHAPE, SPACING = (26, 44, 50), (2.0, 1.0, 1.0)
NAMES = {"background": 0, "liver": 2, "spleen": 5, "kidney": 300}
OUTPUTS = {2: 1, 5: 2, 300: 3}
PLAIN = ["augment.flips=0", "augment.rotate90=0", "augment.shift_chance=0"]


def person(seed: int, *, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A ramp along every axis with a liver and a spleen, and a kidney in every third."""
    z, y, x = np.meshgrid(*(np.arange(side) for side in SHAPE), indexing="ij")
    ramp = -300 + 10 * z + 4 * y + 2 * x + seed
    label = np.zeros(SHAPE, np.int16)
    label[4:20, 8:30, 6 + seed : 30 + seed] = 2
    label[18:24, 30:40, 20:34] = 5
    if seed % 3 == 0:
        label[1:3, 1:4, 40:47] = 300
    image = np.stack([ramp, 2 * ramp][:channels]).astype(np.int16)
    return image, label


def write_store(path: Path, *, cases: int = 6, channels: int = 1, **change) -> Path:
    """Cases p0, p1, ... to train on and v to hold out."""
    store, rows = VolumeStore.create(path, chunk=(16, 16, 16)), []
    factors = pyramid_factors(SHAPE, SPACING, 3)
    for seed in range(cases + 1):
        name, split = (f"p{seed}", "train") if seed < cases else ("v", "val")
        image, label = person(seed, channels=channels)
        volume = Volume(image, np.diag([*SPACING, 1.0])[[2, 1, 0, 3]], "CT", name)
        store.write(volume, labels={"structures": label}, label_names=NAMES, record={})
        there = label_counts(label)
        row = {
            "split": split,
            "channels": channels,
            "shape": [*SHAPE],
            "spacing": [*SPACING],
            "factors": [list(level) for level in factors],
            "box_start": [0, 0, 0],
            "box_stop": [*SHAPE],
            "minimum": [float(channel.min()) for channel in image],
            "structures": {name: there[value] for name, value in NAMES.items() if value in there},
            "annotated": ["liver", "spleen", "kidney"],
            "options": {"label_names": json.dumps(NAMES)},
        }
        rows.append(record(name, **{**row, **change}))
    VolumeIndex.from_records(rows).write(path)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("crops") / "store")


def config(store: Path, *words: str) -> FinetuneConfig:
    given = [
        "run=r",
        "init=e",
        "steps=9",
        "global_batch=1",
        "crops.size=[8,14,20]",
        "crops.count=3",
    ]
    return load(FinetuneConfig, [f"store={store}", *given, *words])


def maker_of(store: Path, *words: str, split: str = "train", threads: int = 1) -> CropMaker:
    cfg = config(store, *words)
    return crop_maker(cfg, choose_cases(cfg), split=split, threads=threads)


def made(maker: CropMaker, *numbers: int) -> dict[str, np.ndarray]:
    return maker.make({"number": np.array(numbers)})


def boxes_of(maker: CropMaker, number: int) -> np.ndarray:
    case = maker.plan.case(number)
    return maker.plan.draw(number, maker.points(maker.source(case))).boxes


def outputs(label: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda value: OUTPUTS.get(value, 0))(label)


def test_the_columns_have_the_shapes_and_types_that_the_module_takes(tmp_path):
    maker = maker_of(write_store(tmp_path / "s", channels=2, cases=3))
    columns = made(maker, 0, 1)
    shapes = {name: (column.shape, column.dtype) for name, column in columns.items()}
    assert shapes == {
        "number": ((2,), np.int64),
        "case": ((2,), np.int64),
        "fault": ((2, 320), np.uint8),
        "made_s": ((2, 3), np.float64),
        "image": ((2, 3, 2, 8, 14, 20), np.float32),
        "label": ((2, 3, 8, 14, 20), np.uint8),
        "known": ((2, 3, 4), np.bool_),
    }
    assert columns["known"].all()
    assert columns["label"].max() <= 3
    assert columns["case"].tolist() == [maker.plan.case(0), maker.plan.case(1)]
    assert list(fault_texts(columns["fault"])) == ["", ""]


def test_without_a_spacing_a_crop_is_what_slicing_gives(store):
    maker = maker_of(store, *PLAIN)
    seen = set()
    for number in range(12):
        columns, case = made(maker, number), maker.plan.case(number)
        image, label = person(int(maker.index.case_ids()[case][1:]))
        window = ((image - -175.0) / 425).clip(0, 1)
        for crop, box in enumerate(boxes_of(maker, number).astype(int)):
            cut = tuple(slice(low, high) for low, high in box.T)
            np.testing.assert_allclose(columns["image"][0, crop], window[:, *cut], atol=1e-6)
            np.testing.assert_array_equal(columns["label"][0, crop], outputs(label[cut]))
            seen |= {*np.unique(columns["label"][0, crop])}
    assert seen == {0, 1, 2, 3}


def test_a_crop_at_another_spacing_shows_the_same_anatomy(store):
    words = ["crops.spacing=[1.5,0.8,0.7]", "crops.size=[6,12,16]", "crops.window=[-400,600]"]
    maker = maker_of(store, *PLAIN, *words)
    for number in range(8):
        columns, case = made(maker, number), maker.plan.case(number)
        seed = int(maker.index.case_ids()[case][1:])
        _, label = person(seed)
        for crop, (start, stop) in enumerate(boxes_of(maker, number)):
            step = (stop - start) / (6, 12, 16)
            assert step * SPACING == pytest.approx((1.5, 0.8, 0.7), rel=1e-3)
            places = [start[n] + (np.arange(s) + 0.5) * step[n] for n, s in enumerate((6, 12, 16))]
            z, y, x = np.meshgrid(*(axis - 0.5 for axis in places), indexing="ij")
            ramp = (-300 + 10 * z + 4 * y + 2 * x + seed + 400) / 1000
            inner = (slice(1, -1),) * 3  # a triangle that the scan's edge cuts off is lopsided
            np.testing.assert_allclose(columns["image"][0, crop, 0][inner], ramp[inner], atol=2e-5)
            near = label[np.ix_(*(np.floor(axis).astype(int) for axis in places))]
            np.testing.assert_array_equal(columns["label"][0, crop], outputs(near))


def test_a_coarse_crop_is_read_from_a_coarse_level_and_lies_in_the_same_place(store):
    words = ["crops.spacing=[4,4,4]", "crops.size=[4,6,8]", "crops.window=[-400,600]"]
    maker = maker_of(store, *PLAIN, *words)
    for number in range(6):
        columns = made(maker, number)
        seed = int(maker.index.case_ids()[maker.plan.case(number)][1:])
        for crop, (start, stop) in enumerate(boxes_of(maker, number)):
            sides = (4, 6, 8)
            axes = [
                a + (np.arange(s) + 0.5) * (b - a) / s - 0.5
                for a, b, s in zip(start, stop, sides, strict=True)
            ]
            z, y, x = np.meshgrid(*axes, indexing="ij")
            ramp = (-300 + 10 * z + 4 * y + 2 * x + seed + 400) / 1000
            inner = (slice(1, -1),) * 3
            np.testing.assert_allclose(columns["image"][0, crop, 0][inner], ramp[inner], atol=2e-3)


@pytest.mark.parametrize("spacing", ["null", "[1,1,1]"])
def test_a_crop_larger_than_the_scan_holds_all_of_it_in_air(store, spacing):
    maker = maker_of(store, *PLAIN, "crops.size=[64,20,64]", f"crops.spacing={spacing}")
    columns = made(maker, 0)
    image, label = person(int(maker.index.case_ids()[maker.plan.case(0)][1:]))
    window = ((image - -175.0) / 425).clip(0, 1)
    for crop, (start, stop) in enumerate(boxes_of(maker, 0)):
        assert start[0] < 0 < SHAPE[0] < stop[0]
        centres = start[0] + (np.arange(64) + 0.5) * (stop[0] - start[0]) / 64
        outside = (centres < 0) | (centres > SHAPE[0])
        assert outside.any()
        assert (columns["image"][0, crop][:, outside] == 0).all()
        assert (columns["label"][0, crop][outside] == 0).all()
        first_x, first_y = -int(start[2]), int(start[1])
        inside = columns["label"][0, crop][~outside][..., first_x : first_x + SHAPE[2]]
        rows = slice(first_y, first_y + 20)
        near = np.floor(centres[~outside]).astype(int)
        np.testing.assert_array_equal(inside, outputs(label[near][:, rows]))
        if spacing == "null":
            found = columns["image"][0, crop][:, ~outside][..., first_x : first_x + SHAPE[2]]
            np.testing.assert_allclose(found, window[:, :, rows], atol=1e-6)


def test_air_is_the_lowest_intensity_where_nothing_is_cut_off(store):
    maker = maker_of(store, *PLAIN, "crops.size=[30,20,20]", "crops.intensity=zscore")
    image = made(maker, 0)["image"]
    assert image.min() == pytest.approx(image[0, 0, 0, 0, 0, 0])
    assert image[0, 0, 0, 0].max() == image.min() < 0


def test_the_stated_share_of_crops_shows_a_structure_in_its_middle(store):
    maker = maker_of(store, *PLAIN, "crops.count=4", "crops.size=[3,3,3]")
    middle = made(maker, *range(60))["label"][:, :, 1, 1, 1]
    assert 0.5 <= (middle > 0).mean() < 0.85
    kidneys = (middle == 3).sum() / (middle > 0).sum()
    assert kidneys > 0.05  # in a third of the cases, with a hundredth of the voxels


def test_what_nobody_looked_for_is_unknown_and_then_background_is(tmp_path):
    path = write_store(tmp_path / "s", cases=1, annotated=["spleen"])
    maker = maker_of(path, "structures=[spleen,kidney,liver]")
    assert made(maker, 0)["known"][0].tolist() == [[True, True, True, True]] * 3
    rows = VolumeIndex.read(path).records()
    for row in rows:
        row["structures"].pop("kidney", None)
    rows.append({**rows[0], "case_id": "q", "structures": {"kidney": 4}})
    VolumeIndex.from_records(rows).write(path)
    known = maker_of(path, "structures=[spleen,kidney,liver]").known(0)
    assert known.tolist() == [False, True, False, True]


def test_held_out_crops_are_others_and_are_not_augmented(store):
    maker = maker_of(store, "augment.shift_chance=1", split="val")
    assert maker.index.case_ids() == ["v"]
    columns = made(maker, 0, 1)
    assert columns["image"].max() <= 1  # clipped, and not shifted beyond
    assert (columns["image"][0] != columns["image"][1]).any()
    same = maker_of(store, "val_where=split == 'train'", split="val")
    assert (
        same.plan.draw(0, [], case=0).boxes != maker_of(store).plan.draw(0, [], case=0).boxes
    ).any()


def test_samples_are_the_same_alone_in_company_on_threads_and_when_the_maker_has_travelled(store):
    maker = maker_of(store, "augment.flips=0.5")
    together = made(maker, *range(8))
    travelled = pickle.loads(pickle.dumps(maker_of(store, "augment.flips=0.5", threads=3)))
    for other in (made(travelled, *range(8)), *([made(maker, n) for n in range(8)],)):
        parts = other if isinstance(other, list) else [other]
        for name in ("image", "label", "known", "case"):
            np.testing.assert_array_equal(
                np.concatenate([part[name] for part in parts]), together[name]
            )


def test_classification_has_a_target_for_every_crop(store, tmp_path):
    table = tmp_path / "classes.csv"
    table.write_text(
        "case_id,class\n" + "".join(f"p{n},{'ab'[n % 2]}\n" for n in range(6)) + "v,a\n"
    )
    maker = maker_of(store, "task=classification", "head.kind=mlp", f"targets={table}")
    columns = made(maker, *range(6))
    assert "label" not in columns
    assert columns["target"].shape == (6, 3)
    for case, targets in zip(columns["case"], columns["target"], strict=True):
        assert {*targets} == {int(maker.index.case_ids()[case][1:]) % 2}
    assert maker.source(0).case_id == "p0"


def test_another_case_stands_in_for_one_whose_labels_cannot_be_read(store, tmp_path):
    copy = tmp_path / "damaged"
    shutil.copytree(store, copy)
    shutil.rmtree(copy / "cases/p2/labels/structures/0")
    with pytest.raises(UnreadableCaseError, match=r"case p2: .*on_error=skip"):
        made(maker_of(copy, "where=case_id == 'p2'"), 0)
    maker = maker_of(copy, "pipeline.on_error=skip")
    columns = made(maker, *range(6))
    used = [maker.source(case).case_id for case in columns["case"]]
    faults = list(fault_texts(columns["fault"]))
    assert "p2" not in used
    assert sum(map(bool, faults)) == 1
    assert "case p2: " in "".join(faults)
