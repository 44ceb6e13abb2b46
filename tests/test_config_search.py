"""What may be searched: every kind of space, every mistake, told at once before anything starts."""

from __future__ import annotations

import random

import pytest

from glmae_ray.cli import main
from glmae_ray.config_loading import load
from glmae_ray.config_search import SearchConfig
from glmae_ray.errors import UserError
from glmae_ray.search_space import Space, grid_size
from tests.models.finetunes import TINY

BASE = ["store=none", "run=none", *(f"finetune.{word}" for word in TINY[2:]), "trials=5"]
LR = "search.optim.lr={loguniform: [1e-5, 1e-3]}"


def search(*words: str) -> SearchConfig:
    return load(SearchConfig, [*BASE, *words])


def lines(*words: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        search(*words)
    return caught.value.lines


@pytest.mark.parametrize(
    ("given", "fits"),
    [
        ({"uniform": [0.2, 0.4]}, lambda v: 0.2 <= v < 0.4),
        ({"loguniform": ["1e-5", "1e-3"]}, lambda v: 1e-5 <= v < 1e-3),
        ({"quniform": [0.1, 0.5, 0.2]}, lambda v: v in (0.1, 0.3, 0.5)),
        ({"quniform": [0, 1, 0.3]}, lambda v: v in (0, 0.3, 0.6, 0.9)),
        ({"randint": [1, 5]}, lambda v: v in (1, 2, 3, 4)),
        ({"choice": [True, "a", [1, 2]]}, lambda v: v in (True, "a", [1, 2])),
    ],
)
def test_what_is_drawn_is_of_the_space_and_reaches_all_of_it(given, fits):
    space = Space.parse(given)
    source = random.Random(0)
    drawn = [space.draw(source) for _ in range(200)]
    assert all(fits(value) for value in drawn)
    if given.get("loguniform"):  # half of the draws below the geometric mean
        assert 70 < sum(value < 1e-4 for value in drawn) < 130
    elif "uniform" not in given:
        assert len({str(value) for value in drawn}) == {"quniform": 4, "randint": 4}.get(
            space.kind, 3
        ) - (given.get("quniform") == [0.1, 0.5, 0.2])


@pytest.mark.parametrize(
    ("given", "value", "inside"),
    [
        ({"uniform": [0.5, 1]}, 1.2, 1.0),
        ({"quniform": [0, 1, 0.3]}, 2.0, 0.9),
        ({"quniform": [0.1, 0.5, 0.2]}, 0.28, 0.3),
        ({"randint": [1, 5]}, 6.0, 4),
        ({"randint": [1, 5]}, 2.4, 2),
    ],
)
def test_a_number_that_was_moved_out_of_a_range_is_brought_back(given, value, inside):
    assert Space.parse(given).inside(value) == inside


def test_samples_are_a_function_of_seed_and_number_and_go_through_all_grids():
    words = (
        "search.head.feature_size={grid: [4, 8]}",
        "search.optim.layer_decay={grid: [0.5, 0.75, 1.0]}",
        LR,
    )
    cfg, again = search(*words, "trials=12"), search(*words, "trials=6")
    samples = [cfg.sample(number) for number in range(12)]
    assert samples[:6] == [again.sample(number) for number in range(6)]
    pairs = [(s["head.feature_size"], s["optim.layer_decay"]) for s in samples]
    assert pairs[:6] == [(a, b) for a in (4, 8) for b in (0.5, 0.75, 1.0)] == pairs[6:]
    assert len({sample["optim.lr"] for sample in samples}) == 12
    assert samples[0] != search(*words, "seed=1").sample(0)
    assert grid_size(cfg.spaces) == 6


@pytest.mark.parametrize("kind", ["choice", "grid"])
def test_a_number_that_yaml_reads_as_a_text_is_a_number_among_numbers(kind):
    assert Space.parse({kind: ["1e-7", 0.5, 2]}).values == (1e-7, 0.5, 2)
    assert Space.parse({kind: ["none", "1e5"]}).values == ("none", "1e5")


def test_grids_alone_say_how_many_trials_there_are():
    words = [word for word in BASE if not word.startswith("trials")]
    cfg = load(SearchConfig, [*words, "search.head.feature_size={grid: [4, 8]}"])
    assert cfg.count == 2


def test_dotted_names_and_sections_are_the_same_and_a_trial_has_the_sample():
    tree = {"optim.lr": {"choice": [0.5]}, "crops": {"count": {"randint": [1, 3]}}}
    cfg = SearchConfig.model_validate(search(LR).model_dump() | {"search": tree})
    assert set(cfg.spaces) == {"optim.lr", "crops.count"}
    trial = cfg.trial({"optim.lr": 0.5, "crops.count": 2}, run="r")
    assert (trial.optim.lr, trial.crops.count, trial.run, trial.head.feature_size) == (
        *(0.5, 2, "r"),
        4,
    )


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("search.optim.lr={loguniform: [0, 1]}", "search.optim.lr: loguniform: 0 has no logarithm"),
        ("search.optim.lr={uniform: [2, 1]}", "search.optim.lr: uniform: is empty, 2 is not below"),
        ("search.optim.lr={uniform: [1]}", "search.optim.lr: uniform: [1] is not [low, high]"),
        ("search.optim.lr={quniform: [1, 2, 3]}", "a step of 3 does not fit between 1 and 2"),
        ("search.crops.count={randint: [1, 2.5]}", "[1, 2.5] are not whole numbers"),
        ("search.optim.lr={choice: []}", "search.optim.lr: choice: is empty"),
        ("search.optim.lr={grid: [1, 1]}", "search.optim.lr: grid: [1, 1] names one twice"),
        ("search.optim.lr={normal: [0, 1]}", "is not one of {uniform, loguniform, quniform,"),
        ("search.optim.lr=3", "search.optim.lr: 3 is not one of {uniform,"),
        ("search.optim.lrr={choice: [1]}", "search.optim.lrr: unknown key; did you mean lr?"),
        ("search.nothing={choice: [1]}", "search.nothing: unknown key; known here: store, run"),
        ("search.optim.freeze={choice: [true, 3]}", "search.optim.freeze: 3 is wrong"),
        ("search.crops.count={uniform: [1, 5]}", "search.crops.count: 2.528 is wrong"),
        ("search.optim.layer_decay={uniform: [0.5, 1.2]}", "search.optim.layer_decay: 1.2 is"),
        ("search.optim.layer_decay={uniform: [-1, 1]}", "search.optim.layer_decay: -1.0 is wrong"),
        ("search.crops.size={choice: [[20, 12, 8]]}", "search.crops.size: (20, 12, 8) is not a"),
        ("search.run={choice: [a]}", "search.run: is the same for every trial"),
        ("search.resources.workers={choice: [1]}", "search.resources.workers: is the same for"),
    ],
)
def test_a_mistake_in_a_space_is_one_line(word, line):
    found = [told for told in lines(word) if line in told]
    assert len(found) == 1


