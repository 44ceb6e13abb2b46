"""A store that changed under a run: refused, or accepted and written down."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from glmae_ray import checkpoint
from glmae_ray.cli import main
from glmae_ray.tracking import read_events, read_metrics
from tests.conftest import TINY
from tests.store.scans import voxels, write_nifti

pytestmark = pytest.mark.ray

# Checkpoints after each step, all kept: a run can be put back to any of them.
WORDS = [
    *TINY,
    *("steps=2", "optim.warmup_steps=1", "log.every_steps=1"),
    *("log.pictures=false", "log.tensorboard=false"),
    *("save.every_steps=1", "validation.every_steps=2", "validation.samples=4"),
]


def words(store: Path, run: Path, *more: str) -> list[str]:
    return ["pretrain", *WORDS, f"store={store}", f"run={run}", *more]


def facts_of(run: Path) -> dict:
    return json.loads((run / "environment.json").read_text())


@pytest.fixture(scope="module")
def finished_run(small_store, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    assert main(words(small_store, run)) == 0
    return run


def unfinished_copy(run: Path, to: Path) -> Path:
    """As a kill after the last checkpoint leaves it."""
    shutil.copytree(run, to)
    (to / "summary.json").unlink()
    return to


def back_to_step_1(run: Path) -> Path:
    """Without its newest checkpoint."""
    checkpoint.remove(checkpoint.complete(run)[0].place)
    return run


@pytest.fixture
def grown_store(small_store, tmp_path) -> Path:
    """The store with one case more."""
    scans, store = tmp_path / "scans", tmp_path / "store"
    shutil.copytree(small_store.parent / "scans", scans)
    shutil.copytree(small_store, store)
    for seed in range(20, 26):
        write_nifti(scans / f"q{seed}.nii.gz", voxels((34, 30, 26), seed=seed), axes="RAS")
    assert main(["ingest", f"source={scans}", f"store={store}", "splits=[0.6,0.4,0.0]"]) == 0
    return store


def test_a_changed_store_is_refused_with_both_fingerprints_and_the_way_out(
    finished_run, grown_store, tmp_path, capsys
):
    run = unfinished_copy(finished_run, tmp_path / "run")
    before = facts_of(run)
    assert main(words(grown_store, run)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"its fingerprint was {before['store_fingerprint'][:12]} and is " in line
    assert line.endswith("name another run, or accept_store_change=true")
    assert facts_of(run) == before
    assert read_events(run) == []


@pytest.mark.slow
def test_a_change_that_is_accepted_is_told_recorded_and_trained_on(
    finished_run, grown_store, tmp_path, capsys
):
    run = back_to_step_1(unfinished_copy(finished_run, tmp_path / "run"))
    before = facts_of(run)
    assert main(words(grown_store, run, "accept_store_change=true")) == 0
    after = facts_of(run)
    digests = {
        name: {"was": before[name], "is": after[name]}
        for name in ("store_fingerprint", "selection")
    }
    assert all(pair["was"] != pair["is"] for pair in digests.values())
    assert after["store_changes"] == [{"step": 1, **digests}]
    (event,) = read_events(run)
    assert (event["event"], event["step"]) == ("store_changed", 1)
    out = capsys.readouterr().out.splitlines()
    assert event["line"] in out
    for pair in (before, after):
        assert pair["store_fingerprint"][:12] in event["line"]
    assert event["line"].endswith("the samples from here on are those of the new store")
    old, new = ([r["loss"] for r in read_metrics(r) if "loss" in r] for r in (finished_run, run))
    assert new[0] == old[0]
    assert new[1] != pytest.approx(old[1], rel=1e-5)
    # The new one is the current one: the run goes on without the word, and keeps the list.
    (run / "summary.json").unlink()
    assert main(words(grown_store, run)) == 0
    assert facts_of(run)["store_changes"] == after["store_changes"]


@pytest.mark.slow
def test_a_change_of_the_selection_alone_can_be_accepted(
    finished_run, small_store, tmp_path, capsys
):
    run = unfinished_copy(finished_run, tmp_path / "run")
    facts = facts_of(run)
    (run / "environment.json").write_text(json.dumps(facts | {"selection": "e" * 64}))
    assert main(words(small_store, run)) == 2
    assert "its selection of cases was eeeeeeeeeeee and is" in capsys.readouterr().err
    assert main(words(small_store, run, "accept_store_change=true")) == 0
    (change,) = facts_of(run)["store_changes"]
    assert change["selection"] == {"was": "e" * 64, "is": facts["selection"]}
    assert change["step"] == 2


@pytest.mark.slow
def test_the_word_says_where_it_has_no_effect(finished_run, small_store, tmp_path, capsys):
    run = unfinished_copy(finished_run, tmp_path / "run")
    before = facts_of(run)
    assert main(words(small_store, run, "accept_store_change=true")) == 0
    assert "accept_store_change: has no effect" in capsys.readouterr().out
    assert facts_of(run) == before
    assert read_events(run) == []
