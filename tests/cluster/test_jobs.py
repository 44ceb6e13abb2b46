"""`ray job submit` against a real dashboard, on `cluster/local.sh` and as the README says."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from glmae_ray import checkpoint
from glmae_ray.jobs.sittings import read_sittings
from glmae_ray.tracking import read_metrics
from tests.cluster.conftest import WORDS
from tests.cluster.machine import ROOT, Machine, wait_until

pytest.importorskip("aiohttp_cors", reason="ray job submit needs pip install 'glmae-ray[cluster]'")
pytestmark = [pytest.mark.ray, pytest.mark.slow]

SUBMIT = "ray job submit --working-dir . -- glmae pretrain "
TOKEN = {"RAY_AUTH_MODE": "token"}


@pytest.fixture(scope="module")
def cluster(machine, short_folder) -> Iterator[Machine]:
    """A head and a node; what the module runs after that carries the token."""
    env = {"CPUS": "3", "GLMAE_LOCAL": str(short_folder / "l")}
    begun = machine.run("cluster/local.sh", "start", "1", env=env)
    assert begun.returncode == 0, begun.stdout
    machine.env |= TOKEN | {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265"}
    assert "export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=" in begun.stdout
    yield machine
    ended = machine.run("cluster/local.sh", "stop", env=env)
    assert ended.stdout.endswith("stopped\n")
    # Ray's own watch over a job ends what is left of it within a second.
    wait_until(lambda: machine.processes() == [], timeout_s=60)
    assert not (short_folder / "l").exists()


def submit(machine: Machine, *options: str, words: list[str]):
    """The README's line, with more options of `ray` and other words of `glmae`."""
    (line,) = {
        line for line in (ROOT / "cluster" / "README.md").read_text().splitlines()
        if line.startswith(SUBMIT)
    }  # fmt: skip
    start = shlex.split(SUBMIT)
    assert shlex.split(line)[: len(start)] == start
    at = start.index("--working-dir")
    return machine.run(*start[:at], *options, *start[at:], *words)


def losses(run: Path) -> list[int]:
    return [r["step"] for r in read_metrics(run) if "loss" in r]


def words_of(store: Path, run: Path | str, *more: str) -> list[str]:
    return [f"store={store}", f"run={run}", *WORDS, *more]


def test_a_job_is_stopped_saves_and_goes_on_when_it_is_given_again(cluster, store, tmp_path):
    run = tmp_path / "run"
    words = words_of(store, run, "resources.workers=[1,2]", "engine.micro_batch=2")
    begun = submit(cluster, "--no-wait", "--submission-id=first", words=words)
    assert begun.returncode == 0, begun.stdout
    wait_until(lambda: len(losses(run)) >= 10)
    stopped = cluster.run("ray", "job", "stop", "first")
    assert stopped.returncode == 0, stopped.stdout
    assert "Job 'first' was stopped" in stopped.stdout
    step = checkpoint.latest_step(run)
    assert 10 <= step < 150
    log = cluster.run("ray", "job", "logs", "first").stdout
    assert f"SIGTERM: saved at step {step} of 150" in log

    done = submit(cluster, words=words)
    assert done.returncode == 0, done.stdout
    assert "150 steps" in done.stdout
    assert f"run: {run}" in done.stdout
    assert losses(run) == list(range(1, 151))
    assert [sitting["start"] for sitting in read_sittings(run)] == [0, step]
    # The code that runs is the copy that was uploaded: it is in no repository.
    assert json.loads((run / "environment.json").read_text())["git_commit"] is None


def test_a_run_folder_in_the_uploaded_copy_is_refused(cluster, store):
    refused = submit(cluster, words=words_of(store, "runs/first"))
    assert refused.returncode == 1
    (line,) = set(re.findall(r"^glmae pretrain: .*$", refused.stdout, re.MULTILINE))
    assert line.startswith("glmae pretrain: run: runs/first would lie in the copy of --working-dir")
    assert "code 2" in refused.stdout


def test_who_has_another_token_is_not_let_in(cluster):
    refused = cluster.run("ray", "job", "list", env={"RAY_AUTH_TOKEN": "0" * 64})
    assert refused.returncode != 0
    assert "AuthenticationError" in refused.stdout or "Unauthorized" in refused.stdout


def test_the_head_s_pre_stop_hook_has_runs_save(cluster, store, tmp_path):
    """What Kubernetes runs in the head's pod before it ends it."""
    text = (ROOT / "cluster" / "kubernetes" / "base" / "raycluster.yaml").read_text()
    head = yaml.safe_load(text)["spec"]["headGroupSpec"]["template"]["spec"]
    hook = head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    run = tmp_path / "run"
    submit(cluster, "--no-wait", "--submission-id=hooked", words=words_of(store, run))
    wait_until(lambda: len(losses(run)) >= 5)
    assert cluster.run(*hook).returncode == 0
    assert not [p for p in cluster.processes() if p.name() == "glmae"]
    assert 5 <= checkpoint.latest_step(run) < 150
