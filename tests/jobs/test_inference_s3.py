"""`glmae evaluate` and `predict` between buckets, as a user would run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from glmae_ray.cli import main
from glmae_ray.paths import read_file, to_place
from tests.jobs.segmenters import write_segmenter
from tests.store.scans import write_nifti
from tests.test_crops import write_store

pytestmark = pytest.mark.ray


def glmae(ray: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "glmae_ray.cli", *words]
    env = os.environ | {"RAY_ADDRESS": ray}
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.usefixtures("cases_here")
def test_scans_of_a_bucket_are_predicted_on_into_a_bucket(bucket, local_ray, tmp_path, capsys):
    run = write_segmenter(f"{bucket}/run")
    place = to_place(f"{bucket}/scans/a.nii.gz")
    place.fs.put_file(str(write_nifti(tmp_path / "a.nii.gz", axes="PIR")), place.path)
    words = [f"run={run}", f"source={bucket}/scans", f"out={bucket}/out", "probabilities=true"]
    first = glmae(local_ray, "predict", *words)
    assert first.stdout.splitlines()[-1] == "predicted 1, already there 0, refused 0", first.stderr
    here = [f"run={run}", f"source={tmp_path / 'a.nii.gz'}", f"out={tmp_path / 'out'}"]
    assert main(["predict", *here]) == 0
    there = read_file(to_place(f"{bucket}/out/a.nii.gz"))
    assert there == (tmp_path / "out" / "a.nii.gz").read_bytes()
    assert read_file(to_place(f"{bucket}/out/probabilities/a/1_liver.nii.gz"))
    capsys.readouterr()
    assert main(["predict", *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "predicted 0, already there 1, refused 0"


def test_a_run_in_a_bucket_gets_its_evaluation_there(bucket, local_ray, tmp_path):
    store = write_store(tmp_path / "store", cases=2)
    run = write_segmenter(f"{bucket}/run", names=("liver", "spleen"))
    words = [f"run={run}", f"store={store}", "split=train", "weights=[last]"]
    done = glmae(local_ray, "evaluate", *words)
    assert done.returncode == 0, done.stderr
    report = json.loads(read_file(to_place(f"{bucket}/run/evaluation.json")))
    assert sorted(report["cases"]) == ["p0", "p1"]
    assert read_file(to_place(f"{bucket}/run/pictures/evaluation_best.png"))
