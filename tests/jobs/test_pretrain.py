"""`glmae pretrain` through its door: what it leaves, workers, kills, and bad input."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from PIL import Image
from safetensors.torch import load_file

from glmae_ray import checkpoint
from glmae_ray.cli import main
from glmae_ray.config import PretrainConfig
from glmae_ray.models.vit3d import Encoder
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.tracking import read_events, read_metrics
from tests.conftest import TINY
from tests.jobs.planted import leaks
from tests.jobs.prometheus import Figure, endpoint, figures, scrape, total

pytestmark = pytest.mark.ray

WORDS = [
    *TINY,
    "steps=8",
    "optim.base_lr=0.1",
    "optim.warmup_steps=2",
    "log.every_steps=1",
    "save.every_steps=2",
    "validation.every_steps=4",
    "validation.samples=4",
]

# What tells a healthy run from a collapsed one, beside the terms.
HEALTH = {
    "teacher_entropy", "student_entropy_global", "student_entropy_local", "kl_gg", "kl_gl",
    "center_norm", "cls_std_global", "cls_std_local", "gradient_norm", "lr", "teacher_momentum",
    "teacher_temperature", *(f"loss_{name}" for name in ("rl", "rg", "gg", "gl")),
}  # fmt: skip


def words(store: Path, run: Path, *more: str) -> list[str]:
    return ["pretrain", *WORDS, f"store={store}", f"run={run}", *more]


def losses(run: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(run) if "loss" in r}


@pytest.fixture(scope="module")
def finished_run(small_store, tmp_path_factory) -> Path:
    """A run of two workers, left alone from start to end."""
    run = tmp_path_factory.mktemp("runs") / "two"
    assert main(words(small_store, run, "resources.workers=2")) == 0
    return run


def test_a_run_leaves_the_folder_that_the_readme_promises(finished_run):
    config = json.loads((finished_run / "config.json").read_text())
    assert PretrainConfig.model_validate(config).resources.workers == 2
    facts = json.loads((finished_run / "environment.json").read_text())
    assert facts["packages"]["torch"] == torch.__version__
    assert len(facts["store_fingerprint"]) == 64
    assert any((finished_run / "tensorboard").iterdir())
    for kind in ("global", "local"):
        for step in (0, 4, 8):
            with Image.open(finished_run / "pictures" / f"{kind}_{step:07d}.png") as picture:
                assert picture.width > 600
    summary = json.loads((finished_run / "summary.json").read_text())
    assert (summary["steps"], summary["samples"]) == (8, 32)
    for name in ("wall_s", "samples_per_s", "peak_memory_bytes"):
        assert summary[name] > 0
    assert 0 <= summary["data_wait_share"] <= 1
    held_out = summary["val_reconstruction"]
    assert held_out["r2"] == pytest.approx(1 - held_out["last"] / held_out["trivial"])
    assert held_out["best"] <= held_out["last"] < held_out["first"]


def test_every_step_is_logged_once_with_its_terms_and_costs(finished_run):
    records = [r for r in read_metrics(finished_run) if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, 9))
    for record in records:
        parts = [record[f"weighted_{name}"] for name in ("rl", "rg", "gg", "gl")]
        assert record["loss"] == pytest.approx(sum(parts), rel=1e-5)
        assert record["gradient_norm"] > 0
        assert record.keys() >= HEALTH
        assert 0 <= record["data_wait_share"] <= 1
    assert records[0]["teacher_momentum"] == pytest.approx(0.996)


def test_operators_see_what_the_run_wrote_down(finished_run):
    def is_all(found: list[Figure]) -> bool:
        return total(found, "ray_glmae_step_duration_seconds_count") == 2 * 8  # of two workers

    found = figures(endpoint(), until=is_all, verb="pretrain", run=finished_run.name)
    summary = json.loads((finished_run / "summary.json").read_text())
    assert total(found, "ray_glmae_samples_total") == summary["samples"] == 8 * 4
    records = read_metrics(finished_run)
    saved = [r["save_s"] for r in records if "save_s" in r]
    assert total(found, "ray_glmae_checkpoints_total") == len(saved)
    assert total(found, "ray_glmae_checkpoint_seconds_total") == pytest.approx(sum(saved))
    steps = [r for r in records if "loss" in r]
    first_s = steps[0]["first_batch_s"]
    for name, field in (("step", "interval_s"), ("data_wait", "data_wait_s")):
        seconds = total(found, f"ray_glmae_{name}_seconds_total", rank="0")
        assert seconds == pytest.approx(first_s + sum(r[field] for r in steps))
    assert not total(found, "ray_glmae_skipped_samples_total")
    assert not total(found, "ray_glmae_restarts_total")


def test_no_secret_of_the_workers_environment_is_in_the_run_the_logs_or_the_metrics(finished_run):
    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    assert any(logs.glob("worker-*.err"))
    assert not [*leaks(folders=[finished_run, logs], texts=[scrape(endpoint())])]


def test_the_encoder_file_rebuilds_the_encoder_without_the_run(finished_run):
    facts = json.loads((finished_run / "encoder.json").read_text())
    shape = {name: facts[name] for name in ("channels", "width", "depth", "heads")}
    encoder = Encoder(patch=tuple(facts["patch"]), **shape)
    encoder.load_state_dict(load_file(finished_run / "encoder.safetensors"))
    z, y, x = facts["grid"]["global"]
    features = encoder(torch.rand(1, z * y * x, np.prod(facts["patch"])), grid=(z, y, x))
    assert features.shape == (1, 1 + z * y * x, facts["width"])
    assert facts["step"] == 8


@pytest.mark.slow
def test_one_worker_that_accumulates_has_the_same_curve_as_two(finished_run, small_store, tmp_path):
    assert main(words(small_store, tmp_path / "one", "engine.micro_batch=2")) == 0
    one, two = (read_metrics(run) for run in (tmp_path / "one", finished_run))
    terms = [f"loss_{name}" for name in ("rl", "rg", "gg", "gl")]
    for record, other in zip(one, two, strict=True):
        for name in [*terms, "loss", "teacher_entropy", "center_norm"]:
            if name in record:
                assert record[name] == pytest.approx(other[name], rel=1e-4), name
    assert held_out(tmp_path / "one") == pytest.approx(held_out(finished_run), rel=1e-4)


def held_out(run: Path) -> list[float]:
    return [r["val_reconstruction"]["loss"] for r in read_metrics(run) if "val_reconstruction" in r]


def test_the_same_command_after_the_end_does_nothing(finished_run, small_store, capsys):
    before = (finished_run / "metrics.jsonl").read_bytes()
    assert main(words(small_store, finished_run, "resources.workers=2")) == 0
    assert (finished_run / "metrics.jsonl").read_bytes() == before
    out = capsys.readouterr().out
    assert "has done its 8 steps already" in out
    assert out.splitlines()[-1] == f"run: {finished_run}"


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_command_as_if_nothing_had_happened(
    finished_run, small_store, tmp_path, capsys
):
    run = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "glmae_ray.cli",
        *words(small_store, run, "resources.workers=2"),
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    driver = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    _wait_for_step(run, 5, driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not (run / "summary.json").exists()
    assert main(words(small_store, run, "resources.workers=2")) == 0
    assert losses(run) == pytest.approx(losses(finished_run), rel=1e-5)
    assert held_out(run) == pytest.approx(held_out(finished_run), rel=1e-5)


def test_a_run_that_is_asked_to_stop_saves_and_names_the_command_that_goes_on(
    finished_run, small_store, local_ray, tmp_path
):
    run = tmp_path / "a run's folder"
    arguments = words(small_store, run, "resources.workers=2")
    driver = subprocess.Popen(
        [sys.executable, "-m", "glmae_ray.cli", *arguments],
        env=os.environ | {"RAY_ADDRESS": local_ray},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (run / "sittings.jsonl").exists():
        assert driver.poll() is None, "the run ended too early to be stopped"
        time.sleep(0.02)
    driver.send_signal(signal.SIGTERM)
    out, err = driver.communicate(timeout=240)
    assert driver.returncode == 143, err
    step = checkpoint.latest_step(run)
    assert step == max(losses(run))
    assert 1 <= step < 8
    assert f"SIGTERM: saved at step {step} of 8" in out
    assert not (run / "encoder.safetensors").exists()
    line = err.splitlines()[-1]
    assert line.startswith("glmae pretrain: SIGTERM; continue with: glmae pretrain ")
    command = shlex.split(line.partition("continue with: ")[2])
    assert command == ["glmae", *arguments]
    assert main(command[1:]) == 0
    assert losses(run) == pytest.approx(losses(finished_run), rel=1e-5)
    theirs = load_file(finished_run / "encoder.safetensors")
    for name, value in load_file(run / "encoder.safetensors").items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-5)


def _wait_for_step(run: Path, step: int, driver: subprocess.Popen) -> None:
    until = time.monotonic() + 240
    while max(losses(run), default=0) < step:
        assert time.monotonic() < until, "the run did not get there"
        assert driver.poll() is None, "the run ended too early to be killed"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("resources.workers=4", "resources.workers: 4 at 1 CPU each and 1 CPU to make their views"),
        ("resources.gpu=true", "resources.workers: 1 need a GPU each; the cluster has 0"),
        ("engine.precision=fp16", "engine.precision: fp16 needs GPUs"),
        ("model.channels=2", "model.channels: 2, but the store's cases have [1]"),
    ],
)
def test_what_cannot_run_is_one_line_and_nothing_is_written(
    small_store, tmp_path, capsys, word, line
):
    run = tmp_path / "run"
    assert main(words(small_store, run, "resources.cpus_per_worker=1", word)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert line in errors[0]
    assert not run.exists()


def test_stores_that_cannot_be_trained_on_are_one_line(small_store, tmp_path, capsys):
    changed = tmp_path / "changed"
    shutil.copytree(small_store, changed)
    document = json.loads((changed / "zarr.json").read_text())
    document["attributes"]["glmae"]["format"] = 99
    (changed / "zarr.json").write_text(json.dumps(document))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter.txt").touch()
    VolumeStore.create(tmp_path / "empty")
    for store, line in (
        (tmp_path / "empty", "has no index.parquet"),
        (changed, "has format 99"),
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "folder", "is not a store that glmae made"),
    ):
        assert main(words(store, tmp_path / "run")) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert line in errors[0]
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_continued_with_what_would_change_it(
    finished_run, small_store, tmp_path, capsys
):
    assert main(words(small_store, finished_run, "seed=3", "steps=9")) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "seed: 3, but" in errors[0]
    assert "was started with 0" in errors[0]
    assert "steps: 9" in errors[1]
    (tmp_path / "notes.txt").write_text("mine")
    assert main(words(small_store, tmp_path)) == 2
    assert "is not a run folder and not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_killed_between_its_last_checkpoint_and_its_end_is_finished(
    finished_run, small_store, tmp_path
):
    run = tmp_path / "moved"
    shutil.copytree(finished_run, run)
    for name in ("summary.json", "encoder.safetensors"):
        (run / name).unlink()
    assert main(words(small_store, run, "resources.workers=2")) == 0
    for name in ("summary.json", "encoder.safetensors", "metrics.jsonl"):
        assert (run / name).read_bytes() == (finished_run / name).read_bytes()


def test_a_store_that_changed_under_a_run_is_refused(finished_run, small_store, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    facts = json.loads((run / "environment.json").read_text())
    facts["store_fingerprint"] = "f" * 64
    (run / "environment.json").write_text(json.dumps(facts))
    assert main(words(small_store, run, "resources.workers=2")) == 2
    assert "its fingerprint was ffffffffffff" in capsys.readouterr().err


@pytest.mark.slow
def test_a_collapse_is_told_on_the_terminal_and_in_the_events(small_store, tmp_path, capsys):
    flat = ("loss.student_temperature=100", "loss.teacher_temperature=[100,100]")
    short = ("steps=4", "validation.every_steps=4", "save.every_steps=4")
    assert main(words(small_store, tmp_path / "run", *flat, *short)) == 0
    (event,) = read_events(tmp_path / "run")
    assert (event["event"], event["step"], event["rank"]) == ("collapsed_to_uniform", 3, 0)
    assert event["line"] in capsys.readouterr().err
