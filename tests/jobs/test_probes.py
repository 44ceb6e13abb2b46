"""Probes beside `glmae pretrain`: what they leave, resumed and failing ones, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from glmae_ray.cli import main
from glmae_ray.config import PretrainConfig
from glmae_ray.models.encoder_files import load_encoder
from glmae_ray.probing import probe
from glmae_ray.tracking import read_events, read_metrics
from tests.conftest import TINY
from tests.test_crops import write_store

pytestmark = pytest.mark.ray

WORDS = [
    *TINY,
    *("steps=8", "log.every_steps=2", "save.every_steps=4", "save.keep=9", "optim.base_lr=0.1"),
    *("validation.every_steps=8", "validation.samples=2", "log.pictures=false"),
]
KINDS = "probe.kinds=[knn,linear,segmentation]"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("probes") / "store", cases=6)


@pytest.fixture(scope="module")
def targets(store) -> Path:
    rows = [f"p{n},{'ill' if n % 2 else 'well'}" for n in range(6)]
    path = store.parent / "classes.csv"
    path.write_text("\n".join(["case_id,class", *rows, "v,well", ""]))
    return path


def pretrain(store: Path, run: Path, *words: str) -> int:
    return main(["pretrain", *WORDS, f"store={store}", f"run={run}", *words])


def probed(run: Path) -> dict[int, dict]:
    """Step to figures; a step that comes twice is a mistake."""
    records = [r for r in read_metrics(run) if "probe" in r]
    found = {r["step"]: r["probe"] for r in records}
    assert len(found) == len(records)
    return found


def events_of_probes(run: Path) -> list[dict]:
    return [event for event in read_events(run) if "probe" in event["event"]]


@pytest.fixture(scope="module")
def finished(store, targets, local_ray, tmp_path_factory) -> Path:
    """A run of two workers with all probes before the first step and after the last.

    None between them: whether one that comes soon is dropped hangs on how fast the machine is.
    """
    run = tmp_path_factory.mktemp("runs") / "run"
    words = ("probe.every_steps=8", KINDS, f"probe.targets={targets}", "resources.workers=2")
    assert pretrain(store, run, *words) == 0
    return run


def test_figures_of_every_probe_stand_beside_the_losses(finished):
    assert not events_of_probes(finished)
    figures = probed(finished)
    assert [*figures] == [0, 8]
    for values in figures.values():
        assert {"knn", "linear", "majority", "dice"} <= values.keys()
        # v has no kidney; whether its crops show some of the spleen is the plan's.
        assert {"mean", "liver"} <= values["dice"].keys() <= {"mean", "liver", "spleen"}
        assert 0 < values["dice"]["liver"] <= 1
        assert (values["classified_cases"], values["segmented_cases"]) == (1, 1)
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 8
    assert summary["probe"] == {
        "first": {"step": 0, **figures[0]},
        "last": {"step": 8, **figures[8]},
    }


def test_tensorboard_has_them_under_the_steps_of_their_encoders(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    figures = probed(finished)
    for name, of in (("knn", lambda p: p["knn"]), ("dice/liver", lambda p: p["dice"]["liver"])):
        scalars = [(e.step, e.value) for e in events.Scalars(f"probe/{name}")]
        assert scalars == [(step, pytest.approx(of(p))) for step, p in figures.items()]


def test_the_last_probe_is_that_of_the_encoder_that_the_run_leaves(finished):
    cfg = PretrainConfig.model_validate(json.loads((finished / "config.json").read_text()))
    encoder, _ = load_encoder(finished)
    values = probe(encoder, cfg).values
    assert values["dice"] == pytest.approx(probed(finished)[8]["dice"], abs=1e-3)
    assert values["dice"] != probed(finished)[0]["dice"]


@pytest.mark.slow
def test_a_resumed_run_keeps_its_probes_and_survives_one_that_fails(
    finished, store, targets, tmp_path, capsys
):
    run, broken = tmp_path / "run", tmp_path / "broken"
    shutil.copytree(finished, run)
    shutil.copytree(store, broken)
    shutil.rmtree(broken / "cases" / "v")
    for later in (run / "checkpoints").glob("step-0000008-*"):
        shutil.rmtree(later)
    (run / "summary.json").unlink()
    words = ("probe.every_steps=8", f"probe.store={broken}", "resources.workers=2")
    assert pretrain(store, run, *words) == 0
    assert probed(run) == {0: probed(finished)[0]}
    missing, failed = events_of_probes(run)
    assert (missing["event"], missing["step"]) == ("not_probed", 8)
    assert "step 8: probed without case v: " in missing["line"]
    assert failed["line"] == "step 8: the probe failed: no case could be read"
    assert failed["line"] in capsys.readouterr().err
    assert json.loads((run / "summary.json").read_text())["probe"]["last"]["step"] == 0
    assert (run / "encoder.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["probe.kinds=[knn]"], "probe.targets: is missing; knn and linear take a CSV"),
        (["probe.val_where=case_id == 'x'"], "probe.val_where: \"case_id == 'x'\" selects no case"),
        (["probe.structures=[heart]"], "probe.structures: heart: in none of the 6 training cases"),
        (["probe.targets=nowhere.csv"], "nowhere.csv does not exist"),
        (["probe.cpus=3"], "probe.cpus: 3, but beside 1 workers at 0.5 CPU each"),
        (["probe.store=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_probed_is_one_line_and_nothing_is_written(
    words, line, store, local_ray, tmp_path, capsys
):
    run = tmp_path / "run"
    assert pretrain(store, run, "probe.every_steps=4", *words) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert line in told
    assert not run.exists()


def test_a_store_without_labels_is_refused(small_store, tmp_path, capsys):
    assert pretrain(small_store, tmp_path / "run", "probe.every_steps=4") == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "probe.where: \"split == 'train'\" selects" in told
    assert "none of which has a label map" in told


def test_a_section_without_effect_is_told(store, tmp_path, capsys):
    assert pretrain(store, tmp_path / "run", "probe.cases=4") == 2
    assert "probe.every_steps: is missing" in capsys.readouterr().err
