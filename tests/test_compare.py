"""The comparison of initialisations: its statistics, its parts, what it refuses, how it goes on."""

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
from benchmarks._compare_folder import LOCK, alone_in, claim
from benchmarks._compare_outcome import outcome_of, pairs_of
from benchmarks._compare_parts import Part, evaluation_of, parts_of
from benchmarks._compare_run import Runner
from benchmarks._compare_statistics import (
    cell_summary,
    difference_summary,
    draw,
    seed_means,
    values_of,
)
from benchmarks._compare_table import as_csv, markdown
from benchmarks.compare import main
from glmae_ray.config_loading import load, shipped
from glmae_ray.errors import StoppedError, UserError
from glmae_ray.labelled import choose_cases
from glmae_ray.paths import publish
from glmae_ray.scores import summarise
from tests.test_crops import write_store

NAMES = ("liver", "spleen")
TIMES = 800

CONFIG = """
arms:
  scratch: null
  local_mae: {loss: {w_rg: 0, w_gg: 0, w_gl: 0}}
  glmae: {}
baselines: [scratch, local_mae]
fractions: [0.5, 1.0]
seeds: [0, 1]
model: {preset: tiny, patch: [8, 4, 2], width: 24, depth: 2, heads: 2}
pretrain:
  sampling: {where: "split == 'train' and case_id != 'p5'"}
  steps: 4
  global_batch: 2
  views: {global_size: [16, 12, 8], local_count: 2, local_size: [16, 8, 8]}
  optim: {base_lr: 0.03}
  engine: {precision: float32}
finetune:
  where: split == 'train' and case_id != 'p5'
  steps: 4
  global_batch: 2
  crops: {count: 1, size: [16, 12, 8], window: [-300, 600]}
  head: {feature_size: 4}
  optim: {lr: 0.01}
  engine: {precision: float32}
evaluate: {where: case_id == 'p5', bootstrap: 50}
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("compare") / "store")


@pytest.fixture
def words(store, tmp_path) -> list[str]:
    """Of a command for a folder that is not there yet."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    return [str(tmp_path / "config.yaml"), f"store={store}", f"out={tmp_path / 'out'}"]


def config(words: list[str], *more: str) -> CompareConfig:
    return load(CompareConfig, [*words, *more])


# Statistics


def scores(dices: np.ndarray) -> list[dict]:
    """Scores of each seed from Dice (seeds, cases, structures); the other figures follow it."""
    return [
        {
            f"case{n:02}": {
                name: None if np.isnan(dice) else {"dice": dice, "nsd": dice / 2, "hd95": 1 - dice}
                for name, dice in zip(NAMES, case, strict=True)
            }
            for n, case in enumerate(one.tolist())
        }
        for one in dices
    ]


def values(dices: np.ndarray) -> np.ndarray:
    cases = [f"case{n:02}" for n in range(dices.shape[1])]
    return values_of(scores(dices), cases, NAMES)


def planted(rng: np.random.Generator, *, seeds: int = 3, cases: int = 30) -> np.ndarray:
    """Dice of people who differ much from each other, (seeds, cases, structures)."""
    people = rng.normal(0.5, 0.15, (1, cases, 1))
    return people + rng.normal(0, 0.01, (seeds, cases, len(NAMES)))


def test_a_cell_of_one_seed_is_what_evaluate_says():
    dices = planted(np.random.default_rng(0), seeds=1)
    dices[0, 3, 1] = np.nan
    (one,) = scores(dices)
    theirs = summarise(one, structures=NAMES, bootstrap=TIMES, seed=7)
    ours = cell_summary(values(dices), NAMES, draw(30, 1, times=TIMES, seed=7))
    assert ours["mean"] == pytest.approx(theirs["mean"])
    assert ours["intervals"]["mean"]["dice"] == pytest.approx(theirs["intervals"]["mean"]["dice"])
    for name in NAMES:
        for figure, value in ours["structures"][name].items():
            assert value == pytest.approx(theirs["structures"][name][figure])


def test_figures_are_averaged_over_seeds_and_each_stands_alone_too():
    dices = planted(np.random.default_rng(1))
    found = cell_summary(values(dices), NAMES, draw(30, 3, times=TIMES, seed=0))
    assert found["mean"]["dice"] == pytest.approx(dices.mean())
    assert found["structures"]["spleen"]["nsd"] == pytest.approx(dices[..., 1].mean() / 2)
    alone = [mean["dice"] for mean in seed_means(values(dices))]
    assert alone == pytest.approx(dices.mean(axis=(1, 2)).tolist())


