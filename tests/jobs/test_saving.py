"""Saving beside training and resuming: full disks, damaged files, object stores; without Ray."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from glmae_ray import checkpoint
from glmae_ray.config import PretrainConfig
from glmae_ray.errors import UserError
from glmae_ray.jobs.machine import PACKAGES
from glmae_ray.jobs.resuming import resume
from glmae_ray.jobs.saving import Saver
from glmae_ray.paths import Place, names_in, publish, read_file, to_place
from tests.conftest import tiny_config
from tests.jobs.fakes import ALONE, Thread, Told, Weights, on_threads


def saver(run: Place, *words: str, told: Told | None = None, sitting: int = 0) -> Saver:
    cfg = tiny_config(f"run={run}", *words)
    return Saver(run, cfg=cfg, ranks=ALONE, sitting=sitting, tell=Told() if told is None else told)


def save(saver: Saver, step: int, *, size: int = 1000, **facts: Any) -> None:
    """Save weights that tell the step, and wait until they are written."""
    weights = Weights(bytes([step]) * size)
    saver.save(weights, state={"step": step, "passed": [], **facts}, wait=True)


def steps(run: Place) -> list[int]:
    return [found.step for found in checkpoint.complete(run)]


def loaded(run: Place, told: Told | None = None) -> tuple[int, bytes]:
    """The step that a run goes on from, and the first byte of the weights."""
    weights = Weights()
    found = resume(weights, run, ranks=ALONE, tell=Told() if told is None else told)
    assert found is not None
    return found.step, weights.content[:1]


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


def test_random_numbers_go_on_where_they_were(tmp_path):
    writer = saver(tmp_path)
    torch.manual_seed(5)
    random.seed(5)
    torch.rand(3), random.random()
    save(writer, 1)
    expected = [torch.rand(1).item(), random.random()]
    torch.manual_seed(6)
    random.seed(6)
    loaded(tmp_path)
    assert [torch.rand(1).item(), random.random()] == expected


def test_another_number_of_workers_takes_the_weights_and_keeps_its_own_random_numbers(tmp_path):
    save(saver(tmp_path), 3)

    def work(ranks: Thread) -> bytes:
        weights = Weights(rank=0)
        assert resume(weights, tmp_path, ranks=ranks, tell=Told())
        return weights.content[:1]

    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    assert on_threads(2, work) == [b"\3", b"\3"]
    assert torch.rand(1) == expected


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


# Files that are not what was written


def flip_a_bit(path: Path, *, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 4
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights cut short": lambda f: os.truncate(f / "engine" / "weights-0.pt", 7),
    "weights gone": lambda f: (f / "engine" / "weights-0.pt").unlink(),
    "a bit of the weights": lambda f: flip_a_bit(f / "engine" / "weights-0.pt"),
    "a bit of the random state": lambda f: flip_a_bit(f / "rng-0.pt"),
    "a bit of the state": lambda f: flip_a_bit(f / "state.json"),
    "a bit of the state's first brace": lambda f: flip_a_bit(f / "state.json", place=0),
    "the state is empty": lambda f: os.truncate(f / "state.json", 0),
    "the state is another": lambda f: (f / "state.json").write_text("{}"),
    "the list is empty": lambda f: os.truncate(f / "part-0.json", 0),
    "the list is another": lambda f: (f / "part-0.json").write_text("[]"),
    "a bit of the list": lambda f: flip_a_bit(f / "part-0.json"),
    "a bit of the list's first brace": lambda f: flip_a_bit(f / "part-0.json", place=0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_removed_and_the_one_before_is_used(tmp_path, damage):
    writer, told = saver(tmp_path, "save.keep=3"), Told()
    for step in (1, 2, 3):
        save(writer, step)
    folder = tmp_path / "checkpoints" / "step-0000003-0"
    DAMAGES[damage](folder)
    assert loaded(tmp_path, told) == (2, b"\2")
    (event,) = told
    assert (event.kind, event.facts["step"]) == ("checkpoint_corrupt", 3)
    assert event.line.startswith(f"{folder}: is damaged and is not used: {folder}/")
    assert len(event.line.splitlines()) == 1
    assert not folder.exists()
    assert loaded(tmp_path) == (2, b"\2")


def test_where_no_checkpoint_is_whole_a_run_stops_with_one_line(tmp_path):
    writer, told, weights = saver(tmp_path), Told(), Weights(b"untouched")
    for step in (1, 2):
        save(writer, step)
        flip_a_bit(tmp_path / "checkpoints" / f"step-000000{step}-0" / "engine" / "weights-0.pt")
    with pytest.raises(UserError, match="no checkpoint is whole; name another run") as caught:
        resume(weights, tmp_path, ranks=ALONE, tell=told)
    assert len(caught.value.lines) == 1
    assert str(tmp_path / "checkpoints") in caught.value.lines[0]
    assert told.kinds == ["checkpoint_corrupt"] * 2
    assert weights.content == b"untouched"


def test_a_run_without_checkpoints_begins_at_the_beginning(tmp_path):
    assert resume(Weights(), tmp_path, ranks=ALONE, tell=Told()) is None


def test_a_checkpoint_that_is_not_complete_is_passed_over_in_silence(tmp_path):
    writer, told = saver(tmp_path), Told()
    save(writer, 1)
    save(writer, 2)
    (tmp_path / "checkpoints" / "step-0000002-0" / "part-0.json").unlink()  # a kill before it
    assert loaded(tmp_path, told) == (1, b"\1")
    assert told == []


def test_all_workers_take_the_same_checkpoint_where_the_newest_is_damaged(tmp_path):
    for step in (1, 2):
        save(saver(tmp_path, "save.keep=3"), step)
    flip_a_bit(tmp_path / "checkpoints" / "step-0000002-0" / "engine" / "weights-0.pt")

    def work(ranks: Thread) -> tuple[bytes, list[str]]:
        weights, told = Weights(rank=0), Told()
        resume(weights, tmp_path, ranks=ranks, tell=told)
        return weights.content[:1], told.kinds

    assert on_threads(3, work) == [(b"\1", ["checkpoint_corrupt"]), (b"\1", []), (b"\1", [])]


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


def test_a_damaged_object_is_told_and_the_checkpoint_before_is_used(url):
    names = ["engine/weights-0.pt", "rng-0.pt", "part-0.json", "state.json"]
    writer = saver(url, "save.keep=9")
    for step in range(1, 2 + len(names)):
        save(writer, step)
    for step, name in enumerate(names, start=2):
        place = url / "checkpoints" / f"step-000000{step}-0" / name
        data = read_file(place)
        assert data is not None
        publish(place, data[:-3])
    told = Told()
    assert loaded(url, told) == (1, b"\1")
    assert [(event.kind, event.facts["step"]) for event in told] == [
        ("checkpoint_corrupt", step) for step in (5, 4, 3, 2)
    ]
    assert names_in(url / "checkpoints") == {"step-0000001-0"}


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
