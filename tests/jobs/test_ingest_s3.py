"""`glmae ingest` and `inspect` between buckets, through the command line."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from glmae_ray.cli import main
from glmae_ray.paths import to_place
from glmae_ray.store.index import VolumeIndex, read_files
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.volume import to_source_axes
from tests.conftest import TINY
from tests.store import dicoms, scans
from tests.store.scans import write_nifti

pytestmark = pytest.mark.ray


def glmae(ray, *words):
    command = [sys.executable, "-m", "glmae_ray.cli", *words]
    env = os.environ | {"RAY_ADDRESS": ray}
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.fixture
def archive(tmp_path, bucket, monkeypatch):
    """Three scans, a series, a broken file and a text in a bucket; and here."""
    monkeypatch.setenv("GLMAE_SUBJECT_SALT", "for tests")
    for seed in range(3):
        write_nifti(tmp_path / "in" / f"p{seed}.nii.gz", scans.voxels((20, 26, 18), seed=seed))
    dicoms.write_series(tmp_path / "in" / "series", dicoms.voxels((23, 26, 17)))
    (tmp_path / "in" / "broken.nii").write_bytes(b"nothing")
    (tmp_path / "in" / "notes.txt").write_text("left alone")
    place = to_place(f"{bucket}/in")
    place.fs.put(f"{tmp_path / 'in'}/", place.path, recursive=True)
    return f"{bucket}/in"


def test_from_bucket_to_bucket_is_as_from_folder_to_folder(
    archive, bucket, local_ray, tmp_path, capsys
):
    run = glmae(local_ray, "ingest", f"source={archive}", f"store={bucket}/store")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "ingested 4, already stored 0, quarantined 1"
    assert f"{archive}/broken.nii" in run.stdout
    assert main(["ingest", f"source={tmp_path / 'in'}", f"store={tmp_path / 's'}"]) == 0

    far, near = VolumeIndex.read(f"{bucket}/store"), VolumeIndex.read(tmp_path / "s")
    assert far.fingerprint() == near.fingerprint()
    there, here = VolumeStore.open(f"{bucket}/store"), VolumeStore.open(tmp_path / "s")
    for row in far.records():
        np.testing.assert_array_equal(there.read(row["case_id"]), here.read(row["case_id"]))
        assert row["source"].startswith(archive)
    assert sorted(row["outcome"] for row in read_files(f"{bucket}/store")) == (
        ["case"] * 20 + ["not_an_image", "quarantined"]
    )
    (row,) = [r for r in far.records() if r["case_id"].startswith("dicom-")]
    voxels = to_source_axes(there.read(row["case_id"])[0], np.reshape(row["source_affine"], (4, 4)))
    np.testing.assert_array_equal(voxels, dicoms.voxels((23, 26, 17)))

    capsys.readouterr()
    assert main(["ingest", f"source={archive}", f"store={bucket}/store"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "ingested 0, already stored 4, quarantined 1"
    facts = json.loads(glmae(local_ray, "inspect", f"store={bucket}/store", "--json").stdout)
    assert facts["cases"] == 4


def test_a_glob_and_a_manifest_work_in_a_bucket(archive, bucket, local_ray):
    text = f"case_id,image\none,p1.nii.gz\ntwo,{archive}/p2.nii.gz\nthree,series\n"
    to_place(f"{archive}/cases.csv").write_text(text)
    assert main(["ingest", f"source={archive}/cases.csv", f"store={bucket}/a"]) == 0
    assert VolumeIndex.read(f"{bucket}/a").case_ids() == ["one", "three", "two"]
    assert main(["ingest", f"source={archive}/p[01].*", f"store={bucket}/b"]) == 0
    assert VolumeIndex.read(f"{bucket}/b").case_ids() == ["p0", "p1"]


def test_training_reads_its_views_from_a_bucket(archive, bucket, local_ray, tmp_path):
    words = ["store=" + f"{bucket}/store", "splits=[1,0,0]"]
    assert main(["ingest", f"source={archive}/*.nii.gz", *words]) == 0
    run = tmp_path / "run"
    assert main(["pretrain", *TINY, f"store={bucket}/store", f"run={run}", "steps=2"]) == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    assert json.loads((run / "config.json").read_text())["store"] == f"{bucket}/store"


@pytest.mark.parametrize("words", [("source=s3://no-such-bucket/x",), ("source={archive}/none",)])
def test_what_is_not_there_is_one_line(archive, bucket, local_ray, words, capsys):
    words = [word.format(archive=archive) for word in words]
    assert main(["ingest", *words, f"store={bucket}/s"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "s3://" in line
