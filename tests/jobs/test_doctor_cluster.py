"""`glmae doctor` on clusters that are there: what it says where all is well, and where not."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from glmae_ray.cli import main
from glmae_ray.paths import names_in, to_place
from tests.conftest import TINY
from tests.jobs.loopback_cluster import LoopbackCluster
from tests.test_crops import write_store

pytestmark = pytest.mark.ray

RUN = TINY[2:]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("cases") / "store")


def test_a_cluster_on_which_the_run_could_start(local_ray, store, bucket, tmp_path, capsys):
    words = [*RUN, f"ray.address={local_ray}", f"store={store}"]
    for run in (f"{tmp_path}/runs/a", f"{bucket}/runs/a"):
        assert main(["doctor", *words, f"run={run}", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["reasons"] == []
        tail = "from 1 node, as from here"
        assert f"run: {run} can be read and written {tail}" in facts["facts"]
        assert f"store: {store} can be read {tail}" in facts["facts"]
        assert any(line.startswith("views: ") for line in facts["facts"])
    (node,) = facts["cluster"]["nodes"]
    assert (node["cpus"], node["trouble"]) == (4, "")
    assert node["look"]["spill_folder"].startswith("/tmp/ray/session_")
    assert abs(node["ahead_s"]) <= node["doubt_s"]
    # It leaves nothing behind.
    assert list(tmp_path.iterdir()) == []
    assert names_in(to_place(bucket)) == set()
    assert main(["doctor", *words, "resources.workers=4", "resources.cpus_per_worker=2"]) == 2
    printed = capsys.readouterr()
    assert re.search(r"^ +node +CPUs .*\n +\S+ +4 ", printed.out, re.MULTILINE)
    assert printed.err.splitlines() == [
        "glmae doctor: resources.workers: 4 at 2 CPU each and 1 CPU to make their views are 9 "
        "CPUs; the cluster has 4"
    ]


@pytest.mark.slow
def test_a_folder_that_a_node_does_not_see_a_run_that_is_too_large_a_silent_node(tmp_path):
    disk = tmp_path / "disk"
    store = write_store(disk / "store")
    with LoopbackCluster(nodes=1, cpus=1) as cluster:
        blind, frozen = cluster.add_node(blind_to=disk), cluster.nodes[0]
        words = [*RUN, f"store={store}", f"run={disk / 'run'}", "resources.workers=2"]
        too_large = [*words, "resources.cpus_per_worker=2"]
        here = {"env": cluster.environment, "capture_output": True, "text": True, "check": False}
        command = [sys.executable, "-m", "glmae_ray.cli", "doctor"]
        done = subprocess.run([*command, *too_large], **here)
        for process in frozen.processes():
            process.suspend()
        silent = subprocess.run([*command, "--json"], **here)
        for process in frozen.processes():
            process.resume()
    assert done.returncode == 2, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("glmae doctor: ")] == [
        "glmae doctor: resources.workers: 2 at 2 CPU each and 1 CPU to make their views are 5 "
        "CPUs; the cluster has 2",
        *(
            f"glmae doctor: {name}: {disk / name} is not the same folder on {blind.address} as "
            "here; give one on a disk that all nodes share, or s3://BUCKET/FOLDER"
            for name in ("store", "run")
        ),
    ]
    assert "authentication: none on" in done.stdout
    assert {place.name for place in disk.iterdir()} == {"store"}
    assert silent.returncode == 2, silent.stderr
    assert silent.stdout.startswith("{"), silent.stdout
    facts = json.loads(silent.stdout)
    (reason,) = facts["reasons"]
    assert reason.startswith(f"{frozen.address}: no answer within 60 s, though Ray counts it")
