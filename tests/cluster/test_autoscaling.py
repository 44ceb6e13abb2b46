"""A cluster that grows with a run and shrinks after it, by Ray's autoscaler, on one machine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from glmae_ray.jobs.sittings import read_sittings
from glmae_ray.tracking import read_metrics
from tests.cluster.conftest import WORDS
from tests.cluster.machine import ROOT, Machine, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 1200
ADDRESS = "127.0.0.1:6379"
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
# `ray up` fills these in, `ray start` does not; its nodes need no setting up.
NOTHING = {
    **{f"{kind}setup_commands": [] for kind in ("", "head_", "worker_")},
    **{f"{kind}_start_ray_commands": [] for kind in ("head", "worker")},
    **{name: [] for name in ("initialization_commands", "cluster_synced_files")},
    **{name: [] for name in ("rsync_exclude", "rsync_filter")},
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    "file_mounts_sync_continuously": False,
    "upscaling_speed": 1.0,
}
CLUSTER = {
    **NOTHING,
    "cluster_name": "grows",
    "max_workers": 4,
    "idle_timeout_minutes": 0.2,
    "provider": {
        "type": "external",
        "module": PROVIDER,
        "launch_multiple": True,
        "disable_node_updaters": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "gcs_address": ADDRESS,
    },
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "trains": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 3},
        # Too small for a worker, which would take the CPU that views need.
        "makes": {
            "resources": {"CPU": 1},
            "labels": {"pool": "cpu"},
            "node_config": {},
            "max_workers": 1,
        },
    },
}


def nodes(machine: Machine) -> int:
    """Nodes of Ray that run, the head among them."""
    return sum(process.name() == "raylet" for process in machine.processes())


def test_a_cluster_grows_from_its_head_for_a_run_and_shrinks_after_it(machine, store, tmp_path):
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    env = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_AUTH_MODE": "disabled",
    }
    head = ["ray", "start", "--head", "--num-cpus=0", "--node-ip-address=127.0.0.1"]
    options = [f"--autoscaling-config={tmp_path / 'cluster.yaml'}", "--include-dashboard=false"]
    begun = machine.run(*head, *options, env=env)
    assert begun.returncode == 0, begun.stdout
    wait_until(lambda: nodes(machine) == 1)  # `ray start` does not wait for it

    run, log = tmp_path / "run", tmp_path / "log"
    words = [f"store={store}", f"run={run}", *WORDS, f"steps={STEPS}", "engine.micro_batch=1"]
    words += ["resources.workers=[1,3]", "resources.autoscales=true", "resources.resize_s=30"]
    words += ["resources.cpus_per_worker=2", "pipeline.labels.pool=cpu"]
    words += ["resources.profile=cluster"]
    began = time.monotonic()
    join = {"RAY_ADDRESS": ADDRESS, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    driver = machine.start("glmae", "pretrain", *words, env=join, log=log)
    wait_until(lambda: bool(workers_of(run)) and workers_of(run)[-1] == 3, timeout_s=900)
    wait_until(lambda: nodes(machine) == 5)  # three that train, one that makes views, the head
    grown_s = time.monotonic() - began
    assert driver.wait(1200) == 0, log.read_text()[-3000:]
    ended = time.monotonic()
    wait_until(lambda: nodes(machine) == 1, timeout_s=300)
    print(f"1 -> 5 nodes after {grown_s:.0f} s, back {time.monotonic() - ended:.0f} s after it")
    found = rates(run)
    print(workers_of(run), found)
    assert workers_of(run)[-1] == 3
    assert found[3] > found[1]
    assert [r["step"] for r in read_metrics(run) if "loss" in r] == list(range(1, STEPS + 1))
    assert machine.run("ray", "stop").returncode == 0


def workers_of(run: Path) -> list[int]:
    """Workers of each start."""
    return [sitting["workers"] for sitting in read_sittings(run)]


def rates(run: Path) -> dict[int, float]:
    """Workers -> samples a second while there were so many, the first ten steps left out."""
    records = [r for r in read_metrics(run) if "loss" in r]
    sittings = read_sittings(run)
    ends = [sitting["start"] for sitting in sittings[1:]] + [records[-1]["step"]]
    found = {}
    for sitting, end in zip(sittings, ends, strict=True):
        of_it = [r for r in records if sitting["start"] + 10 < r["step"] <= end]
        if len(of_it) > 1:
            steps = of_it[-1]["step"] - of_it[0]["step"]
            found[sitting["workers"]] = 4 * steps / (of_it[-1]["time"] - of_it[0]["time"])
    return found