def test_a_planted_difference_is_found_though_people_differ_more_than_arms():
    dices = planted(np.random.default_rng(2))
    draws = draw(30, 3, times=TIMES, seed=0)
    cell = cell_summary(values(dices), NAMES, draws)
    low, high = cell["intervals"]["mean"]["dice"]
    assert high - low > 0.05
    found = difference_summary(values(dices + np.array([0.02, 0.04])), values(dices), NAMES, draws)
    assert found["mean"]["dice"] == pytest.approx(0.03)
    assert found["intervals"]["mean"]["dice"] == pytest.approx([0.03, 0.03])
    assert found["structures"]["liver"]["dice"] == pytest.approx(0.02)
    assert found["mean"]["hd95"] == pytest.approx(-0.03)


def test_what_only_seeds_change_widens_the_interval_of_a_difference():
    dices = planted(np.random.default_rng(3), seeds=4)
    shift = np.array([-0.1, 0.0, 0.1, 0.2])[:, None, None]
    found = difference_summary(
        values(dices + shift), values(dices), NAMES, draw(30, 4, times=TIMES, seed=0)
    )
    low, high = found["intervals"]["mean"]["dice"]
    assert found["mean"]["dice"] == pytest.approx(0.05)
    assert low < -0.02
    assert high > 0.12


def test_intervals_of_differences_hold_the_truth_about_as_often_as_they_say():
    rng, truth, hits, repeats = np.random.default_rng(4), 0.02, 0, 80
    for _ in range(repeats):
        base = planted(rng, seeds=8)
        own = rng.normal(truth, 0.02, (8, 1, 1)) + rng.normal(0, 0.03, (1, 30, 1))
        draws = draw(30, 8, times=100, seed=0)
        found = difference_summary(values(base + own), values(base), NAMES, draws)
        low, high = found["intervals"]["mean"]["dice"]
        hits += low <= truth <= high
    assert 0.85 <= hits / repeats <= 1


def test_seeds_and_cases_are_drawn_independently_of_each_other():
    draws = draw(2, 2, times=4000, seed=0)
    ties = np.corrcoef(draws.cases[:, 0], draws.seeds[:, 0])[0, 1]
    assert abs(ties) < 0.06
    assert (draw(5, 1, times=10, seed=0).seeds == 1).all()
    assert len(draw(1, 3, times=10, seed=0).seeds) == 0


def test_of_one_case_there_are_figures_and_no_intervals():
    dices = np.array([[[0.5, 0.7]], [[0.6, 0.8]]])
    found = cell_summary(values(dices), NAMES, draw(1, 2, times=TIMES, seed=0))
    assert found["mean"]["dice"] == pytest.approx(0.65)
    assert found["intervals"]["mean"]["dice"] is None


# The parts


def test_every_arm_is_pre_trained_once_and_every_cell_finetuned_and_evaluated(words):
    cfg = config(words)
    parts = parts_of(cfg)
    titles = [part.title for part in parts]
    assert len({*titles}) == len(titles) == 2 + 2 * 3 * 2 * 2
    assert titles[:2] == ["pretrain local_mae", "pretrain glmae"]
    assert titles[2:4] == ["finetune scratch-0.5-0", "evaluate scratch-0.5-0"]
    for part in parts:
        assert part.after is None or titles.index(part.after) < titles.index(part.title)
    each = parts_of(config(words, "pretrain_each_seed=true"))
    pretrains = [part for part in each if part.verb == "pretrain"]
    assert [part.cfg.seed for part in pretrains] == [0, 0, 1, 1]
    (one,) = [part for part in each if part.title == "finetune glmae-1-1"]
    assert one.cfg.init == pretrains[3].cfg.run


def test_arms_differ_in_their_loss_and_cells_in_what_they_start_from(words):
    cfg = config(words)
    trees = [cfg.pretraining(arm, 0).model_dump() for arm in ("local_mae", "glmae")]
    assert [tree.pop("loss")["w_gg"] for tree in trees] == [0, 1]
    assert len({tree.pop("run") for tree in trees}) == 2
    assert trees[0] == trees[1]
    for seed in cfg.seeds:
        cells = [cfg.finetuning(Cell(arm, 0.5, seed)).model_dump() for arm in cfg.arms]
        assert [cell.pop("init").split("/")[-1] for cell in cells] == ["none", "local_mae", "glmae"]
        assert len({cell.pop("run") for cell in cells}) == 3
        assert cells[0] == cells[1] == cells[2]
        assert cells[0]["seed"] == seed


def test_a_seed_has_the_same_labels_in_all_arms_and_few_are_among_all(words):
    cfg = config(words)
    for seed in cfg.seeds:
        few = [choose_cases(cfg.finetuning(Cell(arm, 0.5, seed))).train for arm in cfg.arms]
        every = choose_cases(cfg.finetuning(Cell("scratch", 1.0, seed))).train
        assert few[0].case_ids() == few[1].case_ids() == few[2].case_ids()
        assert len(few[0]) < len(every)
        assert {*few[0].case_ids()} < {*every.case_ids()}


