"""What follows a step: checkpoints, the end, a stop, what earlier sittings left; without Ray."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from glmae_ray import checkpoint
from glmae_ray.jobs.sitting import Sitting
from glmae_ray.jobs.sittings import last_start, read_sittings
from glmae_ray.tracking import read_events, read_metrics
from tests.jobs.fakes import Outside, Weights, sit, step_info


@pytest.fixture
def outside(monkeypatch) -> Outside:
    return Outside().put_into(monkeypatch)


def steps(run: Path) -> list[int]:
    return [found.step for found in checkpoint.complete(run)]


def train(sitting: Sitting, weights: Weights, until: int) -> int | None:
    """Train; the step after which the run was not to go on, or None."""
    for step in range(sitting.start + 1, until + 1):
        weights.content = bytes([step])
        if not sitting.after_step(step_info(step)):
            return step
    return None


def test_checkpoints_come_every_so_many_steps_and_after_the_last(outside, tmp_path):
    weights = Weights()
    sitting = sit(tmp_path, weights, "steps=7", "save.every_steps=3")
    assert train(sitting, weights, 7) is None
    sitting.close()
    assert steps(tmp_path) == [7, 6]
    (found, _) = checkpoint.complete(tmp_path)
    assert found.state["samples"] == 28
    assert found.state["passed"] == []


def test_a_sitting_goes_on_where_the_one_before_has_saved(outside, tmp_path):
    weights = Weights()
    first = sit(tmp_path, weights, "steps=9", "save.every_steps=2")
    train(first, weights, 5)  # and then it is killed
    first._saver.wait()
    weights = Weights()
    second = sit(tmp_path, weights, "steps=9")
    assert (second.start, weights.content) == (4, b"\4")
    assert [s["step"] for s in read_metrics(tmp_path) if "loss" in s] == [1, 2, 3, 4]
    assert [(s["sitting"], s["start"], s["checkpoint"]) for s in read_sittings(tmp_path)] == [
        (0, 0, None), (1, 4, "step-0000004-0"),
    ]  # fmt: skip
    assert last_start(tmp_path) == 4
    for sitting in (first, second):
        sitting.close()


def test_a_start_removes_what_earlier_sittings_left_unfinished(outside, tmp_path):
    weights = Weights()
    first = sit(tmp_path, weights, "steps=9", "save.every_steps=2")
    train(first, weights, 4)
    first.close()
    (tmp_path / "checkpoints" / "step-0000004-0" / "part-0.json").unlink()
    (tmp_path / "checkpoints" / "step-0000006-0" / "engine").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes").mkdir()  # not ours
    second = sit(tmp_path, weights)
    assert second.start == 2
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["notes", "step-0000002-0"]
    second.close()


def test_a_signal_is_met_with_a_checkpoint_and_the_end(outside, tmp_path):
    weights = Weights()
    sitting = sit(tmp_path, weights, "steps=9", "save.every_steps=100")
    outside.stop = "SIGTERM"
    assert train(sitting, weights, 9) == 1
    assert steps(tmp_path) == [1]  # it was waited for
    sitting.close()


def test_a_signal_that_comes_with_the_last_step_does_not_cost_the_encoder(outside, tmp_path):
    weights = Weights()
    sitting = sit(tmp_path, weights, "steps=1")
    outside.stop = "SIGTERM"
    assert train(sitting, weights, 1) is None  # the run goes on to its end, which writes it
    sitting.close()
    assert steps(tmp_path) == [1]


def test_who_waits_for_a_checkpoint_goes_on_once_it_is_written(outside, tmp_path):
    weights = Weights()
    sitting = sit(tmp_path, weights, "steps=9", "save.every_steps=100")
    outside.resize = True
    assert train(sitting, weights, 2) is None
    assert steps(tmp_path) == [1]
    assert not outside.resize
    sitting.close()


def test_a_full_disk_is_an_event_of_the_run_and_training_goes_on(outside, tmp_path, monkeypatch):
    weights = Weights()
    sitting = sit(tmp_path, weights, "steps=4", "save.every_steps=1")
    train(sitting, weights, 1)
    sitting._saver.wait()
    with monkeypatch.context() as fault:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        fault.setattr(checkpoint, "publish", full)
        sitting.after_step(step_info(2))
        sitting._saver.wait()
    sitting.after_step(step_info(3))
    sitting.close()
    assert steps(tmp_path) == [3, 1]
    (event,) = read_events(tmp_path)
    assert (event["event"], event["step"], event["rank"]) == ("checkpoint_failed", 2, 0)
    assert json.dumps(event).count("No space left on device") == 2  # line and reason
