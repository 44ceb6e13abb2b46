"""`glmae tune` through its door: trials, one of which fails; kill, stop and resume; pbt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from glmae_ray.cli import main
from glmae_ray.jobs.sittings import read_sittings
from glmae_ray.jobs.trials import generations, read_trials
from glmae_ray.store.index import read_rows
from glmae_ray.tracking import read_metrics
from tests.models.finetunes import TINY
from tests.test_crops import write_store

pytestmark = pytest.mark.ray

WORDS = [
    *(f"finetune.{word}" for word in TINY[2:] if not word.startswith(("init", "steps"))),
    *("finetune.model.channels=1", "finetune.crops.window=[-300,600]"),
    *("finetune.log.every_steps=1", "finetune.log.pictures=false"),
]
NONE = "finetune.init=none"
LR = "search.optim.lr={loguniform: [1e-4, 1e-2]}"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("tune") / "store", cases=4)


def words(store: Path, run: Path, *more: str, steps: int, every: int) -> list[str]:
    lengths = [f"steps={steps}", f"validation.every_steps={every}", f"save.every_steps={every}"]
    return [
        *("tune", *WORDS, f"store={store}", f"run={run}"),
        *(f"finetune.{word}" for word in lengths),
        *more,
    ]


def test_a_trial_that_fails_ends_no_search_and_again_nothing_is_done_twice(
    store, local_ray, tmp_path, capsys
):
    run = tmp_path / "search"
    inits = f"search.init={{grid: [none, {tmp_path / 'nowhere'}]}}"
    command = words(store, run, inits, LR, "trials=3", "retries=0", steps=2, every=1)
    assert main(command) == 0
    told = capsys.readouterr().out
    states = [trial.state for trial in read_trials(run).values()]
    assert states == ["finished", "failed", "finished"]
    assert "trial 0001: failed: " in told
    assert "nowhere: has no encoder.safetensors" in told
    rows = read_rows((run / "trials.parquet").read_bytes())
    for row in (rows[0], rows[2]):
        dice = [r["val"]["mean"] for r in read_metrics(Path(row["run"])) if "val" in r]
        assert (row["dice_last"], row["dice_best"], row["step"]) == (dice[-1], max(dice), 2)
    assert "nowhere: has no encoder" in rows[1]["reason"]
    best = max((rows[0], rows[2]), key=lambda row: row["dice_last"])
    assert best["is_best"]
    capsys.readouterr()
    assert main(["finetune", str(run / "best.yaml"), "store=s", "run=r", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["optim"]["lr"] == best["optim.lr"]
    assert list((run / "tune" / "0000").glob("events.*"))

    assert main(command) == 0
    assert len(read_sittings(run / "trials" / "0000")) == 1
    assert "2 finished" in capsys.readouterr().out
    assert main([*command, "seed=1"]) == 2
    assert "seed: 1, but" in capsys.readouterr().err


@dataclass(frozen=True)
class Search:
    """A search in a process, with a Ray of its own: one trial at a time on two CPUs."""

    process: subprocess.Popen[bytes]
    log: Path  # a pipe that nobody reads would stop it once it is full

    @classmethod
    def start(cls, command: list[str], *, log: Path) -> Search:
        environment = {name: text for name, text in os.environ.items() if name != "RAY_ADDRESS"}
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "glmae_ray.cli", *command],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        return cls(process, log)

    def wait_for(self, reached: Callable[[], bool]) -> None:
        """Until something is there; an end of the search before that is a failure."""
        until = time.monotonic() + 600
        while not reached():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.2)

    def end(self, number: int) -> str:
        """Send it a signal, 0 for none; what it said once it has ended."""
        if number:
            self.process.send_signal(number)
        self.process.wait(timeout=600)
        return self.log.read_text()


def last_step(run: Path) -> int:
    return max((r["step"] for r in read_metrics(run)), default=0)


@pytest.mark.slow
def test_a_killed_search_goes_on_without_a_finished_trial_and_from_checkpoints(store, tmp_path):
    run = tmp_path / "search"
    asha = ("trials=4", "schedule=asha", "judge_steps=40")
    command = words(store, run, NONE, LR, *asha, steps=400, every=40)
    search = Search.start(command, log=tmp_path / "log.txt")
    second = run / "trials" / "0001"
    # After a judgement that it passed, or it would be over.
    search.wait_for(lambda: (run / "trials" / "0000" / "summary.json").exists())
    first = read_trials(run)["0000"]
    search.wait_for(lambda: last_step(second) > 41 or "0002" in read_trials(run))
    search.end(signal.SIGKILL)
    before = {name: trial.state for name, trial in read_trials(run).items()}
    again = Search.start(command, log=tmp_path / "again.txt")
    told = again.end(0)
    assert again.process.returncode == 0, told
    after = read_trials(run)
    assert {trial.state for trial in after.values()} <= {"finished", "stopped"}
    assert len(after) == 4
    assert after["0000"].sample == first.sample
    for name, state in before.items():
        sittings = read_sittings(run / "trials" / name)
        assert len(sittings) == (2 if state == "running" else 1)


@pytest.mark.slow
def test_a_search_that_is_asked_to_stop_saves_its_trial_and_says_how_to_go_on(store, tmp_path):
    run = tmp_path / "search"
    command = words(store, run, NONE, LR, "trials=2", steps=400, every=100)
    search = Search.start(command, log=tmp_path / "log.txt")
    first = run / "trials" / "0000"
    search.wait_for(lambda: last_step(first) >= 5)
    told = search.end(signal.SIGTERM)
    assert search.process.returncode == 128 + signal.SIGTERM
    assert "continue with: glmae tune" in told
    assert [trial.state for trial in read_trials(run).values()] == ["running"]
    saved = [json.loads(p.read_text())["step"] for p in first.glob("checkpoints/*/state.json")]
    assert last_step(first) in saved
    again = Search.start(command, log=tmp_path / "again.txt")
    assert "2 finished" in again.end(0)
    assert [sitting["start"] for sitting in read_sittings(first)] == [0, max(saved)]


@pytest.mark.slow
def test_pbt_has_a_trial_go_on_from_a_better_one_with_other_fields(store, local_ray, tmp_path):
    run = tmp_path / "search"
    space = "search.optim.lr={grid: [1e-7, 1e-2]}"
    pbt = ("trials=2", "schedule=pbt", "judge_steps=20")
    command = words(store, run, NONE, space, *pbt, steps=100, every=20)
    assert main(command) == 0
    assert [trial.state for trial in read_trials(run).values()] == ["finished", "finished"]
    forks = [(name, place) for name in read_trials(run) for place in generations(run, name)[1:]]
    assert forks
    name, fork = forks[-1]
    origin = json.loads((fork / "fork.json").read_text())
    assert Path(origin["run"]).name.split("-")[0] != name
    assert read_sittings(fork)[0]["start"] == origin["step"]
    assert read_sittings(fork)[0]["checkpoint"] == origin["checkpoint"]
    config = json.loads((fork / "config.json").read_text())
    assert config["optim"]["lr"] == origin["changes"]["optim.lr"]
    theirs = {r["step"]: r["loss"] for r in read_metrics(Path(origin["run"])) if "loss" in r}
    ours = {r["step"]: r["loss"] for r in read_metrics(fork) if "loss" in r}
    assert sorted(ours) == list(range(1, 101))
    assert all(ours[step] == theirs[step] for step in range(1, origin["step"] + 1))
