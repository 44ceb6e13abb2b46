"""Resuming: damaged files, other numbers of workers, object stores; without Ray."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glmae_ray.errors import UserError
from glmae_ray.jobs.resuming import resume
from glmae_ray.paths import Place, names_in, publish, read_file, to_place
from tests.jobs.checkpoints import loaded, save, saver
from tests.jobs.fakes import ALONE, Thread, Told, Weights, on_threads


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


# In an object store


@pytest.fixture
def url(bucket) -> Place:
    return to_place(f"{bucket}/runs/a")


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
