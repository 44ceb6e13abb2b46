"""The parts of a comparison: run, killed, kept, and put together into a table."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray

from benchmarks._compare_cases import check_cases
from benchmarks._compare_config import Cell, CompareConfig
from benchmarks._compare_folder import LOCK, alone_in
from benchmarks._compare_outcome import outcome_of
from benchmarks._compare_parts import Part, evaluation_of
from benchmarks._compare_run import Runner
from benchmarks._compare_statistics import (
    cell_summary,
    difference_summary,
    draw,
    seed_means,
)
from benchmarks._compare_table import as_csv, markdown
from glmae_ray.errors import StoppedError
from glmae_ray.paths import publish
from tests.comparisons import NAMES, TIMES, config, planted, store, values, words
from tests.conftest import start_ray

__all__ = ["store", "words"]


@dataclass(frozen=True)
class Script(Part):
    """A part that runs a line of Python in place of `glmae`, and leaves a file when it is done."""

    line: str = ""

    @property
    def done(self) -> Path:
        return self.folder / f"{self.name}.done"

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", f"{self.line}\nopen({str(self.done)!r}, 'w').close()"]

    def is_complete(self) -> bool:
        return self.done.exists()


@pytest.fixture
def script(words, tmp_path):
    cfg = config(words).pretraining("glmae", 0)

    def make(name: str, line: str = "", after: str | None = None) -> Script:
        return Script("pretrain", name, cfg, tmp_path, after, line=line)

    return make


def run(folder: Path, *parts: Part) -> dict[str, str]:
    with alone_in(folder) as lock, Runner(lock) as runner:
        return runner.run(parts)


def test_a_part_that_fails_is_told_with_its_line_and_the_others_go_on(script, tmp_path, capsys):
    says = "import sys; print('steps: 1\\nglmae pretrain: failed: no room\\nlog: x'); sys.exit(1)"
    parts = [
        script("a", says),
        script("b", after="pretrain a"),
        script("c", "import os; os.kill(os.getpid(), 9)"),
        script("d", "raise SystemExit('never heard of it')"),
        script("e"),
    ]
    assert run(tmp_path, *parts) == {
        "pretrain a": "no room",
        "pretrain b": "not done: pretrain a failed",
        "pretrain c": "ended by SIGKILL",
        "pretrain d": "never heard of it",
    }
    assert parts[4].is_complete()
    assert "[1/5] pretrain a: failed: no room" in capsys.readouterr().out
    assert "no room" in parts[0].log.read_text()


def test_what_is_complete_is_not_done_again(script, tmp_path):
    first, second = script("a"), script("b")
    run(tmp_path, first, second)
    second.done.unlink()
    stamp = first.done.stat().st_mtime_ns
    assert run(tmp_path, first, second) == {}
    assert second.is_complete()
    assert first.done.stat().st_mtime_ns == stamp


def test_a_signal_goes_on_to_the_part_and_ends_the_row(script, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    waits = (
        "import signal, sys, time, pathlib\n"
        f"def leave(*_): pathlib.Path({str(tmp_path / 'told')!r}).touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(600)"
    )

    def stop() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(StoppedError) as stopped:
        run(tmp_path, script("a", waits), script("b"))
    thread.join()
    assert stopped.value.number == signal.SIGTERM
    assert (tmp_path / "told").exists()
    assert not script("b").is_complete()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_part_that_outlives_its_command_keeps_the_folder_until_it_ends(tmp_path):
    line = (
        "import subprocess, sys, time; from pathlib import Path\n"
        "from benchmarks._compare_folder import alone_in, tell_who\n"
        f"with alone_in(Path({str(tmp_path)!r})) as lock:\n"
        "    part = subprocess.Popen(['sleep', '600'], pass_fds=[lock])\n"
        "    tell_who(lock, f'process {part.pid}: part a')\n"
        "    print(part.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = subprocess.Popen([sys.executable, "-c", line], stdout=subprocess.PIPE)
    assert command.stdout is not None
    part = int(command.stdout.readline())
    command.kill()
    command.wait()
    command.stdout.close()
    with (tmp_path / LOCK).open("rb") as file:
        assert file.read() == f"process {part}: part a".encode()
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.kill(part, signal.SIGKILL)
        fcntl.flock(file, fcntl.LOCK_EX)


# What comes out

KIDNEYS = ("liver", "spleen", "kidney")


def evaluated(cfg: CompareConfig, cell: Cell, *, dice: float, best: bool = True) -> Part:
    """Leave an evaluation of three cases, as `glmae evaluate` writes it; its part."""
    part = evaluation_of(cfg, cell)
    score = {"dice": dice, "nsd": dice, "hd95": 1.0}
    cases = {case: dict.fromkeys(KIDNEYS, score) for case in "abc"}
    report = {"cases": cases, "faults": {}} | ({"best": {"cases": cases}} if best else {})
    publish(Path(part.cfg.run) / "segmenter.safetensors", f"weights of {cell.name}")
    publish(Path(part.cfg.run) / "evaluation.json", json.dumps(report))
    part.keep_outcome()
    return part


def test_an_evaluation_is_that_of_its_weights_and_no_other(words):
    cfg = config(words)
    part = evaluated(cfg, cfg.cells[0], dice=0.5)
    run = Path(part.cfg.run)
    publish(run / "evaluation.json", "of another split")
    assert part.is_complete()
    assert part.outcome()["cases"]["a"]["liver"]["dice"] == 0.5
    publish(run / "segmenter.safetensors", "others")
    assert not part.is_complete()


def test_arms_are_compared_at_each_fraction_and_a_cell_without_a_seed_has_failed(words):
    cfg = config(words)
    dices = {"scratch": 0.4, "local_mae": 0.5, "glmae": 0.7}
    for cell in cfg.cells:
        if cell != Cell("local_mae", 0.5, 1):
            evaluated(cfg, cell, dice=dices[cell.arm] + cell.fraction / 10, best=cell.seed == 0)
    faults = {"finetune local_mae-0.5-1": "no room"}
    found = outcome_of(cfg, check_cases(cfg), faults)
    cells = {(cell["arm"], cell["fraction"]): cell for cell in found["cells"]}
    assert cells["glmae", 1.0]["mean"]["dice"] == pytest.approx(0.8)
    assert cells["glmae", 1.0]["seeds"].keys() == {"0", "1"}
    assert cells["glmae", 1.0]["dice_of_seeds"]["b"]["kidney"] == pytest.approx([0.8, 0.8])
    assert "best" not in cells["glmae", 1.0]  # of one seed alone it would be no mean
    assert cells["glmae", 0.5]["labelled_cases"] == [3, 3]
    assert cells["local_mae", 0.5]["failed"] == faults
    differences = {
        (one["arm"], one["against"], one["fraction"]): one for one in found["differences"]
    }
    assert len(differences) == 6
    assert differences["glmae", "scratch", 0.5]["mean"]["dice"] == pytest.approx(0.3)
    assert differences["glmae", "local_mae", 1.0]["mean"]["dice"] == pytest.approx(0.2)
    assert "failed" in differences["glmae", "local_mae", 0.5]
    assert found["cases"] == ["a", "b", "c"]


def test_a_case_that_one_cell_could_not_evaluate_is_left_out_everywhere(words):
    cfg = config(words, "fractions=[1.0]", "seeds=[0]", "arms={scratch: null, glmae: {}}")
    for cell in cfg.cells:
        evaluated(cfg, cell, dice=0.5)
    part = evaluation_of(cfg, cfg.cells[0])
    report = part.outcome()
    del report["cases"]["b"]
    publish(Path(part.cfg.run) / "evaluation.json", json.dumps(report | {"faults": {"b": "x"}}))
    part.keep_outcome()
    found = outcome_of(cfg, check_cases(cfg), {})
    assert (found["cases"], found["left_out"]) == (["a", "c"], ["b"])
    assert "could evaluate them: b." in markdown(found)


# Tables


def found(**change) -> dict:
    """A comparison of one fraction with a cell that failed."""
    dices = planted(np.random.default_rng(0), seeds=2)
    draws = draw(30, 2, times=TIMES, seed=0)
    ours, theirs = values(dices + 0.1), values(dices)
    head = {"fraction": 0.1, "labelled_cases": [3, 4]}
    seeds = dict(zip("01", seed_means(ours), strict=True))
    best = {"best": cell_summary(ours, NAMES, draws)}
    difference = difference_summary(ours, theirs, NAMES, draws)
    return {
        "structures": [*NAMES],
        "cells": [
            {"arm": "scratch", **head, "failed": {"finetune scratch-0.1-0": "no room"}},
            {"arm": "glmae", **head, **cell_summary(ours, NAMES, draws), "seeds": seeds} | best,
        ],
        "differences": [
            {"arm": "glmae", "against": "scratch", "fraction": 0.1, "failed": {}},
            {"arm": "glmae", "against": "mae", "fraction": 0.1, **difference, "best": difference},
        ],
        "covers": ["What it covers."],
        "left_out": [],
        "faults": {"finetune scratch-0.1-0": "no room"},
        **change,
    }


def test_the_table_has_figures_intervals_seeds_and_what_failed():
    text = markdown(found())
    lines = text.splitlines()
    scratch = next(line for line in lines if line.startswith("| scratch"))
    assert scratch == "| scratch | 10 % (3/4) | failed | - | - | - | - |"
    glmae = next(line for line in lines if line.startswith("| glmae |")).split("|")
    value = found()["cells"][1]["mean"]["dice"]
    low, high = found()["cells"][1]["intervals"]["mean"]["dice"]
    assert glmae[3].strip() == f"{value:.3f} ({low:.3f} - {high:.3f})"
    assert len(glmae[6].split(",")) == 2
    assert "| glmae - mae | 10 % | +0.100 (+0.100 to +0.100) |" in text
    assert "What it covers." in lines
    assert "Failed: finetune scratch-0.1-0: no room" in lines
    widths = {line.count("|") for line in lines if line.startswith(("| arm", "| glmae |", "| scr"))}
    assert widths == {8}


def test_the_csv_has_every_figure_of_every_cell():
    rows = list(csv.DictReader(io.StringIO(as_csv(found()))))
    assert sum(row["failed"] == "failed" for row in rows) == 2
    (mean,) = [
        row
        for row in rows
        if (row["arm"], row["against"], row["structure"], row["figure"])
        == ("glmae", "mae", "mean", "dice")
        and row["weights"] == "last"
    ]
    assert float(mean["value"]) == pytest.approx(0.1)
    assert sum(row["seed"] == "1" for row in rows) == 3


# The whole way


def command(words: list[str], out: Path) -> list[str]:
    """Of one arm, one fraction and one seed: a run of each verb."""
    more = [f"out={out}", "arms={glmae: {}}", "fractions=[1.0]", "seeds=[0]"]
    for verb in ("pretrain", "finetune"):
        more += [f"{verb}.{name}" for name in ("steps=30", "save.every_steps=2")]
        more += [f"{verb}.log.{name}" for name in ("every_steps=1", "pictures=false")]
    return [sys.executable, "-m", "benchmarks.compare", *words, *more]


def start_and_kill(words: list[str], run: Path, *, step: int) -> int:
    """SIGKILL a command once a run has done some steps; the part, which goes on alone."""
    process = subprocess.Popen(words)
    metrics, until = run / "metrics.jsonl", time.monotonic() + 1200
    while not metrics.exists() or f'"step": {step}' not in metrics.read_text():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.kill()
    process.wait()
    who = (run.parents[1] / LOCK).read_text()  # process 123: finetune ...
    return int(who.split()[1].rstrip(":"))


@pytest.fixture
def joined_ray(monkeypatch) -> Iterator[None]:
    """One Ray for all parts, which join it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ADDRESS", start_ray())
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.ray
def test_a_comparison_that_is_killed_twice_ends_with_the_table_of_one_that_is_not(
    words, joined_ray, tmp_path
):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    subprocess.run(command(words, calm), check=True)
    words = command(words, killed)
    start_and_kill(words, killed / "pretrain" / "glmae", step=3)
    part = start_and_kill(words, killed / "finetune" / "glmae-1-0", step=5)
    os.kill(part, signal.SIGKILL)
    again = subprocess.run(words, check=True, capture_output=True, text=True)
    assert "3 parts, 1 of them complete" in again.stdout
    assert (killed / "comparison.md").read_text() == (calm / "comparison.md").read_text()
    stamps = {p: p.stat().st_mtime_ns for p in killed.glob("*/*/*") if p.is_file()}
    third = subprocess.run(words, check=True, capture_output=True, text=True)
    assert "3 parts, 3 of them complete" in third.stdout
    assert {p: p.stat().st_mtime_ns for p in killed.glob("*/*/*") if p.is_file()} == stamps
    found = json.loads((killed / "comparison.json").read_text())
    (cell,) = found["cells"]
    assert cell["best"]["mean"]["dice"] is not None
    assert cell["dice_of_seeds"].keys() == {*found["cases"]}
