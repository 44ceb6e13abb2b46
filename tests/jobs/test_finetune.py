"""`glmae finetune` through its door: what it leaves, what is measured, continuing, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from glmae_ray.cli import main
from glmae_ray.jobs.segmenting import Segmenter
from glmae_ray.models.encoder_formats import encoder_facts, publish_weights
from glmae_ray.models.segmenter_files import load_segmenter, read_facts
from glmae_ray.models.vit3d import Encoder
from glmae_ray.store.index import VolumeIndex
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.tracking import read_metrics
from tests.models.finetunes import TINY
from tests.test_crops import write_store

pytestmark = pytest.mark.ray

VALUES = {"liver": 2, "spleen": 5, "kidney": 300}
SHAPE = {"channels": 1, "patch": (8, 4, 2), "width": 24, "depth": 3, "heads": 2}
WORDS = [
    *TINY,
    *("model.channels=1", "steps=6", "crops.window=[-300,600]", "optim.lr=0.01"),
    *("save.every_steps=3", "save.keep=9", "validation.every_steps=3", "log.every_steps=1"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("finetune") / "store", cases=6)


def finetune(store: Path, run: Path, *words: str) -> int:
    return main(["finetune", *WORDS, f"store={store}", f"run={run}", *words])


@pytest.fixture(scope="module")
def finished(store, local_ray, tmp_path_factory) -> Path:
    """A run of two workers from random first weights."""
    run = tmp_path_factory.mktemp("runs") / "run"
    assert finetune(store, run, "resources.workers=2", "label_cases=4") == 0
    return run


def test_it_leaves_who_was_trained_on_and_weights_that_tell_all(finished):
    cases = json.loads((finished / "cases.json").read_text())
    assert len(cases["train"]) == 4
    assert cases["val"] == ["v"]
    assert cases["structures"] == ["liver", "spleen", "kidney"]
    for which in ("last", "best"):
        module, facts = load_segmenter(finished, which=which)
        assert facts["structures"] == cases["structures"]
        assert facts["modality"] == ["CT"]
        assert module.encoder.patch == SHAPE["patch"]
    assert read_facts(finished)["step"] == 6
    assert {"pictures", "tensorboard", "summary.json"} <= {p.name for p in finished.iterdir()}
    assert len(list((finished / "pictures").glob("val_*.png"))) == 2


def test_the_figure_of_a_held_out_case_is_its_dice_under_the_weights_that_are_left(finished, store):
    records = [r["val"] for r in read_metrics(finished) if "val" in r]
    assert len(records) == 2  # after steps 3 and 6, none before training
    volumes = VolumeStore.open(store)
    row = VolumeIndex.read(store).row("v")
    truth = volumes.read_label("v", "structures")
    labels = Segmenter(str(finished)).label(volumes.read("v"), row)
    for number, (name, value) in enumerate(VALUES.items(), start=1):
        found, there = labels == number, truth == value
        if there.any() or found.any():
            dice = 2 * (found & there).sum() / (found.sum() + there.sum())
            assert records[-1][name] == pytest.approx(dice, abs=1e-6)
    best = max(records, key=lambda record: record["mean"])
    assert read_facts(finished, which="best")["val"]["mean"] == best["mean"]


def test_a_run_that_goes_on_from_a_checkpoint_gives_the_same_losses(
    finished, store, local_ray, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for later in (run / "checkpoints").glob("step-0000006-*"):
        shutil.rmtree(later)
    (run / "summary.json").unlink()
    before = {r["step"]: r["loss"] for r in read_metrics(finished) if "loss" in r}
    assert finetune(store, run, "resources.workers=2", "label_cases=4") == 0
    after = {r["step"]: r["loss"] for r in read_metrics(run) if "loss" in r}
    assert sorted(after) == [1, 2, 3, 4, 5, 6]
    assert [after[step] for step in after] == pytest.approx([before[s] for s in after], rel=1e-5)
    theirs, ours = (load_segmenter(folder)[0].state_dict() for folder in (finished, run))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


@pytest.mark.slow
def test_a_frozen_encoder_is_that_of_init(store, local_ray, tmp_path):
    torch.manual_seed(3)
    encoder = Encoder(**SHAPE)
    place = tmp_path / "encoder.safetensors"
    publish_weights(place, encoder.state_dict(), facts=encoder_facts(encoder))
    run = tmp_path / "run"
    assert finetune(store, run, f"init={place}", "optim.freeze=true", "steps=2") == 0
    module, facts = load_segmenter(run)
    ours = module.encoder.state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in encoder.state_dict().items())
    assert facts["origin"]["sha256"] == json.loads((run / "init.json").read_text())["sha256"]


@pytest.mark.slow
def test_layers_learn_at_shares_of_the_rate(store, local_ray, tmp_path):
    run = tmp_path / "run"
    words = ("optim.layer_decay=1e-6", "optim.weight_decay=0", "steps=2", "optim.warmup_steps=1")
    assert finetune(store, run, *words) == 0
    torch.manual_seed(0)
    first = Encoder(**SHAPE).state_dict()  # what seed 0 starts with
    trained = load_segmenter(run)[0].encoder.state_dict()
    moved = {name: (trained[name] - first[name]).abs().max().item() for name in first}
    assert moved["blocks.0.attn.qkv.weight"] < 1e-6
    assert moved["norm.weight"] > 1e-4


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["structures=[liver,tumour]"], "structures: tumour: in none of the 6 training cases"),
        (["model.channels=2"], "model.channels: 2, but the images have 1"),
        (["where=case_id == 'nobody'"], "where: "),
        (["engine.zero_stage=3"], "engine.zero_stage: 3 is for pre-training"),
        (["init=nowhere"], "nowhere: has no encoder.safetensors"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(words, line, store, tmp_path, capsys):
    run = tmp_path / "run"
    assert finetune(store, run, *words) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert line in told
    assert not run.exists()


def test_another_config_in_the_same_folder_is_refused(finished, store, capsys):
    words = ("resources.workers=2", "label_cases=3")
    assert finetune(store, finished, *words) == 2
    told = capsys.readouterr().err
    assert "label_cases: 3, but" in told
    assert json.loads((finished / "summary.json").read_text())["steps"] == 6
