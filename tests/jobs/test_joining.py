"""Joining a Ray that is not there; `test_pretrain.py` joins one that is, and leaves it running."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.jobs.test_pretrain import words

pytestmark = pytest.mark.ray


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
