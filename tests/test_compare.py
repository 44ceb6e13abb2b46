"""What a comparison runs, which ones are refused, and the folder that it claims."""

from __future__ import annotations

import pytest

from benchmarks._compare_config import Cell, CompareConfig
from benchmarks._compare_folder import claim
from benchmarks._compare_outcome import pairs_of
from benchmarks._compare_parts import parts_of
from benchmarks.compare import main
from glmae_ray.config_loading import load, shipped
from glmae_ray.errors import UserError
from glmae_ray.labelled import choose_cases
from tests.comparisons import config, store, words

__all__ = ["store", "words"]


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
