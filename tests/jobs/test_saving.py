"""Saving beside training: one at a time, full disks, object stores that refuse; without Ray."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from glmae_ray import checkpoint
from glmae_ray.config import PretrainConfig
from glmae_ray.jobs.machine import PACKAGES
from glmae_ray.jobs.resuming import resume
from glmae_ray.jobs.saving import Saver
from glmae_ray.paths import Place, names_in, publish, to_place
from tests.conftest import tiny_config
from tests.jobs.checkpoints import loaded, save, saver, steps
from tests.jobs.fakes import Thread, Told, Weights, on_threads


@pytest.fixture
def gate(monkeypatch) -> Iterator[threading.Event]:
    """While it is closed no file is written."""
    gate = threading.Event()

    def patient(place: Place, data: bytes | str) -> None:
        assert gate.wait(60)
        publish(place, data)

    monkeypatch.setattr(checkpoint, "publish", patient)
    yield gate
    gate.set()


# Beside training


def test_training_goes_on_while_a_checkpoint_is_written(gate, tmp_path):
    writer = saver(tmp_path)
    held_s = writer.save(Weights(b"1"), state={"step": 1}).held_s
    assert steps(tmp_path) == []
    gate.set()
    writer.wait()
    assert steps(tmp_path) == [1]
    assert held_s < 30  # the gate's patience is 60


def test_a_second_checkpoint_waits_until_the_first_is_written(gate, tmp_path):
    writer = saver(tmp_path)
    writer.save(Weights(b"1"), state={"step": 1})
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(writer.save, Weights(b"2"), state={"step": 2})
        with pytest.raises(TimeoutError):
            second.result(timeout=0.2)
        gate.set()
        saved = second.result(timeout=60)
    assert saved.held_s >= 0.1  # it stood still for the first
    assert saved.written_s >= 0.1
    writer.close()
    assert steps(tmp_path) == [2, 1]


@pytest.mark.parametrize(
    ("words", "wait"), [((), True), (("save.background=false",), False)], ids=["wait", "config"]
)
def test_a_checkpoint_that_is_waited_for_is_there_afterwards(tmp_path, words, wait):
    writer = saver(tmp_path, *words)
    saved = writer.save(Weights(b"1"), state={"step": 1}, wait=wait)
    assert steps(tmp_path) == [1]
    assert saved.held_s >= saved.written_s > 0


def test_the_last_ones_and_the_best_stay_while_a_run_saves(tmp_path):
    writer = saver(tmp_path, "save.keep=2")
    losses = {1: 0.9, 2: 0.3, 3: None, 4: 0.5, 5: None, 6: None}
    for step, loss in losses.items():
        save(writer, step, val_loss=loss)
    writer.close()
    assert steps(tmp_path) == [6, 5, 2]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [
        "step-0000002-0", "step-0000005-0", "step-0000006-0",
    ]  # fmt: skip


def test_a_held_out_loss_that_is_no_number_is_never_the_best(tmp_path):
    writer = saver(tmp_path, "save.keep=1")
    for step, loss in ((1, 0.3), (2, float("nan")), (3, 0.5), (4, float("nan"))):
        save(writer, step, val_loss=loss)
    writer.close()
    assert steps(tmp_path) == [4, 1]


# What a checkpoint tells


def test_a_checkpoint_tells_where_the_run_was_and_what_it_ran_on(tmp_path):
    facts = {"store_fingerprint": "f" * 64, "selection": "5" * 64}
    (tmp_path / "environment.json").write_text(json.dumps(facts | {"python": "3"}))
    words = ("resources.workers=[1,3]", "global_batch=6", "engine.zero_stage=2")

    def work(ranks: Thread) -> None:
        cfg = tiny_config(f"run={tmp_path}", *words).on(ranks.size)
        writer = Saver(tmp_path, cfg=cfg, ranks=ranks, sitting=4, tell=Told())
        state = {"step": 5, "samples": 30, "passed": [[2, 4]], "val_loss": 0.5}
        writer.save(Weights(b"1", rank=ranks.rank), state=state)
        writer.close()

    on_threads(2, work)
    (found,) = checkpoint.complete(tmp_path)
    state, cfg = found.state, PretrainConfig.model_validate(found.state["config"])
    assert {name: state[name] for name in ("step", "samples", "passed", "val_loss")} == {
        "step": 5, "samples": 30, "passed": [[2, 4]], "val_loss": 0.5,
    }  # fmt: skip
    assert (state["parts"], state["sitting"]) == (2, 4)
    assert (state["zero_stage"], state["precision"]) == (2, "float32")
    assert state["store"] == facts
    assert state["versions"].keys() == set(PACKAGES)
    assert state["versions"]["torch"] == torch.__version__
    assert (cfg.resources.workers, cfg.engine.micro_batch) == (2, 2)
    names = {path.relative_to(found.place).as_posix() for path in found.place.rglob("*.*")}
    assert names == {
        "state.json", "engine/weights-0.pt", "engine/weights-1.pt", "rng-0.pt", "rng-1.pt",
        "part-0.json", "part-1.json",
    }  # fmt: skip


# A disk that is full


def fail_on(monkeypatch, name: str, *, number: int = errno.ENOSPC) -> None:
    """Fail to write files of this name, after half of their bytes."""

    def full(place: Place, data: bytes | str) -> None:
        if place.name != name:
            publish(place, data)
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        half = data[: len(data) // 2]
        unfinished = place.with_name(f"{name}.unfinished")
        unfinished.write_bytes(half if isinstance(half, bytes) else half.encode())
        raise OSError(number, os.strerror(number), str(place))

    monkeypatch.setattr(checkpoint, "publish", full)


@pytest.mark.parametrize("name", ["weights-0.pt", "rng-0.pt", "state.json", "part-0.json"])
def test_a_full_disk_is_told_and_costs_no_earlier_checkpoint(tmp_path, monkeypatch, name):
    told = Told()
    writer = saver(tmp_path, told=told)
    save(writer, 1)
    with monkeypatch.context() as fault:
        fail_on(fault, name)
        writer.save(Weights(b"2"), state={"step": 2})  # training goes on
        writer.wait()
    (event,) = told
    assert event.kind == "checkpoint_failed"
    assert event.facts["step"] == 2
    assert event.line.startswith("step 2: no checkpoint, [Errno 28] No space left on device: ")
    assert loaded(tmp_path) == (1, b"\1")
    save(writer, 3)
    writer.close()
    assert steps(tmp_path) == [3, 1]
    assert list((tmp_path / "checkpoints").glob("step-0000002*")) == []


def test_a_disk_that_cannot_even_be_cleaned_up_does_not_end_the_run(tmp_path, monkeypatch):
    told = Told()
    writer = saver(tmp_path, told=told)
    save(writer, 1)
    with monkeypatch.context() as fault:
        fail_on(fault, "state.json", number=errno.EROFS)

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        fault.setattr(Path, "unlink", refuse)
        fault.setattr(checkpoint, "remove_folder", refuse)
        save(writer, 2)
    assert told.kinds == ["checkpoint_failed", "checkpoint_stays"]
    save(writer, 3)
    writer.close()
    assert steps(tmp_path) == [3, 1]


def test_what_others_wrote_of_a_checkpoint_that_one_rank_could_not_write_is_freed(
    tmp_path, monkeypatch
):
    fail_on(monkeypatch, "weights-1.pt")

    def work(ranks: Thread) -> list[str]:
        told, cfg = Told(), tiny_config("resources.workers=2")
        writer = Saver(tmp_path, cfg=cfg, ranks=ranks, sitting=0, tell=told)
        for step in (1, 2):
            writer.save(Weights(b"x" * 10_000, rank=ranks.rank), state={"step": step})
        writer.close()
        return told.kinds

    assert on_threads(2, work) == [[], ["checkpoint_failed"] * 2]
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_run_goes_on_saving_on_a_disk_that_was_full_for_a_while(small_disk):
    told = Told()
    writer = saver(small_disk, "save.keep=1", told=told)
    save(writer, 1, size=500_000)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_200_000))
    save(writer, 2, size=500_000)
    (event,) = told
    assert (event.kind, event.facts["step"]) == ("checkpoint_failed", 2)
    assert "No space left on device" in event.line
    assert loaded(small_disk) == (1, b"\1")
    ballast.unlink()
    save(writer, 3, size=500_000)
    writer.close()
    assert told.kinds == ["checkpoint_failed"]
    assert steps(small_disk) == [3]
    assert loaded(small_disk) == (3, b"\3")


# In an object store


@pytest.fixture
def url(bucket) -> Place:
    return to_place(f"{bucket}/runs/a")


def test_a_run_in_an_object_store_saves_and_resumes_and_leaves_no_copy(url, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    writer = saver(url, "save.keep=1")
    for step in (1, 2):
        save(writer, step)
    writer.close()
    assert names_in(url / "checkpoints") == {"step-0000002-0"}
    assert loaded(url) == (2, b"\2")

    def work(ranks: Thread) -> bytes:
        weights = Weights(rank=0)
        resume(weights, url, ranks=ranks, tell=Told())
        return weights.content[:1]

    assert on_threads(2, work) == [b"\2", b"\2"]
    assert list(tmp_path.iterdir()) == []


def test_an_object_store_that_refuses_to_write_is_told_and_the_run_goes_on(proxy, bucket):
    run, told = to_place(f"{bucket}/run"), Told()
    writer = saver(run, told=told)
    save(writer, 1)
    proxy.rule = lambda request: "403" if request.method == "PUT" else None
    save(writer, 2)
    proxy.rule = lambda _: None
    save(writer, 3)
    writer.close()
    assert told.kinds == ["checkpoint_failed"]
    assert "AccessDenied" in told[0].line
    assert steps(run) == [3, 1]
