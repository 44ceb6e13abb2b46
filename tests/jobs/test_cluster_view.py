"""Beside Ray Train's controller: room is given back, and workers save before a resize."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    ResourceRequestPriority,
    get_or_create_autoscaling_coordinator,
)
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.controller.state import ResizingState, RunningState
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ResizeDecision

from glmae_ray.jobs.cluster_view import take_over
from glmae_ray.jobs.growing import SaveBeforeResize, save_done, save_wanted

pytestmark = pytest.mark.ray


@pytest.fixture
def coordinator(local_ray):
    return get_or_create_autoscaling_coordinator()


def reserved(coordinator, run_id: str) -> dict:
    return ray.get(coordinator.get_reserved_resources.remote(f"train-{run_id}", recompute=True))


def test_the_next_driver_of_a_run_gives_back_what_a_killed_one_asked_for(coordinator):
    take_over("a-run", run_id="killed")
    for run_id in ("killed", "of-another-run"):
        ray.get(
            coordinator.request_resources.remote(
                requester_id=f"train-{run_id}",
                resources=[{"CPU": 1.0}],
                expire_after_s=180,
                priority=ResourceRequestPriority.HIGH,
            )
        )
    assert reserved(coordinator, "killed")
    take_over("a-run", run_id="next")
    assert not reserved(coordinator, "killed")
    assert reserved(coordinator, "of-another-run")
    ray.get(coordinator.cancel_request.remote("train-of-another-run"))


def test_ray_train_asks_under_the_name_that_is_given_back(local_ray):
    policy = FixedScalingPolicy(ScalingConfig(num_workers=1))
    policy.after_controller_start(SimpleNamespace(run_id="x"))
    assert policy._requester_id == "train-x"
    policy.before_controller_abort()


def test_the_controller_waits_until_the_workers_have_saved(local_ray):
    callback = SaveBeforeResize("a-run")
    resizing = ResizingState(ResizeDecision(num_workers=2, resources_per_worker={}))
    waiter = threading.Thread(
        target=callback.after_controller_state_update, args=(RunningState(), resizing)
    )
    waiter.start()
    while not save_wanted("a-run"):
        waiter.join(0.01)
    waiter.join(0.5)
    assert waiter.is_alive()
    assert not save_wanted("another-run")
    save_done("a-run")
    waiter.join(10)
    assert not waiter.is_alive()


def test_nobody_saves_for_another_change_of_state(local_ray):
    SaveBeforeResize("a-run").after_controller_state_update(RunningState(), RunningState())
    assert not save_wanted("a-run")
