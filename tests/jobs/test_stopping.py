"""Signals to the driver: a wish that the workers read, a second one that leaves at once."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from ray.experimental import internal_kv
from safetensors.numpy import load_file

from glmae_ray import checkpoint
from glmae_ray.cli import main
from glmae_ray.errors import StoppedError
from glmae_ray.jobs import stopping
from glmae_ray.jobs.stopping import fit_or_stop, stop_requested
from glmae_ray.tracking import read_metrics
from tests.jobs.test_pretrain import words

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def kv(monkeypatch) -> dict[bytes, bytes]:
    """In the place of Ray's table of keys and values."""
    kv: dict[bytes, bytes] = {}
    monkeypatch.setattr(internal_kv, "_internal_kv_put", lambda k, v, *_, **__: kv.update({k: v}))
    monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda k, **_: kv.get(k))
    monkeypatch.setattr(internal_kv, "_internal_kv_del", lambda k, **_: kv.pop(k, None))
    return kv


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of before are back after each test."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def wait_for_wish(run: str) -> str:
    """As the workers do, at their meetings."""
    until = time.monotonic() + 60
    while (wish := stop_requested(run)) is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    return wish


def test_a_run_that_nobody_stops_ends_when_its_workers_have(kv):
    done = []
    fit_or_stop(lambda: done.append(threading.current_thread().name), run="a")
    assert done == ["fit"]
    assert kv == {}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_becomes_a_wish_that_the_workers_read(kv, capsys, number):
    wishes = []

    def fit() -> None:
        send(number)
        wishes.append(wait_for_wish("a"))
        assert stop_requested("b") is None  # another run in the same Ray
        assert stop_requested("a") == wishes[0]  # it stays until all have read it

    with pytest.raises(StoppedError, match=number.name) as caught:
        fit_or_stop(fit, run="a")
    assert caught.value.number == number
    assert wishes == [number.name]
    assert kv == {}  # a later driver of the run does not find it
    assert capsys.readouterr().err.startswith(f"{number.name}: saving a checkpoint, then leaving")


@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_leaves_at_once(kv, second):
    ends = threading.Event()

    def fit() -> None:
        send(signal.SIGTERM)
        wait_for_wish("a")
        send(second)
        ends.wait(60)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fit_or_stop(fit, run="a")
    assert time.monotonic() - began < 30
    assert kv == {}
    ends.set()


def test_the_error_of_the_workers_is_that_of_the_run(kv):
    def fit() -> None:
        raise RuntimeError("rank 1 has died")

    with pytest.raises(RuntimeError, match="rank 1 has died"):
        fit_or_stop(fit, run="a")


def test_workers_that_fail_after_a_signal_have_failed(kv):
    def fit() -> None:
        send(signal.SIGTERM)
        wait_for_wish("a")
        raise RuntimeError("rank 1 has died")

    with pytest.raises(RuntimeError, match="rank 1 has died"):
        fit_or_stop(fit, run="a")
    assert kv == {}


def test_a_wish_that_a_killed_driver_left_does_not_stop_the_run(kv):
    kv.update({b"a": b"SIGTERM", b"b": b"SIGINT"})
    fit_or_stop(lambda: stop_requested("a") and pytest.fail("it stops"), run="a")
    assert kv == {b"b": b"SIGINT"}


def test_beside_the_main_thread_where_no_signal_comes_a_run_trains_as_well(kv):
    kv[b"a"] = b"SIGTERM"
    with ThreadPoolExecutor(1) as pool:
        pool.submit(fit_or_stop, lambda: None, run="a").result()
        failed = pool.submit(fit_or_stop, lambda: 1 / 0, run="a")
        with pytest.raises(ZeroDivisionError):
            failed.result()
    assert kv == {}


# Through the door. What a stop leaves and how it goes on is in test_pretrain as well.


@pytest.fixture
def long_words(small_store) -> list[str]:
    """Of a run that is long enough to be stopped in the midst."""
    return words(small_store, Path("none"), "steps=150", "save.every_steps=50", "log.every_steps=5")


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """A driver that starts a Ray of its own, in a process group as a shell makes one."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "glmae_ray.cli", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_step(run: Path, step: int, driver: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 300
    while max((r["step"] for r in read_metrics(run) if "loss" in r), default=0) < step:
        assert time.monotonic() < until, "the run did not get there"
        assert driver.poll() is None, "the run ended too early to be stopped"
        time.sleep(0.05)


@pytest.mark.ray
@pytest.mark.slow
def test_a_terminal_s_interrupt_in_the_midst_of_a_run_costs_nothing(long_words, tmp_path):
    run, undisturbed = tmp_path / "it's mine", tmp_path / "undisturbed"
    driver = start([*long_words, f"run={run}"])
    wait_for_step(run, 20, driver)
    os.killpg(driver.pid, signal.SIGINT)  # a terminal sends it to all processes
    out, err = driver.communicate(timeout=240)
    assert driver.returncode == 130, err
    step = checkpoint.latest_step(run)
    assert 20 <= step < 150
    assert f"SIGINT: saved at step {step} of 150" in out
    (line,) = (line for line in err.splitlines() if "continue with: " in line)
    command = shlex.split(line.partition("continue with: ")[2])
    assert command == ["glmae", *long_words, f"run={run}"]
    assert main(command[1:]) == 0
    assert main([*long_words, f"run={undisturbed}"]) == 0
    ours, theirs = (load_file(folder / "encoder.safetensors") for folder in (run, undisturbed))
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.ray
@pytest.mark.slow
def test_a_second_interrupt_leaves_no_process_behind(long_words, tmp_path):
    run = tmp_path / "run"
    driver = start([*long_words, f"run={run}"])
    wait_for_step(run, 5, driver)
    processes = psutil.Process(driver.pid).children(recursive=True)
    assert len(processes) > 3  # those of Ray
    driver.send_signal(signal.SIGINT)
    time.sleep(0.3)
    driver.send_signal(signal.SIGINT)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 130
    # The first may have been in time for the workers, on a machine that is slow to send the second.
    assert "the same command continues" in err or "continue with: " in err
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_a_head_is_lost_when_it_has_not_answered_for_long(monkeypatch):
    answers = [True, False, False, True]
    monkeypatch.setattr(stopping._Head, "answers", lambda _: answers.pop(0))
    now = iter((0.0, 3.0, 6.0, 20.0, 40.0, 43.0))
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(stopping, "_HEAD_S", 30.0)
    head = stopping._Head()
    assert not head.is_lost()  # it answers, at 6
    assert not head.is_lost()
    assert head.is_lost()  # at 40, silent since 6
