"""A run folder in an object store: all that a run leaves but its checkpoints, and outages."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from glmae_ray import outbox, scribe, terminal
from glmae_ray.cli import main
from glmae_ray.errors import UserError
from glmae_ray.jobs.starting import keep_report
from glmae_ray.jobs.store_changes import StoreFacts, accept_change, store_change
from glmae_ray.models.encoder_formats import publish_weights
from glmae_ray.models.load_report import LoadReport
from glmae_ray.paths import names_in, publish, read_file, to_place
from glmae_ray.tracking import (
    RunLog,
    flush,
    progress,
    read_events,
    read_metrics,
    summarise,
    write_event,
)
from glmae_ray.watch import Event
from tests.conftest import tiny_config
from tests.test_tracking import held_out, interval

PANELS = {name: np.linspace(0, 1, 480).reshape(6, 8, 10) for name in ("original", "masked")}


@pytest.fixture
def run(bucket, impatient):
    return to_place(f"{bucket}/runs/a")


def note(number: int) -> Event:
    return Event("note", f"line {number}", {"number": number})


def puts(proxy, name: str) -> int:
    return sum(r.method in ("PUT", "POST") and name in r.path for r in proxy.requests)


def test_a_run_in_a_bucket_holds_the_files_of_one_on_disk(run, tmp_path):
    for place in (run, tmp_path):
        log = RunLog(place, step=0, tensorboard=False)
        for record in (held_out(0, 0.9), interval(2), interval(4), held_out(4, 0.7)):
            log.write(record)
        log.picture("global", PANELS, step=4)
        assert log.close()
        summarise(place)
    for name in ("metrics.jsonl", "summary.json", "pictures/global_0000004.png"):
        assert read_file(run / name) == (tmp_path / name).read_bytes(), name
    assert names_in(run) == {"metrics.jsonl", "summary.json", "pictures"}


def test_a_run_that_goes_on_keeps_the_records_up_to_its_checkpoint(run):
    log = RunLog(run, step=0, tensorboard=False)
    for step in (2, 4, 6):
        log.write(interval(step))
    assert log.flush()
    log = RunLog(run, step=4, tensorboard=False)
    log.write(interval(6, loss=-1.0))
    assert log.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(run)] == [(2, 8), (4, 6), (6, -1)]
    assert RunLog(run, step=0, tensorboard=False).close()
    assert read_metrics(run) == []


def test_records_that_cannot_be_read_are_not_taken_for_none(proxy, impatient):
    run = to_place("s3://" + proxy_bucket(proxy) + "/runs/a")
    log = RunLog(run, step=0, tensorboard=False)
    log.write(interval(2))
    assert log.close()
    proxy.rule = lambda _: "403"
    with pytest.raises(UserError, match="check the key"):
        RunLog(run, step=2, tensorboard=False)
    proxy.rule = lambda _: None
    assert len(read_metrics(run)) == 1


def proxy_bucket(proxy) -> str:
    """The bucket of the test: the last that was made."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    return list(s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets)[-1]


def _write_events(url: str, rank: int) -> None:
    for number in range(3):
        write_event(to_place(url), note(number), rank=rank)
        time.sleep(0.05)
    assert flush(to_place(url), timeout_s=30)


