"""`glmae predict` through its door: folders, stores, buckets, going on, refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from glmae_ray.cli import main
from glmae_ray.store.index import VolumeIndex
from tests.jobs.segmenters import write_classifier, write_segmenter
from tests.store.scans import voxels, write_nifti

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return write_segmenter(tmp_path_factory.mktemp("run"))


@pytest.fixture
def scans(tmp_path) -> Path:
    """Two scans that fit, one of them small; one of several volumes, and one cut short."""
    folder = tmp_path / "scans"
    write_nifti(folder / "a.nii.gz", axes="PIR")
    write_nifti(folder / "b.nii", voxels((9, 14, 6), seed=1), axes="RAS")
    write_nifti(folder / "four.nii.gz", np.stack([voxels(), voxels(seed=2)], axis=-1))
    whole = write_nifti(folder / "short.nii.gz", voxels(seed=3)).read_bytes()
    (folder / "short.nii.gz").write_bytes(whole[: len(whole) // 2])
    return folder


def predict(run, out, *words: str) -> int:
    return main(["predict", f"run={run}", f"out={out}", *words])


def last_line(capsys) -> str:
    return capsys.readouterr().out.splitlines()[-1]


def test_a_folder_is_predicted_on_and_what_does_not_fit_is_refused(run, scans, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(run, out, f"source={scans}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "predicted 2, already there 0, refused 2"
    assert "modality: 4 scans do not say theirs and are taken for CT" in lines
    for name, axes in (("a", "PIR"), ("b", "RAS")):
        found = nib.load(out / f"{name}.nii.gz")
        assert nib.aff2axcodes(found.affine) == tuple(axes)
    record = json.loads((out / "a.json").read_text())
    assert record["source"] == str(scans / "a.nii.gz")
    labels = np.asarray(nib.load(out / "a.nii.gz").dataobj)
    for name, value in (("liver", 1), ("left kidney", 2)):
        facts = record["structures"][name]
        assert facts["value"] == value
        assert facts["ml"] == pytest.approx(
            (labels == value).sum() * 0.9 * 1.1 * 3 / 1000, abs=1e-3
        )
    refused = {
        r["source"]: r["reason"]
        for r in csv.DictReader((out / "refused.csv").read_text().splitlines())
    }
    assert set(refused) == {str(scans / "four.nii.gz"), str(scans / "short.nii.gz")}
    assert "holds 2 volumes" in refused[str(scans / "four.nii.gz")]


@pytest.mark.usefixtures("cases_here")
def test_the_same_command_does_what_is_missing_or_has_changed(run, scans, tmp_path, capsys):
    words = [run, tmp_path / "out", f"source={scans}"]
    assert predict(*words) == 0
    before = (tmp_path / "out" / "b.nii.gz").read_bytes()
    assert predict(*words) == 0
    assert last_line(capsys) == "predicted 0, already there 2, refused 2"
    (tmp_path / "out" / "b.json").unlink()  # as after a kill: the record comes last
    write_nifti(scans / "a.nii.gz", voxels(seed=5), axes="PIR")
    assert predict(*words) == 0
    assert last_line(capsys) == "predicted 2, already there 0, refused 2"
    assert (tmp_path / "out" / "b.nii.gz").read_bytes() == before


def test_predictions_of_another_network_are_not_written_over(run, scans, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    other = {"segmenter": "0" * 64, "run": "runs/old", "weights": "best", "step": 70}
    record = tmp_path / "out" / "a.json"
    record.write_text(json.dumps({"case": "a", "made_by": other}))
    before = record.read_text()
    assert predict(run, tmp_path / "out", f"source={scans}") == 2
    error = capsys.readouterr().err
    assert "has predictions of another network (runs/old, best weights, step 70)" in error
    assert record.read_text() == before


@pytest.mark.parametrize("place", [".", "out"])
def test_out_among_the_scans_is_refused_before_anything_is_written(run, scans, capsys, place):
    assert predict(run, scans / place, f"source={scans}") == 2
    assert "is among the scans of" in capsys.readouterr().err
    assert {file.name for file in scans.iterdir()} == {
        "a.nii.gz", "b.nii", "four.nii.gz", "short.nii.gz"
    }  # fmt: skip


@pytest.mark.usefixtures("cases_here")
def test_modality_and_channels_have_to_be_those_of_the_run(tmp_path, capsys):
    run = write_segmenter(tmp_path / "run", "model.channels=2", modality=("CT", "MR"))
    write_nifti(tmp_path / "scans" / "a.nii.gz")
    words = [run, tmp_path / "out", f"source={tmp_path / 'scans'}"]
    assert predict(*words) == 2
    assert "a.nii.gz: has 1 channels, and the run takes 2" in capsys.readouterr().out
    write_segmenter(run, modality=("CT", "MR"))
    assert predict(*words) == 2
    assert "does not say its modality, and the run knows CT, MR" in capsys.readouterr().out
    assert predict(*words, "modality=PT") == 2
    assert "is PT, and the run was trained on CT, MR" in capsys.readouterr().out
    assert predict(*words, "modality=MR") == 0
    assert json.loads((tmp_path / "out" / "a.json").read_text())["modality"] == "MR"


@pytest.mark.slow
def test_cases_of_a_store_get_label_maps_on_the_grid_of_their_files(
    run, small_store, tmp_path, capsys
):
    words = [run, tmp_path / "out", f"store={small_store}"]
    assert predict(*words, "where=split == 'val'") == 0
    rows = VolumeIndex.read(small_store).select(split="val").records()
    assert last_line(capsys) == f"predicted {len(rows)}, already there 0, refused 0"
    # What is predicted on the files is the same.
    lines = [f"{row['case_id']},{row['source']}" for row in rows]
    (tmp_path / "files.csv").write_text("\n".join(["case_id,image", *lines]))
    assert predict(run, tmp_path / "files", f"source={tmp_path / 'files.csv'}") == 0
    for row in rows:
        name = f"{row['case_id']}.nii.gz"
        found, again = (nib.load(tmp_path / folder / name) for folder in ("out", "files"))
        source = nib.load(row["source"])
        assert found.shape == source.shape
        np.testing.assert_allclose(found.affine, source.affine)
        np.testing.assert_array_equal(found.dataobj, again.dataobj)


@pytest.mark.usefixtures("cases_here")
def test_a_case_that_ingest_resampled_is_its_own_grid_and_told(run, tmp_path, capsys):
    source = write_nifti(tmp_path / "scans" / "a.nii.gz", axes="PIR")
    store = tmp_path / "store"
    words = [f"source={source}", f"store={store}", "spacing_mm=[2,2,2]"]
    assert main(["ingest", *words]) == 0
    assert predict(run, tmp_path / "out", f"store={store}") == 0
    assert "1 cases are in the store's grid, not their file's (a)" in capsys.readouterr().out
    found = nib.load(tmp_path / "out" / "a.nii.gz")
    np.testing.assert_allclose(found.header.get_zooms(), (2, 2, 2), rtol=1e-5)
    before = nib.load(source)
    # Both cover the same space: their middles are one point.
    middles = [i.affine @ [*((np.array(i.shape) - 1) / 2), 1] for i in (found, before)]
    np.testing.assert_allclose(*middles, atol=1.0)


@pytest.mark.usefixtures("cases_here")
def test_a_classifier_leaves_a_table(scans, tmp_path, capsys):
    run = write_classifier(tmp_path / "run")
    assert predict(run, tmp_path / "out", f"source={scans}") == 0
    rows = list(csv.DictReader((tmp_path / "out" / "classes.csv").read_text().splitlines()))
    assert [row["case_id"] for row in rows] == ["a", "b"]
    for row in rows:
        shares = {name: float(row[name]) for name in ("ill", "well")}
        assert sum(shares.values()) == pytest.approx(1)
        assert row["class"] == max(shares, key=shares.get)
    assert not list((tmp_path / "out").glob("*.nii.gz"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["source=nowhere"], "source: nowhere does not exist"),
        ([], "source: give one of source=FILES and store=STORE"),
        (["source=nowhere", "where=split == 'val'"], "where: has no effect without store=STORE"),
        (["source=nowhere", "weights=best"], "has no segmenter_best.safetensors"),
    ],
)
def test_what_cannot_be_predicted_on_is_one_line(run, tmp_path, capsys, words, line):
    assert predict(run, tmp_path / "out", *words) == 2
    assert line in capsys.readouterr().err