def test_all_mistakes_are_told_at_once():
    told = lines(
        "search.optim.lr={loguniform: [0, 1]}",
        "search.head.feature_siz={grid: [1]}",
        "search.optim.freeze={choice: [maybe]}",
        "finetune.run=a",
        "schedule=asha",
        "judge_steps=5",
    )
    starts = [line.split(": ")[0] for line in told]
    assert {"search.optim.lr", "search.head.feature_siz", "search.optim.freeze"} <= set(starts)
    assert {"finetune.run", "judge_steps"} <= set(starts)


def test_mistakes_of_the_base_are_told_under_its_name(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text("steps: 0\nglobal_bath: 2\n")
    told = lines(f"base={path}", LR, "finetune.steps=0")
    assert any(line.startswith("finetune.steps: 0 is wrong") for line in told)
    assert any("finetune.global_bath: unknown key; did you mean global_batch?" in x for x in told)
    assert lines(f"base={tmp_path / 'none.yaml'}", LR)[0].endswith("(No such file or directory)")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("algorithm=optuna", "search.optim.lr={grid: [1]}"), "optuna goes through no grid"),
        (("objective=dice_and_seconds", LR), "only algorithm=optuna weighs"),
        (("objective=dice_and_seconds", "algorithm=optuna", "schedule=asha", LR), "use schedule="),
        (("judge_steps=2", LR), "judge_steps: has no effect with schedule=none"),
        (("schedule=asha", LR), "judge_steps: 500 is not below finetune.steps 4"),
        (("schedule=median", "search.steps={choice: [3, 4]}"), "compares trials of equal length"),
        (("schedule=pbt", "algorithm=optuna", LR), "pbt chooses by itself"),
        (("schedule=pbt", "trials=1", LR), "pbt needs a population"),
        (("schedule=pbt", "search.head.feature_size={choice: [4]}"), "cannot change while a run"),
        (("finetune.resources.workers=[1,2]", LR), "finetune.resources.workers: a range"),
        (("trials=null", LR), "trials: is missing"),
    ],
)
def test_what_does_not_fit_together_is_told(words, line):
    assert any(line in told for told in lines(*words))


def test_a_mistake_ends_with_exit_code_2_and_leaves_nothing(tmp_path, capsys):
    run = tmp_path / "run"
    words = [*BASE, f"run={run}", "search.optim.lrr={choice: [1]}"]
    assert main(["tune", *words]) == 2
    assert (
        capsys.readouterr().err == "glmae tune: search.optim.lrr: unknown key; did you mean lr?\n"
    )
    assert not run.exists()
