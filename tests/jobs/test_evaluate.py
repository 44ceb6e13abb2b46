"""`glmae evaluate` through its door: figures against plain NumPy, faults, files, refusals."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glmae_ray.cli import main
from glmae_ray.jobs.segmenting import Segmenter
from glmae_ray.store.index import VolumeIndex
from glmae_ray.store.zarr_store import VolumeStore
from tests.jobs.segmenters import write_classifier, write_segmenter
from tests.test_crops import SHAPE, SPACING, write_store

# `evaluated` goes through Ray's actors.
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray", "cases_here")]

STRUCTURES = ("liver", "spleen", "kidney")
VALUES = {"liver": 2, "spleen": 5, "kidney": 300}  # in the label maps of the store
WORDS = ["where=split == 'train'", "bootstrap=20"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("evaluate") / "store", cases=4)


def write_run(folder: Path) -> Path:
    for weights, seed in (("last", 0), ("best", 1)):
        write_segmenter(folder, names=STRUCTURES, weights=weights, seed=seed)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture(scope="module")
def evaluated(store, tmp_path_factory) -> Path:
    """A run with the evaluation of its last and best weights."""
    run = write_run(tmp_path_factory.mktemp("evaluated"))
    assert evaluate(run, store) == 0
    return run


def evaluate(run: Path, store: Path, *words: str) -> int:
    return main(["evaluate", f"run={run}", f"store={store}", *WORDS, *words])


def report_of(run: Path) -> dict:
    return json.loads((run / "evaluation.json").read_text())


def dice_of(run: Path, store: Path, case: str, name: str, *, weights) -> float:
    """Plain NumPy on what the network says of the case."""
    opened, row = VolumeStore.open(store), VolumeIndex.read(store).row(case)
    labels = Segmenter(str(run), weights).label(opened.read(case), row)
    found = labels == 1 + STRUCTURES.index(name)
    there = opened.read_label(case, "structures") == VALUES[name]
    return 2 * (found & there).sum() / (found.sum() + there.sum())


def test_figures_of_both_weights_are_those_of_plain_numpy(evaluated, store):
    report = report_of(evaluated)
    for weights, part in (("last", report), ("best", report["best"])):
        assert (part["weights"], part["step"]) == (weights, 4)
        assert sorted(part["cases"]) == ["p0", "p1", "p2", "p3"]
        for case, scores in part["cases"].items():
            for name in ("liver", "spleen"):
                expected = dice_of(evaluated, store, case, name, weights=weights)
                assert scores[name]["dice"] == pytest.approx(expected, abs=1e-6)
        liver = [scores["liver"]["dice"] for scores in part["cases"].values()]
        assert part["structures"]["liver"]["dice"] == pytest.approx(np.mean(liver))
        low, high = part["intervals"]["structures"]["liver"]["dice"]
        assert low <= np.mean(liver) <= high
    assert report["mean"] != report["best"]["mean"]


def test_what_is_in_one_map_only_has_the_diagonal_and_a_line_of_csv(evaluated):
    run = evaluated
    # p1 has no kidney; networks of random weights find some in every scan.
    diagonal = np.hypot.reduce(np.multiply(SHAPE, SPACING))
    worst = {"dice": 0.0, "nsd": 0.0, "hd95": pytest.approx(diagonal)}
    assert report_of(run)["cases"]["p1"]["kidney"] in (worst, None)
    rows = list(csv.DictReader((run / "evaluation.csv").read_text().splitlines()))
    assert len(rows) == 2 * 4 * 3
    assert {row["weights"] for row in rows} == {"last", "best"}
    row = next(
        r for r in rows if (r["weights"], r["case"], r["structure"]) == ("last", "p0", "liver")
    )
    assert float(row["dice"]) == report_of(run)["cases"]["p0"]["liver"]["dice"]


def test_pictures_show_the_worst_the_middle_and_the_best_case(evaluated):
    for name in ("worst", "median", "best"):
        with Image.open(evaluated / "pictures" / f"evaluation_{name}.png") as picture:
            assert min(picture.size) > 200


def test_a_structure_that_nobody_looked_for_in_a_case_is_not_counted_there(run, tmp_path):
    partial = write_store(tmp_path / "store", cases=2, annotated=["liver", "spleen"])
    assert evaluate(run, partial, "weights=[last]", "pictures=false") == 0
    assert not (run / "pictures").exists()
    cases = report_of(run)["cases"]
    assert cases["p1"]["kidney"] is None
    assert cases["p0"]["kidney"] is not None  # its label map has one all the same


def test_a_damaged_case_is_told_and_the_others_count(run, store, tmp_path, capsys):
    broken = tmp_path / "store"
    shutil.copytree(store, broken)
    shard = broken / "cases" / "p2" / "image" / "0" / "c.0.0.0.0"
    shard.write_bytes(shard.read_bytes()[:100])
    assert evaluate(run, broken) == 0
    report = report_of(run)
    assert sorted(report["cases"]) == ["p0", "p1", "p3"]
    assert report["faults"]["p2"].startswith("case p2: ")
    assert "not evaluated: case p2: " in capsys.readouterr().out


def test_it_is_an_error_when_no_case_can_be_evaluated(run, store, capsys):
    write_segmenter(run, names=STRUCTURES, modality=("MR",))
    write_segmenter(run, names=STRUCTURES, modality=("MR",), weights="best")
    assert evaluate(run, store) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "none of 4 cases could be evaluated; the first: case p" in line
    assert "is CT, and the run was trained on MR" in line
    assert not (run / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("where=split == 'test'", "has no case where split == 'test'"),
        ("tolerances_mm={lung: 1}", "tolerances_mm: lung: no structure of the run (liver, "),
        ("run=nowhere", "nowhere: has no segmenter.safetensors, which glmae finetune writes"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(run, store, capsys, word, line):
    assert evaluate(run, store, word, "weights=[last]") == 2
    assert line in capsys.readouterr().err


def test_weights_that_the_run_has_not_are_left_out_with_a_line(run, store, capsys):
    (run / "segmenter_best.safetensors").unlink()
    assert evaluate(run, store) == 0
    out = capsys.readouterr().out
    assert "left out: " in out
    assert "last weights, step 4" in out
    assert out.splitlines()[-1] == f"evaluated 4, failed 0: {run / 'evaluation.json'}"
    assert "best" not in report_of(run)


def test_a_classifier_is_scored_by_case(store, tmp_path, capsys):
    run = tmp_path / "run"
    write_classifier(run)
    rows = ["case_id,class", "p0,ill", "p1,well", "p2,ill", "p3,well"]
    (tmp_path / "classes.csv").write_text("\n".join(rows))
    assert evaluate(run, store, f"targets={tmp_path / 'classes.csv'}") == 0
    report = report_of(run)
    right = [one["class"] == one["predicted"] for one in report["cases"].values()]
    assert report["mean"]["accuracy"] == np.mean(right)
    assert report["classes"] == {"ill": 2, "well": 2}
    assert sum(report["cases"]["p0"]["probabilities"].values()) == pytest.approx(1)
    assert {
        r["case"] for r in csv.DictReader((run / "evaluation.csv").read_text().splitlines())
    } == {*report["cases"]}
    assert evaluate(run, store) == 2
    assert "targets: is missing" in capsys.readouterr().err
