"""A run that no node can take ends after a stated time, with a line; Ray would wait for ever."""

from __future__ import annotations

import time

import pytest
import ray.train
from ray.train.torch import TorchTrainer

from glmae_ray.jobs import patience
from glmae_ray.jobs.patience import Patience
from glmae_ray.jobs.profiles import PLACING
from glmae_ray.tracking import read_events

pytestmark = [
    pytest.mark.ray,
    # Ray 2.60 reads its own snapshot through pydantic's old names.
    pytest.mark.filterwarnings("ignore:The .parse_obj. method is deprecated"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "workers", [pytest.param(2, id="a_number"), pytest.param((2, 3), id="a_range")]
)
def test_a_request_that_fits_no_node_ends_with_what_is_missing(
    workers, local_ray, tmp_path, monkeypatch
):
    monkeypatch.setenv(PLACING, "2")
    monkeypatch.setattr(patience, "_TELL_S", 1.0)
    trainer = TorchTrainer(
        lambda: None,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, resources_per_worker={"CPU": 100}
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(tmp_path),
            failure_config=ray.train.FailureConfig(max_failures=5),
            callbacks=[Patience(str(tmp_path), needs="2 workers with 100 CPUs each", wait_s=30)],
        ),
    )
    began = time.monotonic()
    with pytest.raises(ray.train.TrainingFailedError) as caught:
        trainer.fit()
    took = time.monotonic() - began
    assert 30 <= took < 300  # Ray's own limit would be none
    failure = caught.value.controller_failure
    assert isinstance(failure, patience.WaitedInVainError)
    line = str(failure)
    assert "for 2 workers with 100 CPUs each: 4 of 4 CPUs are free; ask for less" in line
    assert "\n" not in line
    (event,) = read_events(tmp_path)
    assert event["event"] == "waiting"
    assert event["line"].endswith("for 30 s at most")


def test_a_wait_is_counted_from_the_last_time_that_workers_ran(tmp_path, monkeypatch):
    clock = iter([0.0, 8.0, 0.0, 8.0, 12.0])
    waiting, running = patience.InitializingState(), object()
    watch = Patience(str(tmp_path), needs="a worker", wait_s=10)
    monkeypatch.setattr(patience.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(patience, "_there", lambda: "0 of 0 CPUs are free")
    for state in (waiting, waiting, running, waiting, waiting):
        watch.after_controller_state_update(None, state)
    with pytest.raises(patience.WaitedInVainError, match="waited 12 s for a worker"):
        watch.after_controller_state_update(None, waiting)
