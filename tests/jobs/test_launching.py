"""Where the driver of a run makes paths whole, and where it refuses to."""

from __future__ import annotations

import json

import pytest
import ray

from glmae_ray.errors import UserError
from glmae_ray.jobs.launching import _RAY_JOB, with_whole_paths
from glmae_ray.paths import to_place
from tests.conftest import tiny_config

NAMES = ("store", "run", "init")


@pytest.fixture
def ray_job(tmp_path, monkeypatch):
    """As `ray job submit --working-dir .` starts a driver."""
    monkeypatch.chdir(tmp_path)
    job = {"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}, "metadata": {}}
    monkeypatch.setenv(_RAY_JOB, json.dumps(job))
    return tmp_path


def test_ray_knows_the_variable():
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    assert RAY_JOB_CONFIG_JSON_ENV_VAR == _RAY_JOB


@pytest.mark.parametrize("job", [None, {"runtime_env": {"env_vars": {}}}, {"metadata": {}}])
def test_a_relative_path_is_whole_where_the_directory_stays(tmp_path, monkeypatch, job):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(_RAY_JOB, raising=False)
    if job is not None:
        monkeypatch.setenv(_RAY_JOB, json.dumps(job))
    whole = with_whole_paths(tiny_config("store=ct.zarr", "run=runs/a"), *NAMES)
    assert (whole.store, whole.run) == (f"{tmp_path}/ct.zarr", f"{tmp_path}/runs/a")
    assert whole.init is None


def test_a_ray_job_refuses_what_would_lie_in_its_copy_of_the_working_dir(ray_job):
    with pytest.raises(UserError) as caught:
        with_whole_paths(tiny_config("store=ct.zarr", f"run={ray_job}/runs/a"), *NAMES)
    store, run = caught.value.lines
    assert store.startswith("store: ct.zarr would lie in the copy of --working-dir")
    assert run.startswith(f"run: {ray_job}/runs/a would lie in the copy")
    assert "s3://BUCKET/FOLDER" in run


def test_a_ray_job_takes_whole_paths_and_buckets_and_what_was_uploaded(ray_job, tmp_path_factory):
    store = tmp_path_factory.mktemp("shared")
    words = [f"store={store}", "run=s3://bucket/runs/a", "init=encoder.safetensors"]
    whole = with_whole_paths(tiny_config(*words), *NAMES)
    assert (whole.store, whole.run) == (str(store), "s3://bucket/runs/a")
    assert whole.init == f"{ray_job}/encoder.safetensors"


@pytest.mark.ray
def test_folders_that_all_nodes_see_and_buckets_pass(local_ray, tmp_path):
    from glmae_ray.jobs.shared_folders import FILES, check_shared

    for name, file in FILES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("x")
    nodes = ray.nodes() * 2  # as a cluster of two that share all
    check_shared({name: tmp_path / name for name in FILES}, nodes)
    check_shared({"run": to_place("s3://bucket/run")}, nodes)
