"""The README's way by hand, on a cluster without a token: `ray start --head`, then a job."""

from __future__ import annotations

import re

import pytest

from glmae_ray.jobs.profiles import PROFILES
from tests.cluster.conftest import WORDS
from tests.cluster.machine import ROOT

LOCAL = (ROOT / "cluster" / "local.sh").read_text()


def test_local_nodes_start_in_the_environment_of_the_profile():
    exported = dict(re.findall(r"^export (RAY_\w+)=([\d.]+)$", LOCAL, re.MULTILINE))
    assert exported == dict(PROFILES["cluster"].start)


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_runs_to_its_end_on_a_head_without_a_token(machine, store, tmp_path):
    pytest.importorskip("aiohttp_cors", reason="ray job submit needs glmae-ray[cluster]")
    machine.env["RAY_AUTH_MODE"] = "disabled"
    begun = machine.run("ray", "start", "--head", "--num-cpus=3", "--dashboard-host=127.0.0.1")
    assert begun.returncode == 0, begun.stdout
    run = tmp_path / "run"
    line = ["ray", "job", "submit", "--working-dir", ".", "--", "glmae", "pretrain"]
    done = machine.run(*line, f"store={store}", f"run={run}", *WORDS, "steps=4")
    assert done.returncode == 0, done.stdout
    assert f"run: {run}" in done.stdout
    assert (run / "encoder.safetensors").exists()
    assert machine.run("ray", "stop").returncode == 0
