"""A run on three nodes: a worker on each, all of it in a bucket, a folder that one cannot see."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from glmae_ray.jobs.profiles import PROFILES
from glmae_ray.jobs.sittings import read_sittings
from glmae_ray.paths import names_in, to_place
from glmae_ray.tracking import read_metrics
from tests.conftest import TINY
from tests.jobs.loopback_cluster import LoopbackCluster
from tests.jobs.watched_run import WatchedRun, wrong_steps
from tests.store.scans import write_people
from tests.test_crops import write_store

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NODES, STEPS, BATCH = 3, 40, 6
WORDS = [
    *TINY[2:],
    *(f"steps={STEPS}", f"global_batch={BATCH}", "optim.warmup_steps=1", "log.every_steps=1"),
    *("save.every_steps=20", "validation.every_steps=40", "log.pictures=false"),
    *("log.tensorboard=false", "resources.profile=cluster", "resources.cpus_per_worker=1"),
]
ENDS_S = 900


@pytest.fixture(scope="module")
def cluster(s3_server) -> Iterator[LoopbackCluster]:
    """Nodes with a CPU for a worker and one for its views; they know where the bucket is."""
    s3 = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",
        "RAY_worker_niceness": "0",
    }
    with LoopbackCluster(nodes=NODES, cpus=2, env={**PROFILES["cluster"].start, **s3}) as made:
        yield made


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("people")
    write_people(folder, count=8)
    return folder


def glmae(cluster: LoopbackCluster, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "glmae_ray.cli", *words]
    return subprocess.run(
        command,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        check=False,
    )


@pytest.fixture(scope="module")
def store(cluster, scans, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("store") / "store"
    done = glmae(cluster, "ingest", f"source={scans}", f"store={place}", "splits=[1,0,0]")
    assert done.returncode == 0, done.stderr
    return place


def test_each_node_trains_and_all_of_them_as_one(cluster, store, tmp_path):
    words = [*WORDS, f"store={store}", "engine.micro_batch=2"]
    run = WatchedRun(
        tmp_path / "run", words=[*words, f"resources.workers={NODES}"], env=cluster.environment
    )
    run.start()
    run.wait_for(step=3, timeout_s=ENDS_S)
    assert [len(node.workers()) for node in cluster.nodes] == [1] * NODES
    assert run.wait(timeout_s=ENDS_S) == 0, run.said()[-2000:]
    assert [sitting["workers"] for sitting in read_sittings(run.run)] == [NODES]
    assert wrong_steps(run.run, steps=STEPS, global_batch=BATCH) == {}
    ranks = {name.split("-rank")[1] for name in names_in(run.run / "samples")}
    assert ranks == {f"{rank}.jsonl" for rank in range(NODES)}
    alone = glmae(cluster, "pretrain", *words, f"run={tmp_path / 'alone'}", "resources.workers=1")
    assert alone.returncode == 0, alone.stderr
    theirs = [r["loss"] for r in read_metrics(tmp_path / "alone") if "loss" in r]
    assert [loss for _, loss in run.losses()] == pytest.approx(theirs, rel=1e-5)


def test_a_store_and_a_run_in_a_bucket(cluster, scans, bucket):
    store, run = f"{bucket}/ct.zarr", f"{bucket}/runs/first"
    done = glmae(cluster, "ingest", f"source={scans}", f"store={store}", "splits=[1,0,0]")
    assert done.returncode == 0, done.stderr
    words = [*WORDS, f"store={store}", f"run={run}", f"resources.workers={NODES}"]
    done = glmae(cluster, "pretrain", *words)
    assert done.returncode == 0, done.stderr
    place = to_place(run)
    assert [r["step"] for r in read_metrics(place) if "loss" in r] == list(range(1, STEPS + 1))
    newest = sorted(names_in(place / "checkpoints"))[-1]
    parts = names_in(place / "checkpoints" / newest)
    assert {f"part-{rank}.json" for rank in range(NODES)} <= parts
    assert [sitting["workers"] for sitting in read_sittings(place)] == [NODES]


def test_a_run_folder_that_a_node_does_not_see_is_refused_in_a_line(tmp_path):
    disk, store = tmp_path / "disk", write_store(tmp_path / "store")
    disk.mkdir()
    with LoopbackCluster(nodes=1, cpus=2) as cluster:
        blind = cluster.add_node(blind_to=disk)
        words = [*WORDS, f"store={store}", f"run={disk / 'run'}", "resources.workers=2"]
        done = glmae(cluster, "pretrain", *words)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"glmae pretrain: run: {disk / 'run'} is not the same folder on {blind.address} as here; "
        "give one on a disk that all nodes share, or s3://BUCKET/FOLDER"
    )
