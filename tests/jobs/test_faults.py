"""What a cluster does to a run, one fault at a time, on several nodes and through the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from glmae_ray.jobs.profiles import PROFILES
from glmae_ray.jobs.sittings import read_sittings
from tests.conftest import TINY
from tests.jobs.loopback_cluster import LoopbackCluster
from tests.jobs.watched_run import WatchedRun, repeated_steps, wrong_steps
from tests.store.scans import write_people

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS, BATCH, SAVED_EVERY = 150, 6, 10
ENDLESS = 100_000  # no machine gets there before the test is over
# One worker and one maker of views a node.
CPUS, CPUS_PER_WORKER = 3, 2
ENDS_S, HEAD_LOST_S = 600, 120
MISBEHAVING = Path(__file__).with_name("misbehaving")

Start = Callable[..., WatchedRun]


@pytest.fixture(scope="module")
def fault_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fault")


@pytest.fixture(scope="module")
def cluster_env(fault_folder) -> dict[str, str]:
    path = os.pathsep.join([str(MISBEHAVING), os.environ.get("PYTHONPATH", "")])
    faults = {"PYTHONPATH": path.rstrip(os.pathsep), "GLMAE_TEST_FAULT": str(fault_folder)}
    return {**PROFILES["spot"].start, **faults}


@pytest.fixture(scope="module")
def module_cluster(cluster_env) -> Iterator[LoopbackCluster]:
    with LoopbackCluster(nodes=2, cpus=CPUS, env=cluster_env) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def store(module_cluster, tmp_path_factory) -> Path:
    """Eight people for training, grids of unequal sides."""
    folder = tmp_path_factory.mktemp("people")
    write_people(folder / "scans", count=8)
    words = [f"source={folder / 'scans'}", f"store={folder / 'store'}", "splits=[1,0,0]"]
    command = [sys.executable, "-m", "glmae_ray.cli", "ingest", *words]
    subprocess.run(command, check=True, env=module_cluster.environment)
    return folder / "store"


@pytest.fixture
def cluster(module_cluster) -> LoopbackCluster:
    """Two nodes."""
    while len(module_cluster.nodes) < 2:
        module_cluster.add_node()
    for node in module_cluster.nodes[2:]:
        module_cluster.kill_node(node)
    return module_cluster


@pytest.fixture
def start(store, tmp_path) -> Iterator[Start]:
    """Starts a run on a cluster; it is ended with the test."""
    begun: list[WatchedRun] = []

    def begin(cluster: LoopbackCluster, *more: str, run: str = "run") -> WatchedRun:
        words = [*TINY, f"store={store}", f"steps={STEPS}", f"global_batch={BATCH}"]
        words += ["engine.micro_batch=1", "optim.warmup_steps=1", "validation.every_steps=1000"]
        words += ["log.pictures=false", "log.tensorboard=false", "resources.profile=spot"]
        words += [f"save.every_steps={SAVED_EVERY}", f"resources.cpus_per_worker={CPUS_PER_WORKER}"]
        watched = WatchedRun(
            tmp_path / run,
            words=[*words, "resources.workers=[1,2]", *more],
            env=cluster.environment,
        )
        begun.append(watched)
        watched.start()
        return watched

    yield begin
    for watched in begun:
        watched.stop()


@pytest.fixture
def misbehave(fault_folder) -> Iterator[Callable[..., None]]:
    """Has a rank raise or hang at its tenth micro-batch."""

    def arrange(what: str, *, rank: int, times: int) -> None:
        fault = {"what": what, "rank": rank, "call": 10, "times": times}
        (fault_folder / "fault.json").write_text(json.dumps(fault))

    yield arrange
    for path in fault_folder.iterdir():
        path.unlink()


def check_that_it_ends_well(run: WatchedRun) -> None:
    assert run.wait(timeout_s=ENDS_S) == 0, run.said()[-2000:]
    check_that_each_step_is_done_once(run, steps=STEPS)


def check_that_each_step_is_done_once(run: WatchedRun, *, steps: int) -> None:
    assert [step for step, _ in run.losses()] == list(range(1, steps + 1))
    assert wrong_steps(run.run, steps=steps, global_batch=BATCH) == {}


def workers_of_sittings(run: WatchedRun) -> list[int]:
    return [sitting["workers"] for sitting in read_sittings(run.run)]


def test_a_worker_that_is_killed_costs_the_steps_since_the_last_checkpoint(cluster, start):
    run = start(cluster)
    run.wait_for(step=2 * SAVED_EVERY + 2)
    cluster.workers()[0].kill()
    check_that_it_ends_well(run)
    assert workers_of_sittings(run) == [2, 2]
    assert repeated_steps(run.run)[1] <= 2 * SAVED_EVERY  # the newest may not have been written


@pytest.mark.parametrize("lose", [LoopbackCluster.kill_raylet, LoopbackCluster.freeze_node])
def test_a_run_goes_on_without_a_node_that_is_killed_or_falls_silent(cluster, start, lose):
    run = start(cluster)
    run.wait_for(step=2 * SAVED_EVERY + 2)
    lose(cluster, cluster.nodes[1])
    check_that_it_ends_well(run)
    assert workers_of_sittings(run) == [2, 1]
    assert repeated_steps(run.run)[1] <= 2 * SAVED_EVERY


def test_the_same_command_goes_on_where_a_killed_driver_was(cluster, start):
    run = start(cluster)
    run.wait_for(step=2 * SAVED_EVERY + 2)
    run.stop()
    run.start()
    check_that_it_ends_well(run)
    assert workers_of_sittings(run) == [2, 2]
    assert repeated_steps(run.run)[1] <= 2 * SAVED_EVERY


def test_a_node_that_is_taken_with_notice_takes_no_more_than_a_few_seconds_of_work(cluster, start):
    run = start(cluster, f"save.every_steps={STEPS}")
    at_notice = run.wait_for(step=10).step
    node, grace_s = cluster.nodes[1], 15.0
    cluster.drain_node(node, grace_s=grace_s)
    time.sleep(grace_s)
    lost = run.look()
    cluster.kill_node(node)
    check_that_it_ends_well(run)
    assert workers_of_sittings(run) == [2, 1]
    _, after = read_sittings(run.run)
    assert at_notice < after["start"]  # saved because of the notice
    assert after["start"] > (at_notice + lost.step) / 2


def test_a_node_that_kubernetes_evicts_saves_before_it_goes(cluster, start):
    run = start(cluster, f"save.every_steps={STEPS}")
    at_notice = run.wait_for(step=10).step
    cluster.terminate_node(cluster.nodes[1])
    check_that_it_ends_well(run)
    assert workers_of_sittings(run) == [2, 1]
    assert read_sittings(run.run)[1]["start"] > at_notice


def test_a_node_that_joins_is_taken_in_without_losing_a_step(cluster, start):
    cluster.kill_node(cluster.nodes[0])
    words = [f"steps={ENDLESS}", f"save.every_steps={ENDLESS}", "resources.resize_s=5"]
    run = start(cluster, *words)
    run.wait_for(step=10)
    cluster.add_node()
    run.wait_for_sitting(1)
    assert run.leave(timeout_s=ENDS_S) == 128 + signal.SIGTERM, run.said()[-2000:]
    check_that_each_step_is_done_once(run, steps=run.look().step)
    assert workers_of_sittings(run) == [1, 2]
    assert repeated_steps(run.run)[1] <= 10


def test_a_rank_that_raises_again_and_again_ends_the_run_with_its_name_and_its_words(
    cluster, start, misbehave, fault_folder
):
    misbehave("raise", rank=1, times=99)
    run = start(cluster, "resources.max_failures=1")
    assert run.wait(timeout_s=ENDS_S) == 1
    assert len(list(fault_folder.glob("mark-*"))) == 2
    (line,) = [line for line in run.said().splitlines() if line.startswith("glmae pretrain: ")]
    assert "rank 1: " in line
    assert "the optimizer is on strike" in line


def test_a_rank_that_hangs_is_named_and_the_run_goes_on(cluster, start, misbehave):
    misbehave("hang", rank=1, times=1)
    run = start(cluster, "resources.hang_s=20")
    check_that_it_ends_well(run)
    (event,) = run.events("hang")
    assert "rank 1" in event["line"]
    assert workers_of_sittings(run) == [2, 2]


def test_a_run_whose_head_is_lost_ends_in_a_line_and_goes_on_in_another_cluster(
    cluster_env, start, tmp_path
):
    with LoopbackCluster(nodes=1, cpus=CPUS, env=cluster_env) as first:
        run = start(first)
        run.wait_for(step=2 * SAVED_EVERY + 2)
        first.kill_head()
        assert run.wait(timeout_s=HEAD_LOST_S) == 1
        lines = [line for line in run.said().splitlines() if line.startswith("glmae pretrain: ")]
        assert len(lines) == 1, run.said()[-2000:]
    with LoopbackCluster(nodes=1, cpus=CPUS, env=cluster_env) as second:
        run = start(second)
        check_that_it_ends_well(run)
        assert repeated_steps(run.run)[1] <= 2 * SAVED_EVERY
