"""A step that does not end: which rank is named, and that its worker group ends; without Ray."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.experimental import internal_kv

from glmae_ray.jobs import hang
from glmae_ray.jobs.hang import HangWatch, hang_event, place_of
from glmae_ray.ranks import Ranks
from tests.jobs.fakes import ALONE, Told

IN_COLLECTIVE = {"line": "told (ranks.py:50), in broadcast", "collective": True}
APART = {"line": "publish (paths.py:79), in fsync", "collective": False}


# The event


def test_a_rank_that_others_wait_for_is_named_with_where_it_stands():
    event = hang_event(41, {0: IN_COLLECTIVE, 1: APART, 2: IN_COLLECTIVE}, ranks=3, limit_s=600)
    assert event.kind == "hang"
    assert event.line.startswith("step 42: not done after 600 s (resources.hang_s): rank 1 is in ")
    assert "rank 1 is in publish (paths.py:79), in fsync; the workers start again" in event.line
    assert "rank 0" not in event.line
    assert (event.facts["step"], event.facts["ranks"]) == (41, [1])
    assert event.facts["places"]["0"] == IN_COLLECTIVE
    json.dumps(event.facts)


def test_a_rank_that_does_not_answer_is_named():
    event = hang_event(0, {1: IN_COLLECTIVE, 3: IN_COLLECTIVE}, ranks=4, limit_s=0.5)
    assert "(resources.hang_s): rank 0 does not answer; rank 2 does not answer; " in event.line
    assert event.facts["ranks"] == [0, 2]


def test_where_all_wait_in_a_collective_the_network_is_looked_at():
    event = hang_event(0, {0: IN_COLLECTIVE, 1: IN_COLLECTIVE}, ranks=2, limit_s=9)
    assert "every rank waits in a collective: look at the network between them" in event.line
    assert event.facts["ranks"] == []


# Where a thread stands


@pytest.fixture
def stood() -> Iterator[threading.Event]:
    """Lets a thread go that stands in `stand`."""
    event = threading.Event()
    yield event
    event.set()


def stand(event: threading.Event) -> None:
    event.wait(60)


def test_a_thread_stands_in_the_last_line_of_ours_and_in_the_call_below_it(stood):
    thread = threading.Thread(target=stand, args=(stood,))
    thread.start()
    place = place_of(thread.ident)
    stood.set()
    thread.join()
    assert place["line"].endswith("in wait")
    assert not place["collective"]


@pytest.mark.parametrize("folder", ["torch/distributed", "deepspeed/comm"])
def test_a_thread_in_a_collective_is_seen(stood, folder):
    names: dict[str, Any] = {}
    code = "def all_reduce(event):\n    event.wait(60)\n"
    exec(compile(code, f"/lib/{folder}/comm.py", "exec"), names)
    thread = threading.Thread(target=names["all_reduce"], args=(stood,))
    thread.start()
    place = place_of(thread.ident)
    stood.set()
    thread.join()
    assert place["collective"]


# The watch


@pytest.fixture
def kv(monkeypatch) -> dict[bytes, bytes]:
    """In the place of Ray's table of keys and values."""
    kv: dict[bytes, bytes] = {}
    monkeypatch.setattr(internal_kv, "_internal_kv_put", lambda k, v, *_, **__: kv.update({k: v}))
    monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda k, **_: kv.get(k))
    return kv


@pytest.fixture
def ended(monkeypatch) -> threading.Event:
    """Is set when the process would have ended."""
    event = threading.Event()

    def end(code: int) -> None:
        assert code == 1
        event.set()
        threading.Event().wait()  # what has ended does nothing more

    monkeypatch.setattr(os, "_exit", end)
    return event


def test_a_step_that_takes_too_long_is_told_and_ends_the_process(kv, ended):
    told = Told()
    watch = HangWatch("run", ranks=ALONE, limit_s=0.3, tell=told)
    watch.beat(7)
    assert ended.wait(30)
    (event,) = told
    assert (event.facts["step"], event.facts["ranks"]) == (7, [0])
    assert event.line.startswith("step 8: not done after 0.3 s (resources.hang_s): rank 0 is in ")
    assert "wait" in event.line  # where this test stands


class Clock:
    """Stands while the machine does something else."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return 0


def test_a_run_that_beats_goes_on_and_one_that_is_over_is_not_watched(kv, ended, monkeypatch):
    told, clock = Told(), Clock()
    monkeypatch.setattr(hang, "time", clock)
    watch = HangWatch("run", ranks=ALONE, limit_s=0.2, tell=told)
    clock.now += 100  # the first step may take its time
    for step in range(5):
        assert not ended.wait(0.15)  # it looks every 0.05 s
        watch.beat(step)
        clock.now += 0.15
    watch.close()
    clock.now += 100
    assert not ended.wait(0.5)
    assert told == []


def test_a_run_that_ends_while_others_are_waited_for_ends_well(kv, ended):
    watch = HangWatch("run", ranks=ALONE, limit_s=1.0, tell=Told())
    watch.beat(1)
    while not kv:
        time.sleep(0.01)
    watch.close()
    assert not ended.wait(1.5)


def test_only_the_first_rank_that_answers_tells(kv, ended):
    told = Told()
    watch = HangWatch("run", ranks=Ranks(1, 3, 1, None), limit_s=0.3, tell=told)
    kv[watch._key.encode() + b"0"] = json.dumps(IN_COLLECTIVE).encode()
    watch.beat(1)
    assert ended.wait(30)
    assert told == []


def test_what_an_earlier_sitting_posted_is_not_read(kv, ended):
    first, told = HangWatch("run", ranks=Ranks(0, 2, 0, None), limit_s=9, tell=Told()), Told()
    kv[first._key.encode() + b"1"] = json.dumps(APART).encode()
    first.close()
    second = HangWatch("run", ranks=Ranks(0, 2, 0, None), limit_s=0.3, tell=told)
    second.beat(1)
    assert ended.wait(30)
    assert "rank 1 does not answer" in told[0].line


def test_a_process_whose_ray_is_gone_as_well_ends_all_the_same(kv, ended, monkeypatch, capsys):
    def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError("no GCS")

    monkeypatch.setattr(internal_kv, "_internal_kv_put", lost)
    HangWatch("run", ranks=ALONE, limit_s=0.3, tell=Told()).beat(1)
    assert ended.wait(30)
    assert "no GCS" in capsys.readouterr().err


# Two processes over gloo


def test_two_processes_end_and_the_one_that_the_other_waits_for_is_named(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.jobs.standing_still", str(rank), str(tmp_path), address],
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [1, 1]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    (told,) = tmp_path.glob("event-*.json")
    line, facts = json.loads(told.read_text())
    assert (facts["step"], facts["ranks"]) == (3, [1])
    assert line.startswith("step 4: not done after 3 s (resources.hang_s): rank 1 is in ")
    assert facts["places"]["0"]["collective"]
