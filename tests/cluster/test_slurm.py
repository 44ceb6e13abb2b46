"""slurm.sh on one machine, with stand-ins for SLURM's commands: at a time limit, to the end."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest

from glmae_ray import checkpoint
from glmae_ray.jobs.profiles import PROFILES
from glmae_ray.jobs.sittings import read_sittings
from glmae_ray.tracking import read_metrics
from tests.cluster.conftest import WORDS
from tests.cluster.machine import ROOT, Machine, wait_until

SCRIPT = ROOT / "cluster" / "slurm.sh"
STAND_INS = {
    "srun": 'exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$HOME/scontrol"; fi',
}


def test_nodes_start_in_the_environment_of_the_profile():
    exported = dict(re.findall(r"^export (RAY_\w+)=([\d.]+)$", SCRIPT.read_text(), re.MULTILINE))
    del exported["RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT"]
    assert exported == dict(PROFILES["cluster"].start)


def test_slurm_signals_the_script_alone_and_before_the_time_limit():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", SCRIPT.read_text(), re.MULTILINE))
    assert options["signal"] == "B:TERM@300"
    assert "requeue" in options
    assert options["open-mode"] == "append"
    assert options["ntasks-per-node"] == "1"


@pytest.fixture
def job(machine: Machine, tmp_path: Path) -> dict[str, str]:
    """The environment of a job of one node that was submitted from a folder with a .venv."""
    commands, submitted = tmp_path / "bin", tmp_path / "submitted"
    commands.mkdir()
    submitted.mkdir()
    for name, line in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/sh\n{line}\n")
        (commands / name).chmod(0o755)
    (submitted / ".venv").symlink_to(sys.prefix)
    return {
        "PATH": f"{commands}:{machine.env['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_SUBMIT_DIR": str(submitted),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_CPUS_PER_TASK": "3",
        "RUN": str(tmp_path / "run"),
    }


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_saves_before_the_time_limit_and_goes_on_in_the_next_job(
    machine, job, store, tmp_path
):
    home, run = Path(machine.env["HOME"]), tmp_path / "run"
    command, env = ["bash", str(SCRIPT), *WORDS], job | {"STORE": str(store)}
    first = machine.start(*command, env=env, log=tmp_path / "first")
    wait_until(lambda: len([r for r in read_metrics(run) if "loss" in r]) >= 10)
    # SLURM's --signal=B: goes to the script, which is a child of what entered the machine.
    (script,) = [p for p in machine.processes() if p.cmdline()[:2] == command[:2]]
    script.send_signal(signal.SIGTERM)
    said = (tmp_path / "first").read_text
    assert first.wait(300) == 143, said()
    step = checkpoint.latest_step(run)
    assert 10 <= step < 150
    assert f"SIGTERM: saved at step {step} of 150" in said()
    assert (home / "scontrol").read_text() == "requeue 17\n"
    wait_until(lambda: machine.processes() == [], timeout_s=60)  # Ray as well
    assert list(home.glob(".glmae-token*")) == []

    done = machine.run(*command, env=env)
    assert done.returncode == 0, done.stdout
    assert [sitting["start"] for sitting in read_sittings(run)] == [0, step]
    assert [r["step"] for r in read_metrics(run) if "loss" in r] == list(range(1, 151))
    assert (home / "scontrol").read_text() == "requeue 17\n"
