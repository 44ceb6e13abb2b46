"""`glmae demo`: the phantoms alone, and the whole path at a size for tests."""

from __future__ import annotations

import json

import pytest

from glmae_ray.cli import main

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

SMALL = (
    "pretrain={steps: 4, global_batch: 2, views: {global_size: 32, local_size: 16},"
    " validation: {samples: 2}, save: {every_steps: 4}, optim: {warmup_steps: 1},"
    " resources: {workers: 1}}",
    "finetune={steps: 2, global_batch: 2, crops: {size: 32}, validation: {samples: 1},"
    " inference: {overlap: 0}, resources: {workers: 1}}",
)


def test_phantoms_alone_are_an_nnunet_data_set(tmp_path):
    assert main(["demo", f"out={tmp_path}", "only=phantoms", "people=2"]) == 0
    assert len(list((tmp_path / "phantoms" / "imagesTr").iterdir())) == 2
    assert not (tmp_path / "store").exists()


def test_the_demo_goes_from_phantoms_to_organs_and_ends_with_its_run(tmp_path, capsys):
    # The fifth is the first who is held out.
    assert main(["demo", f"out={tmp_path}", "people=5", "seed=1", *SMALL]) == 0
    run = tmp_path / "run"
    assert capsys.readouterr().out.splitlines()[-1] == f"run: {run}"
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    assert (run / "encoder.safetensors").exists()
    started = json.loads((tmp_path / "organs" / "init.json").read_text())
    assert str(run) in started["source"]
    evaluation = json.loads((tmp_path / "organs" / "evaluation.json").read_text())
    assert set(evaluation["structures"]) == {"lungs", "spine", "liver", "kidneys", "vessels"}


def test_a_mistake_in_what_the_demo_changes_is_told_before_anything_is_written(tmp_path, capsys):
    assert main(["demo", f"out={tmp_path / 'd'}", "pretrain={steps: many}"]) == 2
    assert "steps: 'many' is wrong" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