def test_cases_that_count_are_those_of_every_split(words):
    cfg = config(words, "cases=channels == 1 and 'kidney' in structures", "evaluate.where=null")
    cell = Cell("scratch", 1.0, 0)
    assert choose_cases(cfg.finetuning(cell)).train.case_ids() == ["p0", "p3"]
    assert (
        cfg.finetuning(cell).val_where
        == "(split == 'val') and (channels == 1 and 'kidney' in structures)"
    )
    assert (
        cfg.evaluation(cell).where
        == "(split == 'test') and (channels == 1 and 'kidney' in structures)"
    )


def test_arms_are_held_against_the_baselines_that_are_there(words):
    assert pairs_of(config(words)) == [
        ("local_mae", "scratch"),
        ("glmae", "scratch"),
        ("glmae", "local_mae"),
    ]
    fewer = config(words, "arms={scratch: null, glmae: {}}")
    assert pairs_of(fewer) == [("glmae", "scratch")]


@pytest.mark.parametrize("name", ["headneck_cpu", "phantoms"])
def test_shipped_comparisons_are_right(name, tmp_path):
    given = [str(shipped(f"compare/{name}.yaml")), "store=s", f"out={tmp_path / 'out'}"]
    cfg = load(CompareConfig, given)
    assert {*cfg.baselines} <= {*cfg.arms}
    assert all(part.cfg.run.startswith(str(tmp_path)) for part in parts_of(cfg))


# What is refused


@pytest.mark.parametrize(
    ("more", "lines"),
    [
        (["arm={}"], ["arm: "]),
        (["arms={}"], ["arms: is empty"]),
        (["arms={a-b: null}"], ["arms.a-b: folders are named so"]),
        (["seeds=[1,1]"], ["seeds: [1, 1] names one twice"]),
        (["cases=split ="], ["cases: 'split =' is wrong: invalid syntax"]),
        (["out=s3://bucket/x"], ["out: s3://bucket/x is a URL"]),
        (["finetune.seed=3"], ["finetune.seed: is decided by the comparison"]),
        (["arms.glmae.seed=3"], ["arms.glmae.seed: is decided by the comparison"]),
        (["pretrain.seed=1", "pretrain_each_seed=true"], ["pretrain.seed: is decided"]),
        (
            ["finetune.task=classification", "finetune.targets=t.csv", "finetune.head.kind=mlp"],
            ["finetune.task: classification is not compared"],
        ),
        (["evaluate.weights=[best]"], ["evaluate.weights: ['best'] has to begin with last"]),
        (
            ["pretrain.stepz=3", "finetune.crops.size=7", "evaluate.split=all"],
            ["finetune.crops.size: (7, 7, 7)", "evaluate.split: ", "pretrain.stepz: "],
        ),
        (["arms.glmae.loss.w_xx=3"], ["arms.glmae.loss.w_xx: "]),
        (
            ["pretrain.sampling.where=split != 'val'"],
            ["arms.local_mae: sampling.where: 1 people", "arms.gl"],
        ),
        (["finetune.where=case_id == 'p5'"], ["finetune.where: 1 people are tested on too (p5)"]),
        (["finetune.val_where=case_id == 'p5'"], ["finetune.val_where: 1 people"]),
        (["evaluate.where=case_id == 'x'"], ["evaluate.where: \"case_id == 'x'\" selects 0"]),
    ],
)
def test_mistakes_are_told_a_line_each_before_anything_starts(words, tmp_path, capsys, more, lines):
    assert main([*words, *more]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(lines)
    for line, start in zip(said, lines, strict=True):
        assert line.startswith(f"compare: {start}")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_comparison_is_refused_with_the_fields(words):
    claim(config(words), fingerprint="f")
    claim(config(words, "pretrain.resources.workers=2"), fingerprint="f")
    changed = ("finetune.steps=5", "arms.glmae.loss.w_gg=0.5", "evaluate.bootstrap=60")
    with pytest.raises(UserError) as caught:
        claim(config(words, *changed), fingerprint="g")
    assert [line.split(":")[0] for line in caught.value.lines] == [
        *("finetune.steps", "evaluate.bootstrap", "arms.glmae.loss.w_gg", "store_fingerprint")
    ]
    assert "5, but " in caught.value.lines[0]
    assert "was started with 4; name another out" in caught.value.lines[0]


def test_arms_fractions_and_seeds_may_come_and_go(words):
    claim(config(words, "arms={scratch: null, glmae: {}}", "seeds=[0]"), fingerprint="f")
    claim(config(words, "fractions=[0.25]"), fingerprint="f")
    claim(config(words, "arms={scratch: null}", "seeds=[5]"), fingerprint="f")
    with pytest.raises(UserError, match=r"arms\.local_mae\.loss\.w_rg"):
        claim(config(words, "arms.local_mae.loss.w_rg=1"), fingerprint="f")


def test_a_folder_of_something_else_is_left_alone(words, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(UserError, match="not the folder of a comparison and not empty"):
        claim(config(words), fingerprint="f")


# Running the parts


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
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


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
    context = ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    monkeypatch.setenv("RAY_ADDRESS", context.address_info["address"])
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
