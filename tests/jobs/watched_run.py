"""A `glmae pretrain` in a process of its own, seen only through its run folder."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from glmae_ray.jobs.sittings import read_sittings
from glmae_ray.journal import Record, read_lines
from glmae_ray.tracking import read_events, read_metrics


class Look(NamedTuple):
    """A run at one moment.

    Attributes:
        sitting: Number of the newest one that has finished a step; -1 before that.
        workers: It has.
        start: The step from which it went on.
        step: The newest step that is done.
        time: When that was, in seconds since 1970.
    """

    sitting: int
    workers: int
    start: int
    step: int
    time: float


class WatchedRun:
    """The command, its process, and what the run folder tells of them."""

    def __init__(self, run: Path, *, words: Sequence[str], env: Mapping[str, str]) -> None:
        """Describe the run; `start` starts it.

        Args:
            run: The run folder.
            words: Of `glmae pretrain`, without `run`.
            env: Of its process; RAY_ADDRESS in it names the cluster.
        """
        self.run, self._env = run, dict(env)
        more = [f"run={run}", "log.every_steps=1", "log.samples=true"]
        self._command = [sys.executable, "-m", "glmae_ray.cli", "pretrain", *words, *more]
        self.output = run.with_name(f"{run.name}.out")  # of all its drivers
        self.driver: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Give the command, again if it was given before."""
        with self.output.open("ab") as out:
            self.driver = subprocess.Popen(
                self._command, env=self._env, stdout=out, stderr=out, start_new_session=True
            )

    def stop(self) -> None:
        """End the driver, if it still runs."""
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()

    def leave(self, *, timeout_s: float) -> int:
        """Ask the driver to save and to leave, and wait until it has; its exit status."""
        assert self.driver is not None
        self.driver.send_signal(signal.SIGTERM)
        return self.wait(timeout_s=timeout_s)

    def wait(self, *, timeout_s: float) -> int:
        """Until the driver ends; its exit status."""
        assert self.driver is not None
        return self.driver.wait(timeout_s)

    def has_ended(self) -> bool:
        """Whether the driver is gone."""
        return self.driver is not None and self.driver.poll() is not None

    def look(self) -> Look:
        """See how far the run is."""
        records = [r for r in read_metrics(self.run) if "loss" in r]
        if not records:
            return Look(-1, 0, 0, 0, 0.0)
        newest = records[-1]
        # The newest sitting may not have finished a step yet.
        begun = [s for s in read_sittings(self.run) if s["time"] < newest["time"]]
        last = begun[-1]
        return Look(last["sitting"], last["workers"], last["start"], newest["step"], newest["time"])

    def time_of(self, step: int) -> float:
        """When a step was done, in seconds since 1970."""
        (found,) = [r for r in read_metrics(self.run) if "loss" in r and r["step"] == step]
        return float(found["time"])

    def wait_for(self, *, step: int, timeout_s: float = 180) -> Look:
        """Until a step is done, or a later one.

        Raises:
            RuntimeError: The driver ended, or it took too long.
        """
        return self._wait_until(f"step {step}", lambda now: now.step >= step, timeout_s)

    def wait_for_sitting(self, sitting: int, *, timeout_s: float = 180) -> Look:
        """Until a sitting has done a step, or a later one has; raises as `wait_for`."""
        what = f"step of sitting {sitting}"
        return self._wait_until(what, lambda now: now.sitting >= sitting, timeout_s)

    def _wait_until(self, what: str, is_there: Callable[[Look], bool], timeout_s: float) -> Look:
        until = time.monotonic() + timeout_s
        while not is_there(now := self.look()):
            if time.monotonic() > until or self.has_ended():
                raise RuntimeError(f"no {what}, but {now}: {self.said()[-2000:]}")
            time.sleep(0.1)
        return now

    def said(self) -> str:
        """All that its drivers have printed."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def events(self, kind: str) -> list[Record]:
        """Those of one kind in events.jsonl."""
        return [event for event in read_events(self.run) if event["event"] == kind]

    def losses(self) -> list[tuple[int, float]]:
        """Step and loss of every logged step, in the order of the file."""
        return [(r["step"], r["loss"]) for r in read_metrics(self.run) if "loss" in r]


def repeated_steps(run: Path) -> dict[int, int]:
    """Sitting -> steps of the one before that it went back behind, and does again."""
    sittings = read_sittings(run)
    done = {s["sitting"]: s["start"] for s in sittings}
    for line in _ledger(run):
        done[line["sitting"]] = max(done[line["sitting"]], line["step"])
    return {
        now["sitting"]: max(0, done[before["sitting"]] - now["start"])
        for before, now in itertools.pairwise(sittings)
    }


def wrong_steps(run: Path, *, steps: int, global_batch: int) -> dict[int, str]:
    """Steps of the surviving history that did not consume the plan's samples, each once.

    The surviving history is, for each step, what the last sitting did that got there.

    Returns:
        Step -> what is wrong with it; empty where nothing is.
    """
    consumed: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for line in _ledger(run):
        consumed[line["step"]][line["sitting"]] += line["samples"]
    wrong = {}
    for step in range(1, steps + 1):
        if not (sittings := consumed.get(step)):
            wrong[step] = "was never done"
            continue
        last = max(sittings)
        planned = list(range((step - 1) * global_batch, step * global_batch))
        if sorted(sittings[last]) != planned:
            wrong[step] = f"sitting {last} consumed {sorted(sittings[last])}"
    return wrong


def _ledger(run: Path) -> Iterator[Record]:
    for path in sorted((run / "samples").glob("*-rank*.jsonl")):
        yield from read_lines(path)
