"""What a run leaves: records, summary, pictures, and lines while it goes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from glmae_ray.tracking import RunLog, progress, read_metrics, summarise


def interval(step: int, **more) -> dict[str, object]:
    return {
        "step": step,
        "samples": step * 4,
        "loss": 10.0 - step,
        "interval_steps": 2,
        "interval_samples": 8,
        "interval_s": 4.0,
        "data_wait_s": 1.0,
        "samples_per_s": 2.0,
        "peak_memory_bytes": 100 + step,
    } | more


def held_out(step: int, loss: float) -> dict[str, object]:
    figures = {"loss": loss, "trivial": 0.8, "r2": 1 - loss / 0.8}
    return {"step": step, "samples": step * 4, "aside_s": 0.5, "val_reconstruction": figures}


def test_records_beyond_the_resumed_step_are_lost_work_and_go(tmp_path):
    log = RunLog(tmp_path, step=0, tensorboard=False)
    for step in (2, 4, 6):
        log.write(interval(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a kill in the middle of a line
    assert [r["step"] for r in read_metrics(tmp_path)] == [2, 4, 6]
    RunLog(tmp_path, step=4, tensorboard=False).write(interval(6, loss=-1.0))
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(2, 8), (4, 6), (6, -1)]
    RunLog(tmp_path, step=0, tensorboard=False)
    assert read_metrics(tmp_path) == []


def test_the_summary_adds_up_all_sittings(tmp_path):
    log = RunLog(tmp_path, step=0, tensorboard=False)
    records = [
        held_out(0, 0.9), interval(2, first_batch_s=3.0), interval(4, skipped_steps=1),
        held_out(4, 0.7),
        interval(6, peak_memory_bytes=7, skipped_steps=2), held_out(6, 0.75),
    ]  # fmt: skip
    for record in records:
        log.write(record)
    summary = summarise(tmp_path)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["samples"]) == (6, 24)
    assert summary["skipped_steps"] == 3
    assert summary["wall_s"] == pytest.approx(3 * 4 + 3 * 0.5 + 3.0)
    assert summary["samples_per_s"] == pytest.approx(2.0)
    assert summary["data_wait_share"] == pytest.approx(0.25)
    assert summary["peak_memory_bytes"] == 104
    assert summary["val_reconstruction"] == {
        "first": 0.9, "last": 0.75, "best": 0.7, "trivial": 0.8, "r2": 1 - 0.75 / 0.8,
    }  # fmt: skip


def test_tensorboard_has_the_numbers_under_their_groups(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, step=0, tensorboard=True)
    log.write(interval(2))
    log.write(held_out(2, 0.4))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(2, 8.0)]
    assert events.Scalars("val_reconstruction/r2")[0].value == pytest.approx(0.5)


def test_a_picture_shows_its_panels_side_by_side(tmp_path):
    volume = np.linspace(0, 1, 6 * 8 * 10).reshape(6, 8, 10)
    masked = np.where(volume > 0.5, np.nan, volume)
    log = RunLog(tmp_path, step=0, tensorboard=True)
    log.picture("global", {"original": volume, "masked": masked}, step=12)
    with Image.open(tmp_path / "pictures" / "global_0000012.png") as picture:
        assert picture.width > picture.height * 0.8
        assert len(picture.convert("RGB").getcolors(maxcolors=100_000) or []) > 50


def test_progress_without_a_terminal_prints_lines_with_step_loss_rate_and_time_left(
    tmp_path, capsys
):
    log = RunLog(tmp_path, step=0, tensorboard=False)
    with progress(tmp_path, steps=6):
        log.write(interval(4))
        log.write(interval(6))
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "step 6/6  loss 4.000  2.0 samples/s  00:00:00 left"


def test_progress_on_a_terminal_is_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    log = RunLog(tmp_path, step=0, tensorboard=False)
    with progress(tmp_path, steps=6):
        log.write(interval(6))
    text = capsys.readouterr().err
    assert "6/6" in text
    assert "loss 4.000, 2.0 samples/s" in text