def test_each_process_has_an_object_of_events_and_readers_see_all_by_time(run):
    write_event(run, note(-1), rank=0)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_write_events, args=(str(run), rank)) for rank in (1, 2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    write_event(run, note(3), rank=0)
    assert flush(run)
    assert len(names_in(run / "events")) == 3
    events = read_events(run)
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    assert (events[0]["number"], events[-1]["number"], len(events)) == (-1, 3, 8)
    for rank in (1, 2):
        assert [e["number"] for e in events if e["rank"] == rank] == [0, 1, 2]


def test_a_run_that_was_copied_to_a_disk_is_read_like_one_in_a_bucket(run, tmp_path):
    write_event(run, note(1), rank=0)
    assert flush(run)
    (name,) = names_in(run / "events")
    publish(tmp_path / "events" / name, read_file(run / "events" / name) or b"")
    assert read_events(tmp_path) == read_events(run)
    write_event(tmp_path, note(2), rank=0)  # and goes on there
    assert [event["number"] for event in read_events(tmp_path)] == [1, 2]


def test_many_records_and_events_are_few_requests(proxy, impatient):
    run = to_place("s3://" + proxy_bucket(proxy) + "/runs/a")
    log = RunLog(run, step=0, tensorboard=True)
    began = time.monotonic()
    for step in range(1, 301):
        log.write(interval(step))
        write_event(run, note(step), rank=0)
    took = time.monotonic() - began
    assert log.close()
    assert len(read_metrics(run)) == len(read_events(run)) == 300
    most = 4 + took / outbox.EVERY_S
    assert puts(proxy, "metrics.jsonl") <= most
    assert puts(proxy, "/events/") <= most
    assert puts(proxy, "/tensorboard/") <= 3


@pytest.mark.parametrize("fault", ["stall", "500", "403", "drop"])
def test_an_outage_holds_no_step_is_told_and_loses_nothing(fault, proxy, impatient, capsys):
    run = to_place("s3://" + proxy_bucket(proxy) + "/runs/a")
    log = RunLog(run, step=0, tensorboard=False)
    log.write(interval(2))
    assert log.flush()
    proxy.rule = lambda _: fault
    slowest = 0.0
    for step in range(4, 24, 2):
        began = time.monotonic()
        log.write(interval(step))
        write_event(run, note(step), rank=0)
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.02)
    assert slowest < 0.2
    assert not log.flush(timeout_s=1.0)
    proxy.rule = lambda _: None
    proxy.silence_ends.set()
    assert log.close(timeout_s=60)
    assert [r["step"] for r in read_metrics(run)] == list(range(2, 24, 2))
    events = read_events(run)
    assert [e["number"] for e in events if e["event"] == "note"] == list(range(4, 24, 2))
    if fault != "stall":  # a silence that ends in time is no failure
        (told,) = [e for e in events if e["event"] == "late_write"]
        assert "s3://" in told["line"]
        assert "it stays in memory until it can be written" in told["line"]
        assert told["line"] in capsys.readouterr().err
        assert [e["event"] for e in events][-1] == "written_again"


