"""The trials of a search on disk: what is left to do, the table, the best config, forks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmae_ray import checkpoint
from glmae_ray.checkpoint import CorruptError
from glmae_ray.cli import main
from glmae_ray.config_loading import load
from glmae_ray.config_search import SearchConfig
from glmae_ray.jobs.forking import fork
from glmae_ray.jobs.run_folder import check_run
from glmae_ray.jobs.search_results import leave_pictures, leave_table
from glmae_ray.jobs.store_changes import StoreFacts
from glmae_ray.jobs.trials import (
    Trial,
    ended,
    figures,
    generations,
    next_run_of,
    read_trials,
    run_of,
    write_trial,
)
from glmae_ray.jobs.tune import _todo
from glmae_ray.store.index import read_rows
from glmae_ray.tracking import read_metrics
from tests.models.finetunes import TINY

FACTS = StoreFacts("f" * 64, "s" * 64)


def search(run: Path, *words: str) -> SearchConfig:
    base = [f"finetune.{word}" for word in TINY[2:]]
    space = [
        "search.optim.lr={loguniform: [1e-4, 1e-2]}",
        "search.optim.freeze={choice: [true, false]}",
    ]
    return load(SearchConfig, ["store=/store", f"run={run}", *base, *space, "trials=4", *words])


def write_run(cfg: SearchConfig, trial: Trial, dice: dict[int, float]) -> Path:
    """The folder of a finetuning run as one leaves it that measured so."""
    run = Path(str(run_of(Path(cfg.run), trial.name)))
    run.mkdir(parents=True)
    tree = cfg.trial(trial.sample, run=str(run)).model_dump(mode="json")
    (run / "config.json").write_text(json.dumps(tree))
    (run / "environment.json").write_text(json.dumps(FACTS._asdict()))
    records = [{"step": s, "val": {"mean": d}, "aside_s": 2.0} for s, d in dice.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if max(dice) == tree["steps"]:
        (run / "summary.json").write_text(json.dumps({"steps": tree["steps"]}))
    for step in dice:
        files = {
            checkpoint.STATE: json.dumps({"step": step, "parts": 1}).encode(),
            "engine/w": b"w",
        }
        checkpoint.write_part(checkpoint.folder_of(run, step=step, sitting=0), files, rank=0)
    return run


def begun(cfg: SearchConfig, number: int, dice: dict[int, float]) -> Trial:
    trial = Trial(f"{number:04d}", cfg.sample(number))
    write_trial(Path(cfg.run), trial)
    if dice:
        write_run(cfg, trial, dice)
    return trial


def test_what_is_over_is_not_done_again_and_what_was_interrupted_comes_first(tmp_path):
    cfg = search(tmp_path, "schedule=asha", "finetune.validation.every_steps=2")
    for number, dice in enumerate([{2: 0.1, 4: 0.3}, {2: 0.05}, {2: 0.2}]):
        trial = begun(cfg, number, dice)
        if number < 2:
            write_trial(tmp_path, ended(cfg, tmp_path, trial))
    states = [trial.state for trial in read_trials(tmp_path).values()]
    assert states == ["finished", "stopped", "running"]
    todo, left = _todo(cfg, tmp_path)
    assert ([trial.name for trial in todo], left) == (["0002", "0003"], 2)
    assert todo[1].sample == cfg.sample(3)
    more, left = _todo(search(tmp_path, "trials=6"), tmp_path)
    assert ([trial.name for trial in more], left) == (["0002", "0003", "0004", "0005"], 4)


def test_a_trial_that_ended_just_before_a_kill_is_finished(tmp_path):
    cfg = search(tmp_path)
    begun(cfg, 0, {4: 0.5})
    todo, _ = _todo(cfg, tmp_path)
    assert [trial.name for trial in todo] == ["0001", "0002", "0003"]
    assert read_trials(tmp_path)["0000"].state == "finished"


def test_a_sample_whose_fields_do_not_fit_each_other_fails_before_it_begins(tmp_path, capsys):
    cfg = search(
        tmp_path,
        "search.crops.size={grid: [[16, 12, 8], [16, 8, 8]]}",
        "search.model.patch={grid: [[8, 4, 2], [8, 12, 2]]}",
    )
    todo, left = _todo(cfg, tmp_path)
    assert ([trial.name for trial in todo], left) == (["0000", "0001", "0002"], 3)
    failed = read_trials(tmp_path)["0003"]
    assert failed.state == "failed"
    assert failed.reason.startswith("crops.size: (16, 8, 8) is not a multiple of model.patch")
    assert "trial 0003: failed: crops.size" in capsys.readouterr().out


def test_the_table_has_a_row_a_trial(tmp_path):
    cfg = search(tmp_path, "search.crops.size={choice: [[16, 12, 8], [16, 8, 8]]}")
    begun(cfg, 0, {2: 0.6, 4: 0.3})
    begun(cfg, 1, {2: 0.2, 4: 0.4})
    write_trial(tmp_path, Trial("0002", cfg.sample(2), "failed", "no memory"))
    _todo(cfg, tmp_path)
    leave_table(cfg)
    rows = read_rows((tmp_path / "trials.parquet").read_bytes())
    assert [row["state"] for row in rows] == ["finished", "finished", "failed"]
    assert [(row["dice_last"], row["dice_best"]) for row in rows[:2]] == [(0.3, 0.6), (0.4, 0.4)]
    assert [row["is_best"] for row in rows] == [False, True, False]
    assert [row["optim.lr"] for row in rows] == [cfg.sample(n)["optim.lr"] for n in range(3)]
    assert [json.loads(row["crops.size"]) for row in rows] == [
        cfg.sample(n)["crops.size"] for n in range(3)
    ]
    assert (rows[0]["step"], rows[0]["seconds"], rows[2]["reason"]) == (4, 4.0, "no memory")
    assert rows[0]["run"] == str(tmp_path / "trials" / "0000")


def test_none_is_best_that_another_beats_in_dice_and_seconds(tmp_path):
    cfg = search(tmp_path, "algorithm=optuna", "objective=dice_and_seconds")
    begun(cfg, 0, {4: 0.3})  # 2 s
    begun(cfg, 1, {1: 0.1, 2: 0.1, 4: 0.3})  # 6 s for the same
    begun(cfg, 2, {2: 0.4, 4: 0.5})
    _todo(cfg, tmp_path)
    leave_table(cfg)
    rows = read_rows((tmp_path / "trials.parquet").read_bytes())
    assert [row["is_best"] for row in rows] == [True, False, True]


def test_the_best_config_goes_through_the_door_of_finetune_unchanged(tmp_path, capsys):
    cfg = search(tmp_path)
    begun(cfg, 0, {4: 0.3})
    best = begun(cfg, 1, {4: 0.4})
    _todo(cfg, tmp_path)
    leave_table(cfg)
    words = [str(tmp_path / "best.yaml"), "store=/store", "run=/r"]
    assert main(["finetune", *words, "--dry-run"]) == 0
    expected = cfg.trial(best.sample, run="/r").model_dump(mode="json")
    assert json.loads(capsys.readouterr().out) == expected


def test_pictures_say_how_much_each_field_matters(tmp_path):
    cfg = search(tmp_path, "trials=12")
    for number in range(12):
        begun(cfg, number, {2: 0.1, 4: cfg.sample(number)["optim.lr"] * 50})
    leave_pictures(cfg)
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {"parallel.png", "importance.png"}
    from glmae_ray.jobs.optuna_trials import importances

    samples = [cfg.sample(number) for number in range(12)]
    shares = importances(cfg.spaces, [(s, s["optim.lr"]) for s in samples])
    assert shares["optim.lr"] > shares["optim.freeze"]


def test_a_fork_is_a_run_that_stands_where_the_other_does_with_its_own_fields(tmp_path):
    cfg = search(tmp_path)
    donor = write_run(cfg, Trial("0000", cfg.sample(0)), {2: 0.1, 3: 0.2})
    trial = Trial("0001", cfg.sample(1))
    write_run(cfg, trial, {2: 0.05})
    child = next_run_of(tmp_path, "0001")
    changes = {"optim.lr": 0.5, "optim.freeze": cfg.sample(0)["optim.freeze"]}
    fork(lambda: donor, child, changes=changes)
    assert run_of(tmp_path, "0001") == child
    assert len(generations(tmp_path, "0001")) == 2
    own = cfg.trial(changes, run=str(child))
    assert check_run(own, child, FACTS) is False  # to be continued, and by this config
    assert [c.step for c in checkpoint.complete(child)] == [3]
    assert dict(checkpoint.contents(checkpoint.complete(child)[0]))["engine/w"] == b"w"
    assert [r["step"] for r in read_metrics(child)] == [2, 3]
    assert json.loads((child / "fork.json").read_text()) == {
        **{"run": str(donor), "step": 3, "checkpoint": "step-0000003-0"},
        "changes": changes,
    }
    assert figures(child).last == 0.2


def test_a_fork_that_a_kill_cut_short_is_done_again_without_what_it_had(tmp_path):
    cfg = search(tmp_path)
    first = write_run(cfg, Trial("0000", cfg.sample(0)), {3: 0.1})
    second = write_run(cfg, Trial("0001", cfg.sample(1)), {2: 0.1})
    child = next_run_of(tmp_path, "0002")
    fork(lambda: first, child, changes={})
    (child / "config.json").unlink()  # the last that is written
    assert generations(tmp_path, "0002") == []
    fork(lambda: second, child, changes={})
    assert [c.step for c in checkpoint.complete(child)] == [2]


def test_a_fork_takes_no_damaged_checkpoint(tmp_path):
    cfg = search(tmp_path)
    donor = write_run(cfg, Trial("0000", cfg.sample(0)), {2: 0.1})
    next((donor / "checkpoints").glob("*/engine/w")).write_bytes(b"x")
    with pytest.raises(CorruptError):
        fork(lambda: donor, tmp_path / "child", changes={})
    assert not (tmp_path / "child" / "config.json").exists()
