"""Joining a Ray that runs already, as a cluster's user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.test_pretrain import words

pytestmark = pytest.mark.ray


def test_a_job_joins_the_ray_that_the_environment_names_and_leaves_it_running(
    small_store, local_ray, tmp_path
):
    environment = os.environ | {"RAY_ADDRESS": local_ray}
    command = [sys.executable, "-m", "glmae_ray.cli"]
    arguments = words(small_store, tmp_path / "run", "steps=2", "optim.warmup_steps=1")
    for _ in range(2):  # the second sitting finds the Ray of the first and the run complete
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"run: {tmp_path / 'run'}"
    assert Path(tmp_path / "run" / "summary.json").exists()


def test_a_ray_that_does_not_answer_is_one_line(small_store, tmp_path):
    arguments = words(small_store, tmp_path / "run", "ray.address=127.0.0.1:1")
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "glmae_ray.cli", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("glmae pretrain: ")]
    assert len(lines) == 1
    assert "ray.address: 127.0.0.1:1 does not answer" in lines[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
