"""Schedulers and Optuna at a new start of a search: they know what the trials before measured."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler

from glmae_ray.jobs.optuna_trials import OptunaTrials
from glmae_ray.jobs.searching import Politely, _inside, _scheduler
from glmae_ray.jobs.trials import Trial, ended, read_trials, write_trial
from tests.jobs.test_trials import begun, search

JUDGED = ("finetune.validation.every_steps=2", "judge_steps=2", "finetune.steps=10")


def over(cfg, number: int, dice: dict[int, float]) -> Trial:
    trial = ended(cfg, Path(cfg.run), begun(cfg, number, dice))
    write_trial(Path(cfg.run), trial)
    return trial


def decision(cfg, dice: float) -> str:
    asked: list[str] = []
    scheduler = Politely(_scheduler(cfg)._inner, asked.append)
    new = TuneTrial("new", stub=True)
    scheduler.on_trial_add(None, new)
    told = scheduler.on_trial_result(None, new, {"step": 2, "dice": dice})
    assert told == TrialScheduler.CONTINUE  # one that is asked ends by itself
    return "asked" if asked else told


@pytest.mark.parametrize("schedule", ["asha", "median"])
def test_a_schedule_remembers_trials_of_an_earlier_start(schedule, tmp_path):
    cfg = search(tmp_path, f"schedule={schedule}", *JUDGED)
    assert decision(cfg, 0.1) == TrialScheduler.CONTINUE  # nothing to compare with
    for number, dice in enumerate((0.2, 0.3, 0.4)):
        over(cfg, number, {2: dice, 4: dice})
    assert decision(cfg, 0.1) == "asked"
    assert decision(cfg, 0.5) == TrialScheduler.CONTINUE


def test_pbt_stays_inside_the_ranges(tmp_path):
    cfg = search(tmp_path)
    config = {"trial": {"name": "0000", "sample": {"optim.lr": 1.0, "optim.freeze": True}}}
    inside = {"optim.lr": 1e-2, "optim.freeze": True}
    assert _inside(cfg, config) == {"trial": {"name": "0000", "sample": inside}}


def optuna(cfg) -> OptunaTrials:
    known = read_trials(Path(cfg.run)).values()
    is_over = [trial for trial in known if trial.state != "running"]
    todo = [trial for trial in known if trial.state == "running"]
    return OptunaTrials(cfg, over=is_over, todo=todo)


def test_optuna_gives_the_interrupted_trial_first_and_then_new_ones(tmp_path):
    cfg = search(tmp_path, "algorithm=optuna", "trials=5")
    over(cfg, 0, {2: 0.1, 4: 0.3})
    over(cfg, 1, {2: 0.1})
    write_trial(tmp_path, Trial("0002", cfg.sample(2), "failed", "no memory"))
    begun(cfg, 3, {2: 0.2})
    searcher = optuna(cfg)
    states = [trial.state.name for trial in searcher._study.trials]
    assert states == ["COMPLETE", "PRUNED", "FAIL", "WAITING"]
    again, new = searcher.suggest("a")["trial"], searcher.suggest("b")["trial"]
    assert again == {"name": "0003", "sample": pytest.approx(cfg.sample(3))}
    assert new["name"] == "0004"
    cfg.trial(new["sample"], run="r")
    assert searcher.suggest("c") == OptunaTrials.FINISHED
    searcher.on_trial_complete("a", {"dice": 0.2})
    searcher.on_trial_complete("b", error=True)
    assert [trial.state.name for trial in searcher._study.trials[3:]] == ["PRUNED", "FAIL"]


def test_optuna_learns_what_is_good(tmp_path):
    cfg = search(tmp_path, "algorithm=optuna", "trials=60", "finetune.steps=4")
    for number in range(30):
        sample = cfg.sample(number)
        over(cfg, number, {4: 1 - abs(sample["optim.lr"] - 3e-3) * 100})
    searcher = optuna(cfg)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = [searcher.suggest(str(n))["trial"]["sample"]["optim.lr"] for n in range(20)]
    near = [1e-3 < value < 6e-3 for value in drawn]
    assert sum(near) > 14  # of all of the range 0.39


def test_optuna_writes_off_a_sample_whose_fields_do_not_fit_each_other(tmp_path):
    cfg = search(
        tmp_path,
        "algorithm=optuna",
        "trials=12",
        "search.crops.size={choice: [[16, 12, 8], [16, 8, 8]]}",
        "search.model.patch={choice: [[8, 4, 2], [8, 12, 2]]}",
    )
    searcher = optuna(cfg)
    given = []
    while (found := searcher.suggest(str(len(given)))) != OptunaTrials.FINISHED:
        given.append(found["trial"]["name"])
    failed = [trial.name for trial in read_trials(tmp_path).values() if trial.state == "failed"]
    assert failed
    assert sorted(given + failed) == [f"{number:04d}" for number in range(12)]


def test_optuna_weighs_dice_against_seconds(tmp_path):
    cfg = search(tmp_path, "algorithm=optuna", "objective=dice_and_seconds")
    over(cfg, 0, {2: 0.1, 4: 0.3})
    (trial,) = optuna(cfg)._study.trials
    assert trial.values == [0.3, 4.0]