def test_tensorboard_in_a_bucket_has_the_numbers_of_all_sittings(run, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for step in (0, 2):
        log = RunLog(run, step=step, tensorboard=True)
        log.write(interval(step + 2))
        log.picture("global", PANELS, step=step + 2)
        assert log.close()
    assert len(list(tmp_path.glob("glmae-tensorboard-*"))) == 1  # the first sitting's is gone
    there = tmp_path / "there"
    for name in names_in(run / "tensorboard"):
        publish(there / name, read_file(run / "tensorboard" / name) or b"")
    events = EventAccumulator(str(there)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(2, 8.0), (4, 6.0)]
    assert events.Tags()["images"] == ["pictures/global"]


class Terminal:
    """What progress has printed so far."""

    def __init__(self, capsys):
        self._capsys, self.lines = capsys, []

    def wait_for(self, words: str) -> None:
        """Until a line has them."""
        until = time.monotonic() + 20
        while not any(words in line for line in self.look()):
            assert time.monotonic() < until, self.lines
            time.sleep(0.05)

    def look(self) -> list[str]:
        self.lines += self._capsys.readouterr().err.splitlines()
        return self.lines


@pytest.fixture
def shown(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "_STORE_S", 0.1)
    monkeypatch.setattr(terminal, "_SHARE", 1.0)
    return Terminal(capsys)


def test_progress_follows_a_run_in_a_bucket_through_an_outage(proxy, impatient, shown):
    run = to_place("s3://" + proxy_bucket(proxy) + "/runs/a")
    write_event(run, note(0), rank=0)
    assert flush(run)
    log = RunLog(run, step=0, tensorboard=False)
    with progress(run, steps=6):
        log.write(interval(4))
        shown.wait_for("step 4/6")
        proxy.rule = lambda _: "403"
        shown.wait_for("progress: s3://")
        time.sleep(1.0)  # several looks
        proxy.rule = lambda _: None
        write_event(run, note(1), rank=0)
        shown.wait_for("line 1")  # an object of its own, so nothing says which a look sees first
        log.write(interval(6))
        assert log.close()
    lines = shown.look()
    assert sum(line.startswith("progress: ") for line in lines) == 1
    assert "line 0" not in lines  # told in an earlier sitting
    assert lines.count("line 1") == 1
    assert lines[-1] == "step 6/6  loss 4.000  2.0 samples/s  00:00:00 left"


def test_progress_shows_an_event_that_arrives_after_later_ones(run, shown):
    publish(run / "events" / "c.jsonl", b"")
    with progress(run, steps=6):
        time.sleep(2.0)  # the first look
        for name, when in (("b", 20.0), ("a", 10.0)):
            record = {"time": when, "event": "note", "rank": 0, "line": f"of {name}"}
            publish(run / "events" / f"{name}.jsonl", json.dumps(record) + "\n")
            shown.wait_for(f"of {name}")
    assert shown.look() == ["of b", "of a"]


def test_weights_and_the_report_of_init_go_to_a_bucket(run, tmp_path):
    words = dict.fromkeys(("axes", "heads", "positions", "channels"), "said")
    report = LoadReport(
        *("file", "a" * 64, "student", ("norm.weight",), {}, (), "ZYX"), **words, facts={}
    )
    for place in (run, tmp_path):
        facts = {"width": 4}
        publish_weights(place / "encoder.safetensors", {"a": torch.ones(2, 3)}, facts=facts)
        keep_report(report, place)
    for name in ("encoder.safetensors", "encoder.json", "init.json"):
        assert read_file(run / name) == (tmp_path / name).read_bytes(), name


def test_a_change_of_the_store_is_found_accepted_and_kept_in_a_bucket(run, capsys):
    cfg = tiny_config("accept_store_change=true")
    was, now = StoreFacts("a" * 64, "b" * 64), StoreFacts("c" * 64, "b" * 64)
    assert accept_change(cfg, run, was, step=lambda: 0) == []
    publish(run / "environment.json", json.dumps(was._asdict()))
    assert accept_change(cfg, run, now, step=lambda: 0) == []  # it has not begun
    publish(run / "config.json", "{}")
    assert store_change(cfg, run, was) is None
    assert "its fingerprint was aaaaaaaaaaaa and is cccccccccccc" in str(
        store_change(cfg, run, now)
    )
    (change,) = accept_change(cfg, run, now, step=lambda: 7)
    assert change["step"] == 7
    (event,) = read_events(run)  # it does not wait for the end of the run
    assert event["event"] == "store_changed"
    assert event["line"] in capsys.readouterr().out


def test_a_full_disk_ends_neither_pictures_nor_tensorboard_nor_the_run(tmp_path, capsys):
    log = RunLog(tmp_path, step=0, tensorboard=True)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    assert log._board is not None
    log._board._writer.add_scalar = full
    (tmp_path / "pictures").write_text("no folder")
    log.write(interval(2))
    log.picture("global", PANELS, step=2)
    log.write(interval(4))
    assert log.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [2, 4]
    told = [event["line"] for event in read_events(tmp_path)]
    assert len(told) == 2
    assert told[0].endswith("No space left on device; nothing more comes until the next start")
    assert told[1].endswith("it is left out")


def test_a_process_has_one_scribe_for_a_run(tmp_path):
    assert scribe.scribe_of(tmp_path) is scribe.scribe_of(Path(str(tmp_path)))


def test_why_a_run_failed_is_one_line_and_the_story_is_in_its_bucket(bucket, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise RuntimeError("a long story\nthe reason")

    monkeypatch.setattr("glmae_ray.jobs.pretrain.run", fail)
    run = f"{bucket}/runs/failed"
    words = ["pretrain", "store=none", f"run={run}", "steps=1", "global_batch=1"]
    assert main(words) == 1
    assert capsys.readouterr().err.splitlines() == [
        "glmae pretrain: failed: the reason",
        f"run: {run}",
        f"log: {run}/error.log",
    ]
    assert b"RuntimeError: a long story" in (read_file(to_place(run) / "error.log") or b"")
